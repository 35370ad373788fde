"""Measures calls: CPU seconds, wall seconds, peak memory and collectives. It also interleaves the calls of methods.

CPU seconds of a rank are `time.process_time` with one thread per rank. On a shared machine they vary less than wall
time. Peak memory is the rise of the high-water mark of resident memory above the resident memory before the call.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Traffic:
    """Collectives of one rank."""

    calls: dict[str, int] = field(default_factory=dict)
    payload_bytes: int = 0
    """bytes that this rank contributes"""

    def __str__(self) -> str:
        names = ", ".join(f"{count} {name}" for name, count in sorted(self.calls.items())) or "none"
        return f"{names} ({self.payload_bytes / 1e6:.2f} MB)"


@contextmanager
def counted(traffic: Traffic) -> Iterator[None]:
    """Count the collectives of `torch.distributed` that run inside the block."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name in ("all_reduce", "broadcast") else args[1]
            traffic.calls[name] = traffic.calls.get(name, 0) + 1
            traffic.payload_bytes += sent.numel() * sent.element_size()
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise one or more values."""
        return Spread(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.least:.4g}, {self.most:.4g}]"


@dataclass(frozen=True)
class Call:
    """The times of one call."""

    cpu_s: float
    wall_s: float


def timed(function: Callable[[], Any]) -> tuple[Call, Any]:
    """Run `function` once; all ranks start together."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return Call(time.process_time() - cpu, time.perf_counter() - wall), result


def slower_rank(calls: Sequence[list[Call]]) -> list[Call]:
    """Return the calls of the rank that needed the most CPU time."""
    return max(calls, key=lambda mine: sum(call.cpu_s for call in mine))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the rise of the high-water mark of resident memory during the call, above that before the call."""
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current value
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def interleaved(methods: Mapping[str, Callable[..., Any]], repeats: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield A, B, C, A, B, C, ..., so that a change of the machine's speed affects all methods."""
    for _ in range(repeats):
        yield from methods.items()


def machine() -> dict[str, Any]:
    """Return machine, versions, commit and date of a measurement."""
    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "processor": processor,
        "cores": len(_affinity()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get("COMMIT"),  # a copy may have no history
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_result(name: str, rows: Sequence[Any], *, command: str, notes: str = "") -> Path:
    """Write benchmarks/results/<name>.json: command, machine, rows."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    content = {"command": command, "machine": machine(), "notes": notes, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as text with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as a table for a page of docs/."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0)


def _git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _give_back_freed_memory() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
