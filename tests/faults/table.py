"""`python -m tests.faults table`: docs/faults.md from the registry and the committed result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.jobs import REPOSITORY
from tests.faults.registry import all_faults
from tests.faults.results import COUNTERS, RESULTS
from tests.faults.verdict import GROUPS, SILENCE_S

PAGE = REPOSITORY / "docs" / "faults.md"
RESULT = RESULTS / "faults.json"
KILL_LOOP = RESULTS / "kill_loop.json"
HEAD = """\
# What goes wrong, and what you get

To see what a fault does to a run, play it. The suite starts real ranks and real servers, breaks something, and judges
what a user gets:

```
python -m tests.faults --list                      # all faults
python -m tests.faults kill-launcher stop-rank     # those whose id begins so
python -m tests.faults --jobs 2 --out tests/faults/results/faults.json   # all of them
python -m tests.faults kill-loop --kills 30        # one run, killed at 30 drawn moments
python -m tests.faults consoles --out docs/consoles.md
```

`pytest tests/faults/test_representative.py` plays the part that CI plays.
"""
RULES = f"""\
## How a verdict is made

A verdict is computed, never written. **MISS** is any of these:

- *lost*: a step is missing or repeated in metrics.jsonl, the same command does not go on, metrics or exported weights
  differ from those of the run without the fault, or a lie was trained on
- *silent*: no line for {SILENCE_S:g} s while something waits, or an end without a line about its cause
- *hung*: longer than the limit of the fault
- *left running*: a process of the launch lives on
- *left in /dev/shm*: shared memory that the next launch does not remove

**WEAK** is safe, but unclear or slow: another exit code or line than the one wanted, a traceback after a message. The
rest is **ok**. Seconds run from the fault to the end of all processes, or to the step after it.
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with --check report whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is another")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    text = page(json.loads(options.result.read_text(encoding="utf-8")), _kill_loop())
    if options.check:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(result: dict[str, Any], kill_loop: dict[str, Any] | None) -> str:
    """The whole page."""
    rows = {row["id"]: row for row in result["faults"]}
    totals, counters = result["totals"], ", ".join(f"{result[name]} {name.replace('_', ' ')}" for name in COUNTERS)
    lines = [
        HEAD,
        "## Result",
        "",
        f"`{result['command']}` at commit {result['commit'][:12]}, {result['date']}, {result['machine']}: "
        f"{len(rows)} faults in {result['seconds']} s. {totals['ok']} ok, {totals['WEAK']} WEAK, "
        f"{totals['MISS']} MISS; {counters}.",
        "",
        *(_loop_lines(kill_loop) if kill_loop is not None else []),
        RULES,
    ]
    for group in GROUPS:
        lines += [
            f"## {group.capitalize()}",
            "",
            "| fault | what is done | what you must get | what came | s | verdict |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for fault in all_faults():
            if fault.group == group:
                lines.append(_row(fault.id, fault.done, fault.wanted, rows.get(fault.id)))
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _loop_lines(result: dict[str, Any]) -> list[str]:
    equal = "equal" if result["equal_bit_for_bit"] else "NOT equal"
    return [
        f"`{result['command']}` at commit {result['commit'][:12]}, {result['date']}: {result['kills']} kills in a run "
        f"of {result['steps']} steps, at {len(result['points_hit'])} different points of a step. Compared with an "
        f"uninterrupted replay of the same rollouts: {equal} bit for bit ({result['compared']}).",
        "",
    ]


def _row(name: str, done: str, wanted: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f"| {name} | {_cell(done)} | {_cell(wanted)} | not played | | |"
    came = f"exit {as_shell(row['exit_code'])}" if row["exit_code"] is not None else "the run goes on"
    came += f": `{_cell(row['line'], 160)}`" if row["line"] else ""
    reasons = f": {_cell('; '.join(row['reasons']), 160)}" if row["reasons"] else ""
    return f"| {name} | {_cell(done)} | {_cell(wanted)} | {came} | {row['seconds']:g} | {row['verdict']}{reasons} |"


def as_shell(code: int | None) -> int | None:
    """The exit code that a shell shows: 128 + n for a process ended by signal n."""
    return code if code is None or code >= 0 else 128 - code


def _cell(text: str, longest: int = 400) -> str:
    text = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return text.replace("|", "\\|").replace("`", "'")


def _kill_loop() -> dict[str, Any] | None:
    return json.loads(KILL_LOOP.read_text(encoding="utf-8")) if KILL_LOOP.is_file() else None
