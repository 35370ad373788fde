"""Findings of `tropd doctor` about the machine and the environment."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from tropd_mcore.cli.findings import Finding

DISTRIBUTION = "tropd-mcore"
GIB = 2**30
LEAST_FREE_DISK_GIB = 10.0
"""A checkpoint of the smallest student with its optimizer state is about 1 GiB; a few of them and an export."""
LEAST_SHARED_MEMORY_GIB = 1.0
"""Collectives between the processes of one machine go through /dev/shm."""
HARMFUL_WITHOUT_CUDA = ("torchvision", "torchaudio", "transformer-engine")
"""Packages that cannot be imported with a CPU build of torch. Importing transformers or megatron-core fails with
them."""


def versions() -> Iterator[Finding]:
    """Check Python, and every pinned package against its pin."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _pins()
    sglang = _version("sglang")
    if sglang is None:
        text = "not installed: a server needs its url, or rollout.server.python, an interpreter that has sglang"
        yield Finding("warn", "sglang", text)
    else:
        yield Finding("ok", "sglang", sglang)


def devices() -> Iterator[Finding]:
    """Check which devices torch sees, and whether installed packages let Megatron be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("FAIL", "torch", f"import failed: {error}; run bash examples/setup_env.sh")
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("ok", "platform", f"cuda: {len(names)} x {names[0]}, torch {torch.__version__}")
    else:
        yield Finding("ok", "platform", f"cpu (gloo): torch {torch.__version__} sees no GPU")
        harmful = [name for name in HARMFUL_WITHOUT_CUDA if _version(name) is not None]
        if harmful:
            yield Finding("FAIL", "packages", f"{', '.join(harmful)} cannot be imported without CUDA; uninstall")


def compiler() -> Iterator[Finding]:
    """Check for a working C++ compiler, which torch.compile in the SGLang server needs."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        yield Finding("FAIL", "compiler", "no c++, g++ or clang++ in PATH; install g++ or set CXX")
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text("#include <cmath>\nint main() { return std::floor(0.5) > 0; }\n")
        result = subprocess.run(
            [path, str(source), "-o", str(source.with_suffix(""))],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if result.returncode:
        yield Finding("FAIL", "compiler", f"{path} cannot compile: {result.stderr.strip().splitlines()[-1:]}")
    else:
        yield Finding("ok", "compiler", path)


def network() -> Iterator[Finding]:
    """Check that the loopback address has free ports, for servers and the rendezvous of ranks."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            yield Finding("ok", "loopback", f"127.0.0.1 accepts connections (port {server.getsockname()[1]})")
    except OSError as error:
        yield Finding("FAIL", "loopback", f"127.0.0.1: {error}; servers and ranks on this machine need it")


PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def proxies() -> Iterator[Finding]:
    """List the proxies of the environment. No request to a server uses them, wherever the server runs."""
    named = sorted(name for name in os.environ if name.lower() in PROXIES and os.environ[name])
    if not named:
        yield Finding("ok", "proxies", "none in the environment")
        return
    yield Finding("ok", "proxies", f"{', '.join(named)}: not used; every server, also one at a url, is asked directly")


def resources() -> Iterator[Finding]:
    """Check cores, memory, and disk space for checkpoints."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    yield Finding("ok", "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {cores} cores")
    for name, path, least in (("disk", ".", LEAST_FREE_DISK_GIB), ("shm", "/dev/shm", LEAST_SHARED_MEMORY_GIB)):
        free = shutil.disk_usage(path).free / GIB
        enough = free >= least
        advice = "" if enough else f"; {least:.0f} GiB or more are advised"
        yield Finding("ok" if enough else "warn", name, f"{free:.1f} GiB free in {path}{advice}")


def _pins() -> Finding:
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return Finding(
            "warn", "packages", f"{DISTRIBUTION} is not installed, so its pins are unknown; `pip install -e .`"
        )
    needed = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": "train"})]
    required = list({item.name: item for item in needed}.values())
    wrong = [text for requirement in required if (text := _mismatch(requirement)) is not None]
    if wrong:
        return Finding("FAIL", "packages", f"{'; '.join(wrong)}; run bash examples/setup_env.sh")
    return Finding("ok", "packages", f"{len(required)} packages that training needs have versions in their ranges")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _mismatch(requirement: Requirement) -> str | None:
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is missing ({requirement.specifier})"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} {found} ({requirement.specifier})"
