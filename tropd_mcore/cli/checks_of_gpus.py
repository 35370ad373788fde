"""Findings of `tropd doctor` about GPUs: what the driver sees, what torch can use, and whether packages really import.

This module does not check that a configuration fits the GPUs (`train.preflight_machine`, `checks_of_config`).
Invariants: no CUDA context is opened in this process. Packages are imported in a process of their own, so one that
crashes or hangs ends neither doctor nor its other checks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.derived import started_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.serving.environment import of_interpreter
from tropd_mcore.train.preflight_machine import VISIBLE, one_per_interpreter, uses_cuda

SMI = ("nvidia-smi", "--query-gpu=index,name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits")
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA version that torch is built for -> first branch of NVIDIA's drivers that runs it (CUDA release notes, table
"minimum required driver versions")."""
BUSY = 0.05
"""Share of a GPU's memory above which another process is assumed to use it; a display takes less."""
ASK_S = 60.0
"""Longest wait for nvidia-smi. It takes seconds where the driver is not kept loaded."""
IMPORT_S = 300.0
"""Longest wait for an import. The first one on a network disk can take minutes."""
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi. Memory in bytes."""

    index: int
    name: str
    driver: str
    total: int
    used: int


@dataclass(frozen=True)
class TorchBuild:
    """What torch says of itself and of CUDA, read without opening a GPU."""

    version: str
    cuda: str | None
    """CUDA version that it is built for; None for a CPU build"""
    sees_gpus: bool


def installed_torch() -> TorchBuild:
    """Return the build of the torch in this interpreter. Raises ImportError or OSError if it cannot be imported."""
    import torch

    return TorchBuild(torch.__version__, torch.version.cuda, torch.cuda.is_available())


def gpus_of_driver() -> list[Gpu] | str:
    """Return the GPUs that nvidia-smi lists, or what it says instead. Without nvidia-smi there are none."""
    path = shutil.which(SMI[0])
    if path is None:
        return []
    try:
        answer = subprocess.run([path, *SMI[1:]], capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    if answer.returncode:
        return (answer.stdout.strip() or answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[0]
    found = [gpu for line in answer.stdout.splitlines() if (gpu := _gpu(line)) is not None]
    return found or f"{path} printed no GPU: {answer.stdout[:100]!r}"


def _gpu(line: str) -> Gpu | None:
    cells = [cell.strip() for cell in line.split(",")]
    try:
        return Gpu(int(cells[0]), cells[1], cells[2], int(cells[3]) * MIB, int(cells[4]) * MIB)
    except (IndexError, ValueError):  # "[N/A]" in a virtual GPU without memory numbers
        return None


def driver(build: TorchBuild, seen: list[Gpu] | str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check that torch can use the GPUs that the driver has, and say how much of their memory is free."""
    if isinstance(seen, str):
        yield Finding("warn", "driver", f"nvidia-smi cannot tell the GPUs: {seen}")
        return
    if not seen:
        return
    hidden = environ.get(VISIBLE)
    what = f"{len(seen)} x {seen[0].name}, driver {seen[0].driver}"
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding("ok", "driver", f"{what}; hidden from this process by {VISIBLE}={hidden}")
        return
    if build.cuda is None:
        yield Finding("warn", "driver", f"{what}; torch {build.version} is a CPU build and will not use them: for a "
                      "job on GPUs use the environment of docs/install.md, \"A GPU machine\"")  # fmt: skip
        return
    least = LEAST_DRIVER.get(int(build.cuda.partition(".")[0]))
    branch = int(seen[0].driver.partition(".")[0]) if seen[0].driver[:1].isdigit() else None
    if least is not None and branch is not None and branch < least:
        yield Finding("FAIL", "driver", f"{what}; torch {build.version} is built for CUDA {build.cuda}, which needs "
                      f"driver {least} or newer: update the driver, or install torch for an older CUDA")  # fmt: skip
    elif not build.sees_gpus:
        yield Finding("FAIL", "driver", f"{what}; torch {build.version} (CUDA {build.cuda}) sees no GPU: "
                      f"{VISIBLE}={hidden!r}; in a container, pass the GPUs to it")  # fmt: skip
    else:
        yield Finding("ok", "driver", f"{what}, torch for CUDA {build.cuda}")
    for gpu in seen:
        yield _memory(gpu)


def _memory(gpu: Gpu) -> Finding:
    free = gpu.total - gpu.used
    detail = f"{free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    if gpu.used > BUSY * gpu.total:
        return Finding("warn", f"GPU {gpu.index}", f"{detail}: another process uses it (nvidia-smi names it)")
    return Finding("ok", f"GPU {gpu.index}", detail)


def libraries(build: TorchBuild) -> Iterator[Finding]:
    """Say which NCCL and cuDNN torch would load, and import what the trainer needs on a GPU."""
    if not build.sees_gpus:
        return
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("ok", "NCCL", f"{nccl}, cuDNN {torch.backends.cudnn.version()}, as torch loads them")
    yield imported("Transformer Engine", sys.executable, "transformer_engine.pytorch",
                   "see docs/install.md, \"A GPU machine\"")  # fmt: skip


def server_libraries(config: Config, environ: Mapping[str, str]) -> Iterator[Finding]:
    """On a GPU, import SGLang and its kernels in the interpreter of each server that the job starts."""
    if not uses_cuda(config, environ):
        return
    if started_servers(config) and (missing := _toolkit_problem(environ)) is not None:
        yield missing
    for key, server in one_per_interpreter(config).items():
        for module in ("sgl_kernel", "sglang.srt.entrypoints.http_server"):
            remedy = f"{key}.python names the interpreter of the server"
            finding = imported(key, str(server.python or sys.executable), module, remedy)
            yield finding
            if finding.level == "FAIL":
                break


def _toolkit_problem(environ: Mapping[str, str], usual: Path = Path("/usr/local/cuda")) -> Finding | None:
    """Return a warning if SGLang would find no CUDA toolkit. Source: SGLang 0.5.23, `cuda_home`."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    home = Path(named) if named else Path(nvcc).parent.parent if nvcc else usual
    if (home / "bin" / "nvcc").is_file():
        return None
    return Finding("warn", "toolkit", f"{home} has no bin/nvcc, and SGLang compiles kernels when a server starts: "
                   "install a CUDA toolkit of torch's version, and set CUDA_HOME if it is elsewhere")  # fmt: skip


def imported(name: str, python: str, module: str, remedy: str) -> Finding:
    """Import `module` in a process of `python`; the finding has its version, or the last line that Python printed."""
    program = f"import {module} as m; print(getattr(m, '__version__', ''))"
    try:
        done = subprocess.run(
            [python, "-c", program],
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            env=None if python == sys.executable else of_interpreter(Path(python)),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding("FAIL", name, f"importing {module} in {python} did not end in {IMPORT_S:.0f} s; {remedy}")
    except OSError as error:
        return Finding("FAIL", name, f"{python}: {error.strerror or error}; {remedy}")
    if done.returncode == 0:
        version = (done.stdout.split() or [""])[-1]
        return Finding("ok", name, f"{module} {version}".rstrip() + " can be imported")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1].strip() if said else f"exit code {done.returncode}"
    return Finding("FAIL", name, f"{module} cannot be imported in {python}: {reason}; {remedy}")


SOCKET_NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the network interface of a library's connections."""


def interfaces(
    nodes: int, environ: Mapping[str, str], found: Callable[[], dict[str, str]] | None = None
) -> Iterator[Finding]:
    """Check that a job of several machines knows which network interface connects them.

    `found` returns {interface: IPv4 address} of those that are up, without the loopback.
    """
    addresses = (found or _addresses)()
    listed = ", ".join(f"{name} {address}" for name, address in addresses.items()) or "none but the loopback"
    wrong = False
    for variable in SOCKET_NAMES:
        value = environ.get(variable)
        if value and not _names_one(variable, value, [*addresses, "lo"]):
            wrong = True
            yield Finding("FAIL", variable, f"{variable}={value}: this machine has no such interface ({listed})")
    if wrong:
        return
    unset = [variable for variable in SOCKET_NAMES if not environ.get(variable)]
    if nodes > 1 and not addresses:
        yield Finding("FAIL", "interfaces", f"{listed}; a job of {nodes} machines needs one that reaches the others")
    elif nodes > 1 and len(addresses) > 1 and unset:
        yield Finding("warn", "interfaces", f"{listed}; set {' and '.join(unset)} to the one that reaches the other "
                      "machines, or gloo and NCCL may each choose another")  # fmt: skip
    else:
        yield Finding("ok", "interfaces", listed)


def _names_one(variable: str, value: str, names: list[str]) -> bool:
    """Return whether the variable leaves an interface. gloo takes exact names; NCCL takes prefixes, `=` before exact
    names and `^` before those to leave out."""
    entries = [entry for entry in value.lstrip("^=").split(",") if entry]
    if variable == "GLOO_SOCKET_IFNAME":
        return set(entries) <= set(names)
    exact = value.lstrip("^").startswith("=")
    hits = [any(name == entry if exact else name.startswith(entry) for entry in entries) for name in names]
    return not all(hits) if value.startswith("^") else any(hits)


def _addresses() -> dict[str, str]:
    import socket

    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not entry.address.startswith("127.")
    }


def on_this_machine(nodes: int) -> Iterator[Finding]:
    """Make all checks of this module that need no configuration."""
    try:
        build = installed_torch()
    except (ImportError, OSError):
        return  # reported by `checks_of_machine.devices`
    yield from driver(build, gpus_of_driver(), os.environ)
    yield from libraries(build)
    yield from interfaces(nodes, os.environ)
