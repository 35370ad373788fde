"""`tropd report`: one HTML file that shows what a run directory holds, or how several runs differ.

Not for live monitoring. Invariant: it reads run directories and writes one file, in the first of them unless --out says
otherwise; what the page lacks is told on the console too.
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
        help="where the page goes (default: RUN_DIR/report.html), for a run directory that cannot be written",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="run directories (at most 5) to compare with: curves over each other, settings that differ",
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
        help="steps whose rollouts are shown, spread evenly (default: 6)",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page, print its path, and on stderr what it lacks. Raises DataError."""
    from tropd_mcore.evaluation.metrics_view import MetricNote
    from tropd_mcore.evaluation.report import ReportOptions, write_report
    from tropd_mcore.monitor.catalogue import METRICS

    report = write_report(
        options.run_dir,
        ReportOptions(
            out=options.out,
            compare=options.compare,
            tokenizer=options.tokenizer,
            notes={metric.name: MetricNote(metric.unit, metric.over, metric.description) for metric in METRICS},
            rollout_steps=options.rollout_steps,
        ),
    )
    for warning in report.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print(report.path)
    return 0
