"""Which cells of the matrix this machine can run, and the environment that they need."""

from __future__ import annotations

import importlib.util
import os
import shutil

from tropd_mcore.conformance.cells import Cell


def not_runnable(cell: Cell, device: str) -> str | None:
    """Return why a cell of our loss cannot run here; None if it can."""
    if cell.divided.megatron and device != "cpu":
        return "the Megatron model of the matrix is built on a CPU; leave out --device"
    if cell.backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if cell.backend == "compile" and device == "cpu" and not _compiler():
        return "torch.compile needs a C++ compiler on a CPU; none found (CXX, g++, clang++)"
    return None


def environment_of(cell: Cell, device: str) -> dict[str, str]:
    """Return the environment variables that the ranks need before any import. Cells with equal ones share ranks.

    Triton decides at import whether to interpret its kernels, which is the only way to run them on a CPU.
    """
    if cell.backend == "compile" and cell.peer is None:
        return {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of processes that would outlive a rank
    return {"TRITON_INTERPRET": "1"} if cell.backend == "triton" and device == "cpu" else {}


def truncates(cell: Cell, device: str) -> bool:
    """Return whether numbers are truncated to bfloat16: Triton's interpreter truncates, while its compiler rounds."""
    return cell.peer is None and cell.backend == "triton" and device == "cpu"


def _compiler() -> bool:
    return any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++"))
