"""Checks that this machine has what a launch needs: packages, API keys, free ports, GPUs. torch is not imported.

Versions and memory are checked by `tropd doctor`. Invariant: a GPU counts only if a process of this job could open it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from tropd_mcore.config.derived import server_name, started_router, started_servers, used_router, used_servers
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.server_checks import budget_problems
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.interpreter import ask, ask_router, way_to_sglang
from tropd_mcore.train.preflight_types import Fault

HOST = "127.0.0.1"
DEVICES = Path("/dev")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def packages(config: Config, environ: Mapping[str, str]) -> Iterator[Fault]:
    """Check that every package that the configuration needs is installed; a fault names the key that needs it."""
    wanted = [
        ("torch", "platform.kind", "training", "torch"),
        ("megatron.core", "platform.kind", "training", "megatron-core"),
        ("transformers", "student.path", "reading tokenizers", "transformers"),
    ]
    if config.verifier.kind == "math_verify":
        wanted.append(("math_verify", "verifier.kind", "verifier.kind=math_verify", "'tropd-mcore[eval]'"))
    if config.monitor.wandb_project is not None:
        wanted.append(("wandb", "monitor.wandb_project", "monitor.wandb_project", "'tropd-mcore[wandb]'"))
    if config.monitor.tensorboard:
        wanted.append(("tensorboard", "monitor.tensorboard", "monitor.tensorboard=true", "tensorboard"))
    for key, server in one_per_interpreter(config).items():
        if (problem := interpreter_problem(key, server)) is not None:
            yield Fault(f"{key}.python", problem)
    if uses_cuda(config, environ):
        wanted.append(("transformer_engine", "platform.kind", "CUDA", "'tropd-mcore[gpu]'"))
    for module, key, purpose, package in wanted:
        if not importable(module):
            yield Fault(key, f"{key}: {purpose} needs the package {module}, which is not installed; "
                        f"run `pip install {package}`")  # fmt: skip
    for key, server in one_per_interpreter(config).items():
        if (problem := missing_sglang(key, server)) is not None:
            yield Fault(key, f"{key}: {problem}")
    if (problem := router_problem(config)) is not None:
        yield Fault("rollout.router", problem)


def one_per_interpreter(config: Config) -> dict[str, ServerConfig]:
    """Return {section: settings} of the servers to start, the first one of each interpreter."""
    first: dict[Path | None, str] = {}
    started = started_servers(config)
    for key, server in started.items():
        first.setdefault(server.python, key)
    return {key: started[key] for key in first.values()}


def router_problem(config: Config) -> str | None:
    """Return in one line why the router of the job cannot be started here; None if it can, or none is to be started."""
    router = started_router(config)
    if router is None:
        return None
    try:
        ask_router(router.python, key="rollout.router")
    except ServerError as error:
        return str(error)
    return None


def missing_sglang(section: str, server: ServerConfig) -> str | None:
    """Return in one line that a server to start here lacks SGLang, and what to do about it; None if it does not."""
    if server.url is not None or server.python is not None or importable("sglang"):
        return None
    return f"starting a server needs the package sglang, which is not installed; {way_to_sglang(section)}"


def interpreter_problem(section: str, server: ServerConfig) -> str | None:
    """Return in one line why the interpreter of a server to start is unusable; None if it is not, or none is named."""
    if server.url is not None or server.python is None:
        return None
    try:
        ask(server.python, key=f"{section}.python")
    except ServerError as error:
        return str(error)
    return None


def importable(module: str) -> bool:
    """Return whether the package `module` is installed, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def api_keys(config: Config, environ: Mapping[str, str]) -> Iterator[Fault]:
    """Check that the environment variable with the API key of each server or router in use is set."""
    for section, server in used_servers(config).items():
        variable = server.api_key_env
        if variable is not None and server.url is not None and not environ.get(variable):
            yield Fault(
                f"{section}.api_key_env",
                f"{section}.api_key_env={variable}: this environment variable is unset or empty; export it in the "
                "shell that launches",
            )
    router = used_router(config)
    variable = None if router is None else router.api_key_env
    if variable is not None and not environ.get(variable):
        yield Fault(
            "rollout.router.api_key_env",
            f"rollout.router.api_key_env={variable}: this environment variable is unset or empty; export it in the "
            "shell that launches",
        )


def ports(config: Config) -> Iterator[Fault]:
    """Check that each fixed port of a server to start on the first node is free.

    A port that a server of an earlier launch of this run holds counts as free.
    """
    for section, server in started_servers(config).items():
        if server.port is None or server.node or _is_left_over(config, section, server.port):
            continue  # the rank that starts a server on another node finds out there
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((HOST, server.port))
                probe.listen()
        except OSError as error:
            yield Fault(
                f"{section}.port",
                f"{section}.port={server.port} is taken ({error.strerror}); stop what listens there, or leave it out "
                "so that the OS chooses a free port",
            )


def _is_left_over(config: Config, section: str, port: int) -> bool:
    """Return whether a server of an earlier launch has the port, by its record. The launch then decides what to do."""
    record = config.run.dir / "logs" / f"{server_name(section)}.server.json"
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return int(values["port"]) == port and psutil.pid_exists(int(values["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def visible_gpus(environ: Mapping[str, str]) -> int | None:
    """Return how many GPUs a process of this job could open; None if the system does not tell (WSL).

    The number comes from CUDA_VISIBLE_DEVICES if it is set, otherwise from the device files of NVIDIA's driver.
    """
    if (DEVICES / "dxg").exists():
        return None
    present = sum(1 for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    named = environ.get(VISIBLE)
    if named is None or present == 0:
        return present
    entries = [entry.strip() for entry in named.split(",")]
    return next((index for index, entry in enumerate(entries) if entry in ("", "-1", "NoDevFiles")), len(entries))


def uses_cuda(config: Config, environ: Mapping[str, str]) -> bool:
    """Return whether the job will run on GPUs, as far as this is known without torch."""
    return config.platform.kind == "cuda" or (config.platform.kind == "auto" and bool(visible_gpus(environ)))


def devices(config: Config, ranks: int | None, environ: Mapping[str, str]) -> Iterator[Fault]:
    """Check that this machine has a GPU for each of its `ranks` (None = not known) and for each rank of a server."""
    kind, gpus = config.platform.kind, visible_gpus(environ)
    if gpus is None:
        return
    if kind == "cpu":
        if gpus and "+cpu" not in _torch_version():
            yield Fault(
                "platform.kind",
                f"platform.kind=cpu: {gpus} GPUs are visible, which the CPU platform refuses; hide them "
                f"({VISIBLE}=), or set platform.kind=cuda",
            )
        return
    if gpus == 0:
        yield _no_gpu(config, ranks, environ)
        return
    if "+cpu" in _torch_version():
        text = f"platform.kind={kind}: {gpus} GPUs are visible but torch {_torch_version()} is the CPU build"
        yield Fault("platform.kind", f"{text}; install torch for CUDA, or set platform.kind=cpu", _weight(kind))
    limit = f"; {VISIBLE}={environ[VISIBLE]}" if environ.get(VISIBLE) else ""
    if ranks is not None and ranks > gpus:
        yield Fault(
            "parallel",
            f"parallel: {ranks} ranks on this machine but {gpus} GPUs are visible{limit}; change parallel.*, launch on "
            "more machines, or make more GPUs visible",
        )
    if kind == "auto":  # with platform.kind=cuda, the configuration itself was refused
        for section, problem in budget_problems(config):
            yield Fault(section, problem)
    for section, server in started_servers(config).items():
        if server.gpus is not None and max(server.gpus) >= gpus:
            yield Fault(
                f"{section}.gpus",
                f"{section}.gpus={list(server.gpus)}: the launch sees GPUs 0 to {gpus - 1}{limit}; correct the numbers",
            )
        if server.gpus is None and server.tensor_parallel > gpus:
            yield Fault(
                f"{section}.tensor_parallel",
                f"{section}.tensor_parallel={server.tensor_parallel} but {gpus} GPUs are visible{limit}; lower it",
            )


def _no_gpu(config: Config, ranks: int | None, environ: Mapping[str, str]) -> Fault:
    why = f" ({VISIBLE}={environ[VISIBLE]!r})" if VISIBLE in environ else ""
    if config.platform.kind == "cuda":
        text = f"platform.kind=cuda: no GPU is visible on this machine{why}"
        return Fault("platform.kind", f"{text}; launch where they are, or set platform.kind=cpu")
    what = f"{ranks} ranks train" if ranks is not None else "the job trains"
    return Fault(
        "platform.kind",
        f"platform.kind=auto: no GPU is visible on this machine{why}, so {what} on the CPU; set platform.kind=cuda to "
        "refuse that, or platform.kind=cpu if it is intended",
        level="warning",
    )


def _weight(kind: str) -> Literal["refused", "warning"]:
    return "refused" if kind == "cuda" else "warning"


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""
