"""Print the quickstart's result as a table: the student before, after plain OPD, and after this run.

    python -m examples.quickstart_table RUN MODELS
    python -m examples.quickstart_table RUN MODELS --record    # a finished run of OPD becomes the recorded row

The row of OPD is a recorded result, because a second training would double the quickstart's time. It is shown only if
it was made with the same student, teacher, prompts and evaluation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "quickstart_opd.json"
COMMAND = (
    "QUICKSTART_RUN=runs/quickstart-opd bash examples/quickstart.sh 'objective={kind: opd, topk: 16}' "
    "optimizer.learning_rate=3e-4"
)
"""Repeats the recorded row. The learning rate is the better one of OPD for this kind of student (docs/study.md)."""


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object. Exits with one line if it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path}: expected a result of the quickstart: {error}")


def accuracies(evaluation: dict[str, Any]) -> dict[str, list[float]]:
    """Return accuracy and interval, greedy and sampled."""
    return {name: [evaluation[name][key] for key in ("accuracy", "low", "high")] for name in ("greedy", "sampled")}


def what_was_compared(models: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Return what two rows must have in common. `before` is the evaluation before training."""
    settings = {key: value for key, value in before["settings"].items() if key not in ("prompts", "template_date")}
    made = read(models / "example.json")["content_hash"]
    return {"models": made, "student": Path(before["model"]).name, "evaluation": settings}


def table(run: Path, models: Path, recorded: dict[str, Any] | None) -> list[str]:
    """Return the lines of the table. `recorded` is left out if it is of other models or another evaluation."""
    before, after = (read(run / f"evaluation_{when}.json") for when in ("before", "after"))
    rows = [("before", accuracies(before))]
    note = []
    if recorded is not None and recorded["compared"] == what_was_compared(models, before):
        rows.append(("after OPD (recorded)", recorded["accuracies"]))
        note = [
            f"The row of OPD was recorded at commit {recorded['commit']}. To repeat it:",
            f"  {recorded['command']}",
        ]
    rows.append(("after this run", accuracies(after)))
    lines = [f"{'held-out prompts, right answers':34}{'greedy':>24}{'sampled, T = 1':>24}"]
    for name, found in rows:
        cells = (_cell(found["greedy"]), _cell(found["sampled"]))
        lines.append(f"{name:34}{cells[0]:>24}{cells[1]:>24}")
    return [*lines, *note]


def record(run: Path, models: Path) -> dict[str, Any]:
    """Return the recorded row of a finished run."""
    before, after = (read(run / f"evaluation_{when}.json") for when in ("before", "after"))
    command = ["git", "-C", str(HERE), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    compared = what_was_compared(models, before)
    return {"command": COMMAND, "commit": commit, "compared": compared, "accuracies": accuracies(after)}


def _cell(values: list[float]) -> str:
    accuracy, low, high = (100 * value for value in values)
    return f"{accuracy:.1f} % [{low:.1f}, {high:.1f}]"


def main(arguments: list[str] | None = None) -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart_table", description="The quickstart's result.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory with evaluation_before and _after")
    parser.add_argument("models", type=Path, metavar="MODELS", help="folder of examples.make_models")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} from RUN")
    options = parser.parse_args(arguments)
    if options.record:
        RECORDED.write_text(json.dumps(record(options.run, options.models), indent=1) + "\n", encoding="utf-8")
        print(RECORDED)
        return
    print("\n".join(table(options.run, options.models, read(RECORDED) if RECORDED.is_file() else None)))


if __name__ == "__main__":
    main()
