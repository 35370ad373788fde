"""`tropd study`: the runs of a study that are missing, one after another; their list; the page of their results.

It does not distribute runs over machines: a scheduler starts `tropd study STUDY --only CELL` once per cell
(examples/study.sbatch). Invariants: a run that is finished is never repeated. A failed run does not stop the others.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.errors import ConfigError

if TYPE_CHECKING:
    from tropd_mcore.study.plan import Cell, Study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="YAML file of the study")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="run these cells alone: names of --list, or of groups"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print every cell and its state, and run nothing")
    what.add_argument("--missing", action="store_true", help="print the names of the cells without a result")
    what.add_argument("--page", action="store_true", help="write the page and its pictures from the results")
    parser.add_argument(
        "--own-servers",
        action="store_true",
        help="let every command start its own rollout servers, in place of the same ones for all of a student",
    )


def run(options: argparse.Namespace) -> int:
    """Run what is missing, or print. Returns 1 if a cell failed. Raises TropdError."""
    from tropd_mcore.study.plan import read_study

    study = read_study(options.study)
    cells = _chosen(study, options.only)
    if options.page:
        from tropd_mcore.study.page import write_page

        for path in write_page(study):
            print(path)
        return 0
    from tropd_mcore.study.cell import finished

    missing = [cell for cell in cells if not finished(study, cell)]
    if options.missing:
        print("\n".join(cell.name for cell in missing))
        return 0
    if options.list:
        for cell in cells:
            print(f"{'missing' if cell in missing else 'done':8} {cell.group:10} {cell.name}")
        return 0
    return _run(study, missing, done=len(cells) - len(missing), own_servers=options.own_servers)


def _chosen(study: Study, names: list[str]) -> list[Cell]:
    """The cells of these names or groups; all if there are no names. Raises ConfigError."""
    known = {cell.name for cell in study.cells} | {cell.group for cell in study.cells}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            [f"--only: {study.path} has no cell or group {name!r}; `--list` prints the names" for name in unknown]
        )
    return [cell for cell in study.cells if not names or cell.name in names or cell.group in names]


def _run(study: Study, cells: list[Cell], *, done: int, own_servers: bool) -> int:
    """Run the cells in order; print one line per cell, and the failed ones at the end."""
    from tropd_mcore.study.cell import CellFailed, describe, run_cell
    from tropd_mcore.study.server import StudyServers

    failed: list[str] = []
    prepared: set[tuple[str, ...]] = set()
    with nullcontext() if own_servers else StudyServers(Path(study.plan.runs) / "logs") as servers:
        for number, cell in enumerate(cells, start=1):
            try:
                line = describe(run_cell(study, cell, servers, prepared))
            except CellFailed as error:
                line = f"failed: {error}"
                failed.append(cell.name)
            print(f"[{done + number} of {done + len(cells)}] {line}", flush=True)
    if failed:
        print(f"{len(failed)} of {len(cells)} runs failed: {' '.join(failed)}; the same command runs them again")
    return 1 if failed else 0
