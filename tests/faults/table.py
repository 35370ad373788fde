"""`python -m tests.faults table`: docs/faults.md from the registry and the committed result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.jobs import REPOSITORY
from tests.faults.registry import all_faults, fleet_faults
from tests.faults.results import COUNTERS, RESULTS
from tests.faults.several_servers import section
from tests.faults.verdict import FLEET, GROUPS, SILENCE_S, Fault

PAGE = REPOSITORY / "docs" / "faults.md"
RESULT = RESULTS / "faults.json"
KILL_LOOP = RESULTS / "kill_loop.json"
FLEET_RESULT = RESULTS / "fleet.json"
HEAD = """\
# Faults, and what a user sees

To see what a fault does to a run, play it:

```
python -m tests.faults --list                      # all faults
python -m tests.faults kill-launcher stop-rank     # faults whose id begins with these words
python -m tests.faults --jobs 2 --out tests/faults/results/faults.json   # all but those of a fleet
python -m tests.faults fleet --jobs 2 --out tests/faults/results/fleet.json   # those of several rollout servers
python -m tests.faults kill-loop --kills 30        # one run, killed at 30 random moments
python -m tests.faults consoles --out docs/consoles.md
```

The suite starts real ranks and real servers, causes the fault, and judges what a user sees.
`pytest tests/faults/test_representative.py` plays the faults that CI plays. Faults of two nodes (a node that is
killed or stands still, a job that Slurm or Kubernetes starts again) are played by `pytest tests/e2e/test_nodes.py
tests/e2e/test_schedulers.py`; [launch.md](launch.md) has the results.
"""
RULES = f"""\
## How a verdict is made

Verdicts are computed from what was seen, and never written by hand. A fault is a **MISS** if any of these happens:

- *lost*: a step is missing or repeated in metrics.jsonl, the same command does not resume the run, metrics or exported
  weights differ from those of the run without the fault, or the run trained on a wrong answer
- *silent*: no line for {SILENCE_S:g} s while something waits, or an end without a line about its cause
- *hung*: the run took longer than the limit of the fault
- *left running*: a process of the launch is still alive
- *left in /dev/shm*: the next launch does not remove the shared memory that is left

A fault is **WEAK** if the result is safe, but unclear or slow: the exit code or the line is not the expected one, or a
traceback follows the message. Otherwise it is **ok**. Seconds are counted from the fault to the end of all processes,
or to the next step.
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with --check report whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is another")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    text = page(json.loads(options.result.read_text(encoding="utf-8")), _stored(KILL_LOOP), _stored(FLEET_RESULT))
    if options.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(result: dict[str, Any], kill_loop: dict[str, Any] | None, fleet: dict[str, Any] | None) -> str:
    """The whole page."""
    lines = [
        HEAD,
        "## Result",
        "",
        *_result_lines(result),
        *(_result_lines(fleet) if fleet is not None else []),
        *(_loop_lines(kill_loop) if kill_loop is not None else []),
        RULES,
    ]
    for group in GROUPS:
        lines += _group_lines(group, [fault for fault in all_faults() if fault.group == group], result)
    if fleet is not None:
        lines += _group_lines(FLEET, fleet_faults(), fleet)
    else:
        lines.append(section())
    return "\n".join(lines).rstrip("\n") + "\n"


def _group_lines(group: str, faults: list[Fault], result: dict[str, Any] | None) -> list[str]:
    rows = {row["id"]: row for row in result["faults"]} if result is not None else {}
    head = ["| fault | what is done | what you must get | what came | s | verdict |", "|---|---|---|---|---|---|"]
    return [
        f"## {group.capitalize()}",
        "",
        *head,
        *(_row(fault, rows.get(fault.id)) for fault in faults),
        "",
    ]


def _result_lines(result: dict[str, Any]) -> list[str]:
    totals, counters = result["totals"], ", ".join(f"{result[name]} {name.replace('_', ' ')}" for name in COUNTERS)
    return [
        f"`{result['command']}` at commit {result['commit'][:12]}, {result['date']}, {result['machine']}: "
        f"{len(result['faults'])} faults in {result['seconds']} s. {totals['ok']} ok, {totals['WEAK']} WEAK, "
        f"{totals['MISS']} MISS; {counters}.",
        "",
    ]


def _loop_lines(result: dict[str, Any]) -> list[str]:
    equal = "equal" if result["equal_bit_for_bit"] else "NOT equal"
    return [
        f"`{result['command']}` at commit {result['commit'][:12]}, {result['date']}: {result['kills']} kills in a run "
        f"of {result['steps']} steps, at {len(result['points_hit'])} different points of a step. Compared with an "
        f"uninterrupted replay of the same rollouts: {equal} bit for bit ({result['compared']}).",
        "",
    ]


def _row(fault: Fault, row: dict[str, Any] | None) -> str:
    name, done, wanted = fault.id, fault.done, fault.wanted
    if row is None:
        return f"| {name} | {_cell(done)} | {_cell(wanted)} | not played | | |"
    came = f"exit {as_shell(row['exit_code'])}" if row["exit_code"] is not None else "the run goes on"
    if row["exit_code"] not in fault.code:  # recorded before the code was changed
        came += f" at that commit, {' or '.join(str(as_shell(code)) for code in fault.code)} since then"
    came += f": `{_cell(row['line'], 160)}`" if row["line"] else ""
    if "commit" in row:
        came += f" (played at commit {row['commit'][:12]})"
    reasons = f": {_cell('; '.join(row['reasons']), 160)}" if row["reasons"] else ""
    return f"| {name} | {_cell(done)} | {_cell(wanted)} | {came} | {row['seconds']:g} | {row['verdict']}{reasons} |"


def as_shell(code: int | None) -> int | None:
    """The exit code that a shell shows: 128 + n for a process ended by signal n."""
    return code if code is None or code >= 0 else 128 - code


def _cell(text: str, longest: int = 400) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return text.replace("|", "\\|").replace("`", "'")


def _stored(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
