"""Compares loss and gradient from given logits, ours against the peers': CPU seconds, memory, collectives, in one run.

    python -m benchmarks.loss_only --peer-root verl=PATH --peer-root nemo_rl=PATH --peer-root slime=PATH

Every method computes K1 + top-k forward KL + entropy (slime has no forward KL: K1 + entropy) of the same logits shards.
Times are measured interleaved in one pair of processes, memory in a separate pair of processes per method.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Tokens, Upstream, kernel_of, make_logits, make_tokens
from benchmarks.measure import (
    Spread,
    Traffic,
    counted,
    interleaved,
    peak_bytes,
    slower_rank,
    table,
    timed,
    write_result,
)
from benchmarks.ours import door, ours
from benchmarks.peers import PEERS, Composite, load_composite
from tropd_mcore import VocabParallel, logs
from tropd_mcore.conformance.ranks import on_fresh_ranks
from tropd_mcore.kernel.choose import backend as choose_backend
from tropd_mcore.kernel.source import GivenLogits
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.loss_only")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one measurement."""

    tokens: int
    vocabulary: int
    k: int
    world_size: int
    chunk_tokens: int
    repeats: int


@dataclass(frozen=True)
class Row:
    """The result of one method at one size."""

    method: str
    tokens: int
    vocabulary: int
    k: int
    world_size: int
    cpu_s: Spread
    """per rank, forward + backward; of the slower rank"""
    wall_s: Spread
    extra_bytes: int
    """peak memory beyond the logits shard; the largest over the ranks"""
    extra_bytes_per_element: float
    """per element of tokens x local vocabulary"""
    collectives: str
    loss: float
    gradient_norm: float


def method(name: str, sizes: Sizes, roots: dict[str, str]) -> Composite:
    """Return the method `ours-<backend>[-mode]` (the kernel), `door-<backend>` (`distill_loss`), or a peer's."""
    if name.startswith("door-"):
        group = dist.group.WORLD
        assert group is not None
        vp = VocabParallel(group, sizes.vocabulary, backend=name[5:], chunk_tokens=sizes.chunk_tokens)  # type: ignore[arg-type]
        return lambda logits_TW, tokens: door(logits_TW, tokens, vp)
    if name.startswith("ours-"):
        _, backend, *mode = name.split("-")
        kernel = kernel_of(sizes.vocabulary, choose_backend(backend, torch.device("cpu")), sizes.chunk_tokens)
        how: Any = mode[0] if mode else "recompute"
        return lambda logits_TW, tokens: ours(GivenLogits(logits_TW), tokens, kernel, weight_gradient=how)
    return load_composite(name, roots)


def time_methods(names: list[str], sizes: Sizes, roots: dict[str, str]) -> dict[str, Any]:
    """Return times, collectives and results of all methods on this rank."""
    methods = {name: method(name, sizes, roots) for name in names}
    original_TW = make_logits(sizes.tokens, sizes.vocabulary // dist.get_world_size(), rank=dist.get_rank())
    logits_TW, tokens = torch.empty_like(original_TW), make_tokens(sizes.tokens, sizes.vocabulary, sizes.k)
    calls: dict[str, list[Any]] = {name: [] for name in names}
    found: dict[str, tuple[float, float, Traffic]] = {}
    for name, composite in methods.items():  # warm-up, which also compiles
        logits_TW.copy_(original_TW)
        traffic = Traffic()
        norms: list[float] = []
        with counted(traffic):
            loss = _forward_backward(composite, logits_TW, tokens, norms)
        squared = torch.tensor(norms[0], dtype=torch.float64)
        dist.all_reduce(squared)
        found[name] = (loss, math.sqrt(float(squared)), traffic)
    for name, composite in interleaved(methods, sizes.repeats):
        logits_TW.copy_(original_TW)
        calls[name].append(timed(partial(_forward_backward, composite, logits_TW, tokens, None))[0])
    return {"calls": calls, "found": found}


def memory_of(name: str, sizes: Sizes, roots: dict[str, str]) -> int:
    """Return the peak bytes of one method on this rank, after a first call."""
    composite = method(name, sizes, roots)
    original_TW = make_logits(sizes.tokens, sizes.vocabulary // dist.get_world_size(), rank=dist.get_rank())
    logits_TW, tokens = original_TW.clone(), make_tokens(sizes.tokens, sizes.vocabulary, sizes.k)
    _forward_backward(composite, logits_TW, tokens, None)
    logits_TW.copy_(original_TW)
    return peak_bytes(lambda: _forward_backward(composite, logits_TW, tokens, None))


def _forward_backward(composite: Composite, logits_TW: Tensor, tokens: Tokens, norms: list[float] | None) -> float:
    anchor = torch.zeros((), requires_grad=True)
    loss = composite(Upstream.apply(anchor, logits_TW, norms), tokens)
    loss.backward()
    return float(loss.detach())


def measure(names: list[str], sizes: Sizes, roots: dict[str, str], *, memory: bool = True) -> list[Row]:
    """Measure all methods at one size."""
    ranks = on_fresh_ranks(time_methods, sizes.world_size, names, sizes, roots)
    rows = []
    for name in names:
        peak = max(on_fresh_ranks(memory_of, sizes.world_size, name, sizes, roots)) if memory else 0
        loss, norm, traffic = ranks[0]["found"][name]
        slower = slower_rank([rank["calls"][name] for rank in ranks])
        rows.append(
            Row(
                method=name,
                tokens=sizes.tokens,
                vocabulary=sizes.vocabulary,
                k=sizes.k,
                world_size=sizes.world_size,
                cpu_s=Spread.of([call.cpu_s for call in slower]),
                wall_s=Spread.of([call.wall_s for call in slower]),
                extra_bytes=peak,
                extra_bytes_per_element=peak / (sizes.tokens * sizes.vocabulary / sizes.world_size),
                collectives=str(traffic),
                loss=loss,
                gradient_norm=norm,
            )
        )
    return rows


def printed(rows: list[Row], *, reference: str) -> str:
    """Return the rows as a table. The times of the method `reference` are the divisor of one column."""
    base = {(row.tokens, row.vocabulary, row.k): row.cpu_s.median for row in rows if row.method == reference}
    cells = [
        [
            row.method,
            f"{row.tokens}x{row.vocabulary} k={row.k} tp={row.world_size}",
            str(row.cpu_s),
            f"{row.cpu_s.median / base[row.tokens, row.vocabulary, row.k]:.2f}",
            f"{row.extra_bytes / 1e6:.0f}",
            f"{row.extra_bytes_per_element:.2f}",
            row.collectives,
            f"{row.loss:.6g}",
            f"{row.gradient_norm:.6g}",
        ]
        for row in rows
    ]
    header = ["method", "size", "CPU s [range]", f"x {reference}", "extra MB", "B/elt", "collectives", "loss", "|grad|"]
    return table(header, cells)


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    own = ["door-eager", "ours-eager", "door-compile", "ours-compile"]
    parser.add_argument("--methods", nargs="+", default=["naive", "nemo_rl", "verl", "slime", *own])
    parser.add_argument("--peer-root", action="append", default=[], metavar="PEER=PATH", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--name", default="loss_only", help="results/<name>.json")
    args = parser.parse_args()
    roots = dict(entry.split("=", 1) for entry in args.peer_root)
    sizes = Sizes(args.tokens, args.vocabulary, args.k, args.tp, args.chunk_tokens, args.repeats)
    rows = measure(args.methods, sizes, roots, memory=not args.no_memory)
    print(printed(rows, reference=args.methods[-1]))
    command = f"python -m benchmarks.loss_only --methods {' '.join(args.methods)} --tokens {args.tokens}"
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print(write_result(args.name, rows, command=command, notes=f"allocator settings: {allocator or 'none'}"))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.loss_only"):
        main()
