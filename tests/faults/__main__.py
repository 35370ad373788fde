"""`python -m tests.faults`: play faults on real jobs and judge the outcome. Also kill-loop, consoles, table."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults import results
from tests.faults.play import play_all
from tests.faults.registry import all_faults, chosen, fleet_faults
from tests.faults.scene import end_with_the_suite
from tests.faults.stage import set_stage
from tests.faults.verdict import MISS

OTHERS = {"kill-loop": "kill_loop", "consoles": "consoles", "table": "table"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="ids of faults, or how they begin (default: all but those "
                        "of `fleet`); kill-loop, consoles and table have options of their own")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say which faults there are, and play nothing")
    parser.add_argument("--representative", action="store_true", help="only the part that CI plays")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="JSON", help="file for the result (default: only the console)")
    where.add_argument("--into", type=Path, metavar="JSON", help="result in which the played faults replace their rows")
    parser.add_argument("--work", type=Path, help="folder of models and runs, kept (default: a temporary one)")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}\n", end="", flush=True)  # one write, so that workers' lines do not mix


def main(arguments: list[str]) -> int:
    """Play the requested faults. Returns 0 if no fault is a MISS."""
    # started in the background of a script, the jobs would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments and arguments[0] in OTHERS:
        other = importlib.import_module(f"tests.faults.{OTHERS[arguments[0]]}")
        return int(other.main(arguments[1:]))
    options = parse(arguments)
    faults = chosen(options.names, representative=options.representative)
    if options.list:
        for fault in faults:
            print(f"{fault.id:32} {fault.group:10} {'CI' if fault.representative else '  '}  {fault.done}")
        print(f"{len(faults)} faults")
        return 0
    with tempfile.TemporaryDirectory(prefix="tropd-faults-") as spare:
        root: Path = (options.work or Path(spare)).resolve()
        root.chmod(0o755) if root.exists() else root.mkdir(parents=True)
        say(f"writing tiny models and rollouts to {root}")
        begun = time.monotonic()
        stage = set_stage(root)
        end_with_the_suite(stage)
        try:
            played = play_all(stage, faults, jobs=options.jobs, say=say)
        finally:
            stage.close()
        totals = Counter(each.verdict.verdict for each in played)
        say(f"{len(played)} faults in {time.monotonic() - begun:.0f} s: {dict(totals)}")
        if options.out is not None:
            ids = [fault.id for fault in faults]
            whole = ids in ([fault.id for fault in part] for part in (all_faults(), fleet_faults()))
            results.write(options.out, played, root, options, whole=whole, seconds=time.monotonic() - begun)
            say(f"written to {options.out}")
        if options.into is not None:
            results.renew(options.into, played, root, time.monotonic() - begun)
            say(f"{len(played)} rows of {options.into} are new")
        for each in played:
            if each.verdict.reasons:
                say(f"{each.verdict.verdict} {each.fault.id}: {'; '.join(each.verdict.reasons)[:600]}")
    return 1 if totals[MISS] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
