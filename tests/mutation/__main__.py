"""`python -m tests.mutation`: draw faults, run the tests that cover each, list those that no test detects."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutation import copies, coverage_map, results
from tests.mutation.candidates import PACKAGES, all_candidates, draw
from tests.mutation.coverage_map import Record
from tests.mutation.faults import Fault
from tests.mutation.processes import in_parallel
from tests.mutation.trials import OPEN, Journal, Trial, try_fault


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="decides which faults are drawn (default 0)")
    parser.add_argument("--count", type=int, default=100, help="number of faults (default 100)")
    parser.add_argument("--tier", choices=("fast", "full"), default="fast", help="full: also the slow tests")
    parser.add_argument("--workers", type=int, default=1, help="faults tried at the same time (default 1)")
    parser.add_argument(
        "--limit-s", type=float, default=300.0, help="usual seconds of the tests of one fault, at most (default 300)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tropd-mutation",
        help="folder of the copies, the coverage and the trials so far",
    )
    parser.add_argument("--results", type=Path, help="JSON file to write (default results/seed-SEED.json)")
    parser.add_argument("--list", action="store_true", help="say what would be planted, and run nothing")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}\n", end="", flush=True)  # one write, so that workers' lines do not mix


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    versions = results.versions()
    work: Path = options.work.resolve()
    first = copies.snapshot(work / "copy-0")
    faults = draw(first, seed=options.seed, count=options.count)
    if options.list:
        list_faults(first, faults)
        return 0
    spare = [first, *(copies.duplicate(first, work / f"copy-{number}") for number in range(1, options.workers))]
    tiers = ("fast", "full") if options.tier == "full" else ("fast",)
    records = coverage_map.build(spare, work / "coverage", tiers, say)
    for record in records:
        if not record.passed:
            say(f"not used, because it fails without a fault: {record.file} ({record.tier})")
    trials = try_all(spare, faults, records, Journal(work / f"seed-{options.seed}.jsonl"), options.limit_s)
    path = options.results or results.RESULTS / f"seed-{options.seed}.json"
    settings = {name: getattr(options, name) for name in ("seed", "count", "tier", "limit_s", "workers")}
    results.write(path, trials, first, records, {**settings, **versions})
    say(f"{len(trials)} faults: {dict(Counter(trial.verdict for trial in trials))}; written to {path}")
    return 0


def list_faults(copy: Path, faults: list[Fault]) -> None:
    found = Counter(fault.file.split("/")[1] for fault in all_candidates(copy))
    for package in PACKAGES:
        print(f"{package}: {found[package]} candidates")
    for fault in faults:
        print(f"{fault.id}  (was: {' '.join(fault.before.split())[:60]})")


def try_all(
    spare: list[Path], faults: list[Fault], records: list[Record], journal: Journal, limit_s: float
) -> list[Trial]:
    """One trial per fault, in the order of the draw. Trials in the journal are not run again."""
    state = copies.digest_of_all(spare[0])

    def one(copy: Path, numbered: tuple[int, Fault]) -> Trial:
        number, fault = numbered
        trial = journal.known(spare[0], fault, state)
        if trial is None:
            trial = try_fault(copy, fault, records, limit_s=limit_s, state=state)
            journal.add(trial)
        seen = trial.by.split(" ")[0] if trial.verdict not in OPEN else f"{trial.tests} tests"
        say(f"{number}/{len(faults)} {trial.verdict:11} {trial.seconds:5.0f} s  {fault.id}  [{seen}]")
        return trial

    return in_parallel(one, list(enumerate(faults, 1)), spare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
