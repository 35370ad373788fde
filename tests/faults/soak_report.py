"""The result of a soak as one dictionary and as a table for the user.

This module does not compute slopes (`soak_slopes` does). Invariant: a result has no host name and no path of the
machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import psutil

from tests.faults.results import git
from tests.faults.soak_readings import Folder, ProcessTree, SharedMemory
from tests.faults.soak_slopes import folder_growth, folder_rows, process_rows, short_lived

SHARED_COLUMNS = ("bytes", "names", "names_ever")
PACKAGES = ("torch", "megatron-core", "sglang", "numpy", "aiohttp")


def result_of(
    tree: ProcessTree, shared: SharedMemory, folders: dict[str, Folder], options: argparse.Namespace
) -> dict[str, Any]:
    """The complete result of a soak. Slopes are per step, over the second half of the steps."""
    middle = options.steps // 2
    return {
        "command": _command(options),
        "commit": git("rev-parse", "HEAD"),
        "changed_files": len(git("status", "--porcelain", "--", "tropd_mcore", "examples").splitlines()),
        "machine": _machine(),
        "steps": options.steps,
        "ranks": options.ranks,
        "slopes_from_step": middle,
        "processes": process_rows(tree, middle),
        "short_lived": short_lived(tree, middle),
        "shared_memory": folder_growth(shared.series, middle, SHARED_COLUMNS),
        "folders": {name: folder_rows(folder, middle) for name, folder in folders.items()},
    }


def print_table(result: dict[str, Any]) -> None:
    """One line for each process and each part of the disk."""
    print(f"\n{result['steps']} steps, {result['ranks']} ranks; memory is anonymous", end="")
    print(f", slopes are of the steps from {result['slopes_from_step']}")
    print(f"{'process':<40}{'MiB':>8}{'B/step':>10}{'95 % range':>18}{'RSS B/step':>12}{'handles':>9}", end="")
    print(f"{'threads':>9}{'written/step':>14}")
    for row in result["processes"]:
        found = row["growth"]
        memory = found["anonymous"]
        print(
            f"{row['role'][:39]:<40}{memory['last'] / 2**20:>8.1f}{memory['slope']:>10.0f}"
            f"{_range(memory):>18}{found['rss']['slope']:>12.0f}{_change(found['handles']):>9}"
            f"{_change(found['threads']):>9}{found['written']['slope']:>14.0f}"
        )
    print(f"\n{'disk and shared memory':<40}{'KiB':>8}{'B/step':>10}{'on disk':>12}{'files':>9}{'files/step':>12}")
    for folder, parts in result["folders"].items():
        for name, found in parts.items():
            _print_folder(f"{folder}/{name}", found["bytes"], found["on_disk"], found["files"])
    shared = result["shared_memory"]
    _print_folder("/dev/shm", shared["bytes"], shared["bytes"], shared["names"])
    print(f"\nshort-lived processes: {result['short_lived'] or 'none'}")
    for name in ("processes", "shared_memory", "temporary"):
        print(f"left behind, {name}: {', '.join(result[f'left_{name}']) or 'nothing'}")


def _print_folder(name: str, size: dict[str, Any], on_disk: dict[str, Any], files: dict[str, Any]) -> None:
    print(
        f"{name[:39]:<40}{size['last'] / 1024:>8.1f}{_slope(size):>10}{_slope(on_disk):>12}"
        f"{files['last']:>9.0f}{_slope(files, '.3f'):>12}"
    )


def _slope(growth: dict[str, Any], form: str = ".0f") -> str:
    return "-" if growth["slope"] is None else format(growth["slope"], form)


def _range(growth: dict[str, Any]) -> str:
    return f"{growth['low']:.0f} .. {growth['high']:.0f}"


def _change(growth: dict[str, Any]) -> str:
    first, last = int(growth["first"]), int(growth["last"])
    return str(last) if first == last else f"{first}>{last}"


def _command(options: argparse.Namespace) -> str:
    out = f" --out {options.out}" if options.out is not None and not options.out.is_absolute() else ""
    return " ".join(
        [f"python -m tests.faults.soak --steps {options.steps} --ranks {options.ranks}{out}", *options.overrides]
    )


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
