"""The result of a run of the suite: one JSON file that is committed, without host names and paths of the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.e2e.jobs import REPOSITORY
from tests.faults.play import Played

RESULTS = Path(__file__).with_name("results")
COUNTERS = ("lost", "silent", "hung", "left_running", "left_in_shm")
VERSIONS = ("torch", "megatron-core", "sglang")


def write(
    path: Path, played: list[Played], root: Path, options: argparse.Namespace, *, whole: bool, seconds: float
) -> None:
    """Write the result of `python -m tests.faults`."""
    records = [each.record(root) for each in played]
    content = {
        "command": " ".join(["python -m tests.faults", *options.names, f"--jobs {options.jobs}"]),
        "whole": whole,
        **circumstances(),
        "seconds": round(seconds),
        **_counted(records),
        "faults": records,
    }
    write_json(path, content)


def renew(path: Path, played: list[Played], root: Path, seconds: float) -> None:
    """Put faults that were played again into a result, in place of their rows. Each of them names its own commit.

    Raises ValueError if the result lacks one of them.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["id"]: row for row in content["faults"]}
    fresh = {each.fault.id: {**each.record(root), "commit": git("rev-parse", "HEAD")} for each in played}
    if unknown := fresh.keys() - rows.keys():
        raise ValueError(f"{path} has no row of {', '.join(sorted(unknown))}; play all faults with --out first")
    records = list({**rows, **fresh}.values())
    seconds += content["seconds"]
    write_json(path, {**content, "seconds": round(seconds), **_counted(records), "faults": records})


def _counted(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "totals": {verdict: sum(each["verdict"] == verdict for each in records) for verdict in ("ok", "WEAK", "MISS")},
        **{name: sum(each[name] for each in records) for name in COUNTERS},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, with a newline at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def circumstances() -> dict[str, Any]:
    """Date, commit, machine and versions of a result."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "tropd_mcore", "tests", "examples")),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
    }


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def git(*arguments: str) -> str:
    """The output of git for the repository. `unknown` if git fails."""
    found = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def places_in(result: dict[str, Any]) -> list[str]:
    """Prefixes of machine paths that occur in a result. Results are read on other machines."""
    text = json.dumps(result)
    return [place for place in ("/root/", "/home/", "/tmp/", "/work/") if place in text]
