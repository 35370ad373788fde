"""The quickstart's result for the README: a finished run directory -> results/quickstart.json, which plot.py draws.

    python -m benchmarks.quickstart runs/quickstart

Not a benchmark of time. Only what the run itself wrote is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine

METRICS = ("guidance/prefix_length", "verifier/accuracy")


def commit_of(run_dir: Path) -> str:
    """Return the commit of the checkout that the run directory is in."""
    command = ["git", "-C", str(run_dir), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def collect(run_dir: Path) -> dict[str, Any]:
    """Return the curves of a run and its two evaluations. Raises FileNotFoundError for a run that is not finished."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = {
        when: {name: found[name] for name in ("greedy", "sampled")}
        for when in ("before", "after")
        for found in [json.loads((run_dir / f"evaluation_{when}.json").read_text())]
    }
    return {
        "command": "bash examples/quickstart.sh",
        "machine": machine() | {"commit": commit_of(run_dir), "modified": False},
        "steps": [line["step"] for line in lines],
        "metrics": {name: [line[name] for line in lines] for name in METRICS},
        "evaluations": evaluations,
    }


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    path = ROOT / "benchmarks" / "results" / "quickstart.json"
    path.write_text(json.dumps(collect(parser.parse_args().run_dir), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
