"""The results of a mutation run: one JSON file that is committed, and a table of the faults that no test detected."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.mutation import copies
from tests.mutation.candidates import PACKAGES, all_candidates
from tests.mutation.coverage_map import Record
from tests.mutation.trials import OPEN, Trial

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("python", "torch", "coverage", "pytest")


def versions() -> dict[str, str]:
    """Versions of the packages on which a result depends. Raises PackageNotFoundError if one is missing."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS[1:]}}


def write(path: Path, trials: list[Trial], copy: Path, records: list[Record], settings: dict[str, Any]) -> None:
    """Write the JSON file, and next to it the table as `<name>.md`."""
    found = Counter(fault.file.split("/")[1] for fault in all_candidates(copy))
    content = {
        "command": command(settings),
        "seed": settings["seed"],
        "count": settings["count"],
        "tier": settings["tier"],
        "limit_s": settings["limit_s"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "tropd_mcore", "tests")),
        **{name: settings[name] for name in VERSIONS},
        "machine": _machine(),
        "candidates": {package: found[package] for package in PACKAGES},
        "not_used": sorted(f"{record.file} ({record.tier})" for record in records if not record.passed),
        "totals": dict(Counter(trial.verdict for trial in trials)),
        "faults": [asdict(trial) for trial in trials],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(content), encoding="utf-8")


def command(settings: dict[str, Any]) -> str:
    """The command that repeats the run, without folders of the machine."""
    names = ("seed", "count", "tier", "limit_s", "workers")
    options = [f"--{name.replace('_', '-')} {settings[name]}" for name in names]
    return " ".join(["python -m tests.mutation", *options])


def table(content: dict[str, Any]) -> str:
    """A page with the totals and every fault that no test detected."""
    totals = ", ".join(f"{count} {verdict}" for verdict, count in sorted(content["totals"].items()))
    lines = [
        f"# Faults drawn by seed {content['seed']}",
        "",
        f"`{content['command']}` at commit {content['commit'][:12]}, {content['date']}: {totals}.",
        "",
        "| fault | before | after | verdict | test files tried |",
        "|---|---|---|---|---|",
    ]
    for fault in content["faults"]:
        if fault["verdict"] in OPEN:
            tried = f"{len(fault['files'])} of {len(fault['files']) + len(fault['untried'])}"
            place = f"`{fault['file']}:{fault['line']}` {fault['operator']}"
            row = [place, _code(fault["before"]), _code(fault["after"]), fault["verdict"], tried]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    short = " ".join(text.split())
    short = (short if len(short) <= 80 else f"{short[:77]}...").replace("|", "\\|")
    return f"`{short}`" if short else "(nothing)"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=copies.REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.strip()


def _machine() -> str:
    """The processor and how many of its cores this process may use."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
