"""Measures how the loss on given logits scales with tokens, vocabulary, top-k and ranks, for our loss and two peers.

    python -m benchmarks.scaling --peer-root verl=PATH --peer-root nemo_rl=PATH

It varies one axis at a time around tokens = 512, vocabulary = 65536, k = 64, two ranks. It measures times only; memory
is in `loss_only`.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from benchmarks.loss_only import Sizes, measure, printed
from benchmarks.measure import write_result
from tropd_mcore import logs
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.scaling")

CENTRE = Sizes(tokens=512, vocabulary=65536, k=64, world_size=2, chunk_tokens=1024, repeats=5)
AXES = {
    "tokens": [256, 512, 1024, 2048],
    "vocabulary": [32768, 65536, 151936],
    "k": [1, 16, 64, 128],
    "world_size": [1, 2, 4],
}


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["verl", "nemo_rl", "ours-eager", "ours-compile"])
    parser.add_argument("--peer-root", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    args = parser.parse_args()
    roots = dict(entry.split("=", 1) for entry in args.peer_root)
    for axis in args.axes:
        rows = []
        for value in AXES[axis]:
            rows += measure(args.methods, replace(CENTRE, **{axis: value}), roots, memory=False)
        print(f"== {axis}\n{printed(rows, reference=args.methods[-1])}", flush=True)
        write_result(f"scaling_{axis}", rows, command=f"python -m benchmarks.scaling --axes {axis}")


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.scaling"):
        main()
