"""`tropd report` writes one HTML file that shows the contents of a run directory, or how several runs differ.

It does not monitor a run live. Invariant: it reads run directories and writes one file, into the first of them unless
--out names another place. Whatever the page lacks is reported on the console too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tropd_mcore.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory (run.dir) of a training run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file to write (default: RUN_DIR/report.html), for example if the run directory cannot be written",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="run directories to compare with, at most 5: their curves in the same charts, and settings that differ",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="model folder whose tokenizer turns the rollouts into text (default: student.path of the run)",
    )
    parser.add_argument(
        "--rollout-steps",
        type=positive,
        default=6,
        metavar="N",
        help="number of steps whose rollouts are shown, spread evenly (default: 6)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page and print its path; print on stderr what the page lacks. Raises DataError."""
    from tropd_mcore.evaluation.metrics_view import MetricNote
    from tropd_mcore.evaluation.report import ReportOptions, write_report
    from tropd_mcore.monitor.catalogue import DESCRIBED

    report = write_report(
        options.run_dir,
        ReportOptions(
            out=options.out,
            compare=options.compare,
            tokenizer=options.tokenizer,
            notes={metric.name: MetricNote(metric.unit, metric.over, metric.description) for metric in DESCRIBED},
            rollout_steps=options.rollout_steps,
        ),
    )
    for warning in report.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print(report.path)
    return 0
