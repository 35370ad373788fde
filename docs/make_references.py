"""Write docs/configuration.md and docs/metrics.md from the code that reads the keys and computes the metrics.

    python docs/make_references.py

tests/unit/test_reference_pages.py checks that the pages are up to date.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from tropd_mcore.config.reference import Key, reference
from tropd_mcore.monitor.catalogue import METRICS

DOCS = Path(__file__).parent

CONFIGURATION = """# Configuration: every key

A configuration is one YAML file. `tropd config FILE.yaml` prints every key, its value and where it was set.
`tropd config --explain KEY` prints a row of this page. On the command line, write a key as `section.key=value`. An
unknown key is an error. `python docs/make_references.py` makes this page from the code: {count} keys.
"""
METRICS_PAGE = """# Metrics: every number of metrics.jsonl

Each step appends one line to `metrics.jsonl` in the run directory. `tropd metrics NAME` prints a row of this page. A
metric that has nothing to measure is null in the file. p is the student, q is the teacher, x is the sampled token, and
r = log q(x) - log p(x) in nats: positive if the teacher gives the token more probability than the student.
`python docs/make_references.py` makes this page from the code: {count} metrics.
"""


def configuration() -> str:
    """The page of the keys, a table per section."""
    keys = reference()
    parts = [CONFIGURATION.format(count=len(keys))]
    for section, found in groupby(keys, key=lambda key: key.dotted.partition(".")[0]):
        rows = "\n".join(_row(key) for key in found)
        parts.append(f"## {section}\n\n| key | accepts | default | meaning |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def metrics() -> str:
    """The page of the metrics, a table per group."""
    groups: dict[str, list[str]] = {}
    for metric in METRICS:
        cells = [f"`{_cell(metric.name)}`", _cell(metric.unit), _cell(metric.over), _cell(metric.description)]
        groups.setdefault(metric.name.partition("/")[0], []).append(f"| {' | '.join(cells)} |")
    parts = [METRICS_PAGE.format(count=len(METRICS))]
    for group, rows in groups.items():
        head = "| metric | unit | taken over | meaning |\n|---|---|---|---|"
        parts.append(f"## {group}\n\n{head}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    kinds = f" (kind: {', '.join(key.kinds)})" if key.kinds else ""
    default = key.default.removeprefix("default ")
    return f"| `{_cell(key.dotted)}`{kinds} | {_cell(key.accepts)} | {_cell(default)} | {_cell(key.meaning)} |"


def _cell(text: str) -> str:
    """Text that means the same inside a cell of a table: no bars, no tags, pages of docs/ as links."""
    escaped = text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", escaped)


if __name__ == "__main__":
    for name, text in {"configuration.md": configuration(), "metrics.md": metrics()}.items():
        (DOCS / name).write_text(text, encoding="utf-8")
