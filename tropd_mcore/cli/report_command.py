"""`tropd report`: one HTML file that shows what a run directory holds.

Not for live monitoring. Invariant: it reads the run directory and writes one file in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory (run.dir) of a training run")


def run(options: argparse.Namespace) -> int:
    """Write <RUN_DIR>/report.html and print its path. Raises DataError."""
    from tropd_mcore.evaluation.report import write_report
    from tropd_mcore.train.replay import load_rollouts

    print(write_report(options.run_dir, load_rollouts=load_rollouts))
    return 0
