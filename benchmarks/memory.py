"""Measures how peak memory grows with the number of tokens, for the fused form and for all logits at once.

    python -m benchmarks.memory

The last column is the slope of a least-squares line through the peaks. For the fused form, it should be the size of one
token's hidden-state gradient and per-token numbers, for any vocabulary.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from dataclasses import dataclass, replace

from benchmarks.fused import Sizes, memory_of
from benchmarks.measure import table, write_result
from tropd_mcore import logs
from tropd_mcore.conformance.ranks import on_fresh_ranks
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.memory")

CENTRE = Sizes(tokens=0, vocabulary=65536, hidden=256, k=64, world_size=2, chunk_tokens=256, repeats=1)


@dataclass(frozen=True)
class Row:
    """Peak of one method at one number of tokens."""

    method: str
    tokens: int
    vocabulary: int
    hidden: int
    extra_bytes: int
    """peak memory without hidden states, weight, dH and main_grad"""


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", default=["fused-compile-folded", "fused-eager-folded", "given-compile"])
    args = parser.parse_args()
    rows = []
    for method in args.methods:
        for tokens in args.tokens:
            sizes = replace(CENTRE, tokens=tokens)
            peak = max(on_fresh_ranks(memory_of, sizes.world_size, sizes, method))
            rows.append(Row(method, tokens, sizes.vocabulary, sizes.hidden, peak))
    cells = []
    for method in args.methods:
        mine = [row for row in rows if row.method == method]
        line = statistics.linear_regression([row.tokens for row in mine], [row.extra_bytes for row in mine])
        cells.append([method, *(f"{row.extra_bytes / 1e6:.0f}" for row in mine), f"{line.slope:.0f}"])
    print(table(["method", *(f"MB at {tokens}" for tokens in args.tokens), "bytes per token"], cells))
    print(write_result("memory", rows, command="python -m benchmarks.memory"))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.memory"):
        main()
