"""`tropd metrics` prints every metric of `metrics.jsonl` with its unit, what it is taken over and its meaning.

It does not print the values of a run (`tropd report`). Invariant: everything is read from the catalogue that computes
the metrics.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap

from tropd_mcore.errors import ConfigError

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help="name of a metric, or the beginning of several names (default: all)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the metrics. Raises ConfigError if no metric has that name."""
    from tropd_mcore.monitor.catalogue import DESCRIBED

    found = [metric for metric in DESCRIBED if metric.name.startswith(options.name)]
    if not found:
        near = difflib.get_close_matches(options.name, [metric.name for metric in DESCRIBED], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError([f"tropd metrics {options.name}: no such metric{hint}"])
    for metric in found:
        print(f"{metric.name}  [{metric.unit}, over {metric.over}]")
        print(textwrap.indent(textwrap.fill(metric.description, WIDTH - 4, break_on_hyphens=False), "    "))
    return 0
