"""The quickstart's result for the README, with plain OPD beside it -> results/quickstart.json, which plot.py draws.

    python -m benchmarks.quickstart runs/quickstart runs/quickstart-opd

Not a benchmark of time. Only what the run itself wrote is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine
from examples.quickstart_table import COMMAND as OPD_COMMAND

METRIC = "verifier/accuracy"


def commit_of(run_dir: Path) -> str:
    """Return the commit of the checkout that the run directory is in."""
    command = ["git", "-C", str(run_dir), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def collect(run_dir: Path, opd_dir: Path) -> dict[str, Any]:
    """Return accuracy before and after, and by step, of both runs. Raises FileNotFoundError if one is not finished."""
    evaluations = {
        "before": _evaluation(run_dir, "before"),
        "opd": _evaluation(opd_dir, "after"),
        "after": _evaluation(run_dir, "after"),
    }
    return {
        "command": "bash examples/quickstart.sh",
        "command_opd": OPD_COMMAND,
        "machine": machine() | {"commit": commit_of(run_dir), "modified": False},
        "right": {"after": _right(run_dir), "opd": _right(opd_dir)},
        "evaluations": evaluations,
    }


def _evaluation(run_dir: Path, when: str) -> dict[str, Any]:
    found = json.loads((run_dir / f"evaluation_{when}.json").read_text())
    return {name: found[name] for name in ("greedy", "sampled")}


def _right(run_dir: Path) -> dict[str, list[float]]:
    """Return the share of the student's own answers that are right. Steps on stored responses are left out."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["trust/tv"] is not None]
    return {"steps": [line["step"] for line in own], "share": [line[METRIC] for line in own]}


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("opd_dir", type=Path)
    given = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "quickstart.json"
    path.write_text(json.dumps(collect(given.run_dir, given.opd_dir), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
