"""The section of one SGLang server, and how the entries of a fleet get the keys that they do not set.

Checks of it are in `server_checks`. Invariant: after validation every entry of `servers` has all of its keys, so no
other module reads the template for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from tropd_mcore.config.fields import Dtype, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

OF_A_START = (
    "python",
    "node",
    "port",
    "tensor_parallel",
    "gpus",
    "threads",
    "max_total_tokens",
    "mem_fraction",
    "release_memory",
    "extra_args",
    "log_max_mib",
)
"""Keys of a server section that say how a server is started, so they mean nothing for one that runs."""


class ServerConfig(Section):
    """One SGLang server. The job starts and stops it, unless `url` names a server that runs elsewhere."""

    url: str | None = None
    """Base URL of a running server. null = start a server on the loopback address."""
    python: Path | None = None
    """Python interpreter that runs the started server, for example .venv-server/bin/python. It needs sglang and the
    Python version of this program, and nothing of this project. null = the interpreter of this program."""
    node: NonNegativeInt = 0
    """Node of the job on which the server is started, counted from 0. The first rank of that node starts it."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the started server. null = a free port chosen by the operating system."""
    tensor_parallel: PositiveInt = 1
    """Number of tensor-parallel ranks of the started server."""
    gpus: tuple[NonNegativeInt, ...] | None = None
    """GPUs of the started server, counted from 0 among those that the launch sees (CUDA_VISIBLE_DEVICES). null = the
    first tensor_parallel ones."""
    threads: PositiveInt | None = None
    """CPU threads of each rank of the started server (OMP_NUM_THREADS). null = 1 on a CPU; with GPUs, the CPUs divided
    by tensor_parallel, at most 8."""
    dtype: Dtype | None = None
    """Dtype of weights and activations of the started server. null = that of its model (student.dtype or
    teacher.dtype)."""
    max_total_tokens: PositiveInt | None = None
    """Size of the KV cache in tokens. null = SGLang decides. With GPUs, a started server needs this key or
    mem_fraction."""
    mem_fraction: Fraction | None = None
    """Share of the GPU memory that is free when the server starts, for its weights and KV cache. null = SGLang decides,
    0.8 to 0.9. After a restart less is free, so prefer max_total_tokens."""
    release_memory: bool = False
    """rollout.server on GPUs only. Let the started server give its memory back while the trainer scores and trains
    (docs/servers.md)."""
    weights: Literal["shared", "broadcast", "value", "disk"] | None = None
    """Rollout servers only. How weights reach the server (docs/servers.md). `shared`: shared memory of this machine.
    `broadcast`: one broadcast to all servers, in a process group with their ranks, whose machines must reach the first
    node. `value`: inside HTTP requests, one copy per rank. `disk`: files in weights_folder. null = `shared` for a
    server started on the first node; for any other `value` up to 64 MiB of weights and `broadcast` above."""
    weights_folder: Path | None = None
    """Only with weights=disk: an existing folder that the first node and the server see under the same absolute path.
    Each update writes the whole model into a new subfolder and removes the one before."""
    extra_args: tuple[str, ...] = ()
    """Additional arguments for `sglang.launch_server`, written as on its command line."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest time in seconds that a started server may take until it responds."""
    request_timeout_s: PositiveFloat = 1200.0
    """Longest time in seconds that one request may take."""
    hang_timeout_s: PositiveFloat = 60.0
    """Seconds without a response to a health request, while other requests are in flight, after which a server counts
    as hung. A started server is then restarted as if it had died (max_restarts). A server at `url` ends the run."""
    max_retries: NonNegativeInt = 3
    """Retries of one request after a connection error, a timeout or a status 429 or 5xx, with exponential backoff."""
    max_restarts: NonNegativeInt = 2
    """How often a started server that died may be restarted in one launch. The current step is then retried."""
    max_concurrency: PositiveInt = 64
    """Maximum number of requests in flight per client."""
    log_max_mib: PositiveFloat = 64.0
    """Size in MiB at which the log of a started server is rotated. One older file is kept."""
    api_key_env: str | None = None
    """Only with `url`: name of the environment variable that holds the API key. The key itself is never in a
    configuration."""


def with_template(values: object) -> object:
    """Return the values of a section in which each entry of `servers` has the keys of `server` that it does not set.

    An entry with a url gets no key that says how a server is started. Anything that is not a mapping stays as it is,
    for the validator to refuse.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("servers"), list | tuple):
        return values
    template = values.get("server") or {}
    if isinstance(template, ServerConfig):
        template = template.model_dump(exclude_unset=True)
    if not isinstance(template, Mapping):
        return values
    servers = []
    for entry in values["servers"]:
        if isinstance(entry, Mapping):
            runs = entry.get("url") is not None
            entry = {**{key: value for key, value in template.items() if not (runs and key in OF_A_START)}, **entry}
        servers.append(entry)
    return {**values, "servers": servers}
