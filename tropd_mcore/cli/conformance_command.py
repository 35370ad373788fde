"""`tropd conformance` compares a vocabulary-parallel distillation loss, of this package or another, with a float64
oracle.

It neither trains nor measures speed. Invariant: the exit code is 0 only if every cell that the loss claims and that
this machine can run is within the stated tolerance. A cell that was not run does not count as passed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.errors import TropdError
from tropd_mcore.files import publish_text

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from tropd_mcore.conformance.cells import Cell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Compute losses on several ranks as in training and over the whole vocabulary in float64, and compare loss and "
        "gradients. Exit code 0: no miss, 1: at least one miss, 2: wrong arguments or no cell was run."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="takes a minute and a half on two cores (default)")
    size.add_argument("--full", action="store_true", help="every combination; takes about a quarter of an hour")
    parser.add_argument(
        "--objective",
        action="append",
        default=[],
        metavar="NAME",
        help="a kind, a name or a pattern; may be repeated (default: all)",
    )
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=("eager", "compile", "triton"),
        help="implementation of the loss (default: all)",
    )
    parser.add_argument(
        "--form", action="append", default=[], choices=("fused", "logits"), help="input of the loss (default: both)"
    )
    parser.add_argument(
        "--tp",
        action="append",
        default=[],
        choices=("1", "2", "3"),
        help="number of ranks that share the vocabulary (default: all)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=("float64", "float32", "bfloat16"),
        help="dtype of the tensors (default: all)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION[@PATH]",
        help="another loss instead of this package's",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors (default: cpu)")
    parser.add_argument("--json", metavar="PATH", help="write all numbers as JSON; - prints them instead of the tables")
    parser.add_argument("--list", action="store_true", help="print the names of the objectives and stop")


def run(options: argparse.Namespace) -> int:
    """Run the matrix and report it; returns 1 if a cell misses. Raises TropdError."""
    from tropd_mcore.conformance import matrix, report
    from tropd_mcore.conformance.entries import ENTRIES

    if options.list:
        print("\n".join(entry.name for entry in ENTRIES))
        return 0
    started = time.monotonic()
    results = matrix.run(_planned(options), options.device, lambda text: log.info("%s", text))
    numbers = json.dumps(report.as_json(results, options.device), indent=1)
    if options.json == "-":
        print(numbers)
    else:
        print(report.tables(results))
        if options.json is not None:
            publish_text(Path(options.json), numbers + "\n", key="--json")
    ran, missed = (sum(result.status in statuses for result in results) for statuses in (("ok", "miss"), ("miss",)))
    print(f"{ran} cells in {time.monotonic() - started:.0f} s, {missed} missed", file=sys.stderr)
    if not ran:
        raise TropdError("tropd conformance: no cell was run; the report says why")
    return 1 if missed else 0


def _planned(options: argparse.Namespace) -> list[Cell]:
    """The cells selected by the arguments. Raises TropdError if they name nothing or leave no cell."""
    from tropd_mcore.conformance.cells import plan_ours, plan_peer
    from tropd_mcore.conformance.entries import select
    from tropd_mcore.conformance.peers import load_peer

    try:
        entries = select(tuple(options.objective))
    except KeyError as error:
        if error.args[0] == "phases":
            raise TropdError(
                "--objective phases has no loss of its own to compare; each phase has the loss of its objective: give "
                "the kinds of the phases"
            ) from error
        raise TropdError(f"--objective {error.args[0]} names nothing; `tropd conformance --list` shows all") from error
    if options.peer:
        for peer in options.peer:
            load_peer(peer)
        planned = [cell for peer in options.peer for cell in plan_peer(peer, entries, full=options.full)]
    else:
        planned = plan_ours(entries, full=options.full)
    cells = [
        cell
        for cell in planned
        if _asked(options.backend, cell.backend)
        and _asked(options.form, cell.form)
        and _asked(options.tp, str(cell.divided.tensor))
        and _asked(options.dtype, cell.dtype)
    ]
    if not cells:
        raise TropdError("tropd conformance: these filters leave no cell; give fewer of them, or --full")
    return cells


def _asked(wanted: list[str], value: str) -> bool:
    return not wanted or value in wanted
