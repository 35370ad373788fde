"""The one place of `serving` that reads the launcher's environment: API keys, and what a started server inherits.

Not for settings: those are in the configuration. Invariants: a started server asks itself without a proxy; what its
processes need among themselves stays on the loopback interface; its key is in its environment and nowhere else.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.sglang_launch import KEY_VARIABLE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PROXY_EXCEPTIONS = ("no_proxy", "NO_PROXY")
_DISTRIBUTED_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_")
_DISTRIBUTED_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CHANGES_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
_SEVERAL_GROUPS = ("--dp", "--data-parallel", "--enable-dp", "--nnodes", "--dist-init-addr")
"""Beginnings of arguments that make several process groups, or one over several hosts."""


@dataclass(frozen=True)
class Place:
    """Where a started server runs and with what."""

    device: str
    port: int
    """Of its HTTP process"""
    folder: Path
    """Of its own, for sockets and temporary files; nobody else may read it"""
    api_key: str = field(repr=False)
    tensor_parallel: int = 1
    cpu_threads: int = 1
    """Of each of the `tensor_parallel` ranks on a CPU"""
    extra_args: tuple[str, ...] = ()


def read_api_key(variable: str | None, *, key: str) -> str | None:
    """Return the API key held by the environment variable `variable`; None where none is configured.

    Raises ServerError where the variable that `key` names is unset or empty.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "")
    if not secret:
        raise ServerError(f"{key}={variable}: this environment variable is unset or empty; export it in the launcher")
    return secret


def server_environment(place: Place, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a started server: ours, without what torchrun told this rank.

    `extra` wins over everything.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _DISTRIBUTED_NAMES
        and not name.startswith(_DISTRIBUTED_PREFIXES)
        # sampled log-probs must be those of the distribution that was sampled, temperature included
        and name != _CHANGES_LOG_PROBS
    }
    if place.device == "cpu":
        inherited |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(place.cpu_threads)}
        if place.tensor_parallel > 1:
            inherited["SGLANG_CPU_OMP_THREADS_BIND"] = _cpu_groups(place.tensor_parallel, place.cpu_threads)
    return inherited | _own_files(inherited, place) | _loopback(inherited, place) | dict(extra)


def _own_files(inherited: Mapping[str, str], place: Place) -> dict[str, str]:
    """The key, and a folder for sockets; the cache of compiled kernels stays where it is, for the next launch."""
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    return {
        KEY_VARIABLE: place.api_key,
        "TMPDIR": str(place.folder),
        "TORCHINDUCTOR_CACHE_DIR": inherited.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
    }


def _user() -> str:
    """Name of this user; a container may have a number without a name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _loopback(inherited: Mapping[str, str], place: Place) -> dict[str, str]:
    """What keeps the server's requests to itself off proxies, and its listeners off other interfaces."""
    # where both are there, most programs read one of them only
    listed = ",".join(inherited.get(name, "") for name in _PROXY_EXCEPTIONS).split(",")
    entries = [*(entry.strip() for entry in listed if entry.strip()), *LOOPBACK]
    found = dict.fromkeys(_PROXY_EXCEPTIONS, ",".join(dict.fromkeys(entries)))
    if any(argument.startswith(_SEVERAL_GROUPS) for argument in place.extra_args):
        return found
    return found | {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # its ranks meet over a file: torch's TCP store listens on all interfaces
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{place.folder}/ranks",
        # SGLang names shared memory after these two, so they must differ between servers of one host
        "MASTER_ADDR": LOOPBACK[0],
        "MASTER_PORT": str(place.port),
    }


def _cpu_groups(groups: int, cpus_per_group: int) -> str:
    """CPU ids of each rank, as SGLang wants them: `0,1|2,3`. CPUs are shared where there are too few."""
    usable = sorted(os.sched_getaffinity(0))
    picked = [usable[index % len(usable)] for index in range(groups * cpus_per_group)]
    per_rank = [picked[start : start + cpus_per_group] for start in range(0, len(picked), cpus_per_group)]
    return "|".join(",".join(map(str, cpus)) for cpus in per_rank)
