"""Times our loss from hidden states to loss, dH and dW against the bare matrix products, in one run.

    python -m benchmarks.fused

The floor is only the three matrix products (logits, dH, dW), in the same chunks. `given` does as Megatron does: it
computes all logits, then our loss on them, then the two products of the backward pass.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Tokens, kernel_of, make_tokens, with_main_grad
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
from benchmarks.ours import ours
from tropd_mcore import logs
from tropd_mcore.conformance.ranks import on_fresh_ranks
from tropd_mcore.kernel.choose import backend as choose_backend
from tropd_mcore.kernel.shard import chunks
from tropd_mcore.kernel.source import GivenLogits, OutputLayer
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.fused")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one measurement."""

    tokens: int
    vocabulary: int
    hidden: int
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
    hidden: int
    k: int
    world_size: int
    chunk_tokens: int
    cpu_s: Spread
    over_floor: Spread
    """CPU seconds divided by the floor's CPU seconds in the same round"""
    extra_bytes: int
    """peak memory without hidden states, weight, dH and main_grad"""
    collectives: str
    loss: float
    gradient_norm: float
    """norm of dH"""


@dataclass
class Problem:
    """Hidden states and a weight shard with a float32 main_grad, as in training."""

    hidden_TD: Tensor
    weight_WD: Tensor
    tokens: Tokens
    dh_TD: Tensor


def make_problem(sizes: Sizes) -> Problem:
    """Return a problem with the same hidden states on all ranks, and this rank's rows of the weight."""
    width = sizes.vocabulary // dist.get_world_size()
    hidden_TD = torch.randn(sizes.tokens, sizes.hidden, generator=torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(10 + dist.get_rank())
    weight_WD = torch.randn(width, sizes.hidden, generator=random).mul_(2.0 / sizes.hidden**0.5)
    tokens = make_tokens(sizes.tokens, sizes.vocabulary, sizes.k)
    return Problem(
        hidden_TD.requires_grad_(True),
        with_main_grad(weight_WD),
        tokens,
        torch.empty_like(hidden_TD, requires_grad=False),
    )


def floor(problem: Problem, sizes: Sizes, buffer_CW: Tensor) -> Callable[[], float]:
    """Return a call that runs only the three products of every chunk."""
    hidden_TD, weight_WD = problem.hidden_TD.detach(), problem.weight_WD.detach()
    main_grad: Tensor = problem.weight_WD.main_grad  # type: ignore[attr-defined]

    def run() -> float:
        for rows in chunks(sizes.tokens, sizes.chunk_tokens):
            logits_CW = torch.mm(hidden_TD[rows], weight_WD.t(), out=buffer_CW[: rows.stop - rows.start])
            torch.mm(logits_CW, weight_WD, out=problem.dh_TD[rows])
            torch.addmm(main_grad, logits_CW.t(), hidden_TD[rows], out=main_grad)
        return float("nan")

    return run


def fused(problem: Problem, sizes: Sizes, backend: str, mode: Any) -> Callable[[], float]:
    """Return a call of our fused form."""
    kernel = kernel_of(sizes.vocabulary, choose_backend(backend, torch.device("cpu")), sizes.chunk_tokens)

    def run() -> float:
        source = OutputLayer(problem.hidden_TD, problem.weight_WD)
        loss = ours(source, problem.tokens, kernel, weight_gradient=mode)
        return _backward(loss, problem)

    return run


def given(problem: Problem, sizes: Sizes, backend: str) -> Callable[[], float]:
    """Return a call that computes all logits with a plain linear layer, then our loss on them."""
    kernel = kernel_of(sizes.vocabulary, choose_backend(backend, torch.device("cpu")), sizes.chunk_tokens)

    def run() -> float:
        logits_TW = torch.nn.functional.linear(problem.hidden_TD, problem.weight_WD)
        loss = ours(GivenLogits(logits_TW), problem.tokens, kernel, weight_gradient="recompute")
        value = _backward(loss, problem)
        dist.all_reduce(problem.hidden_TD.grad)
        return value

    return run


def _backward(loss: Tensor, problem: Problem) -> float:
    problem.hidden_TD.grad = problem.weight_WD.grad = None
    loss.backward()
    return float(loss.detach())


def methods_of(problem: Problem, sizes: Sizes) -> dict[str, Callable[[], float]]:
    """Return all methods by name."""
    buffer_CW = torch.empty(min(sizes.chunk_tokens, sizes.tokens), problem.weight_WD.shape[0])
    return {
        "floor": floor(problem, sizes, buffer_CW),
        "fused-compile-folded": fused(problem, sizes, "compile", "folded"),
        "fused-compile-deferred": fused(problem, sizes, "compile", "deferred"),
        "fused-compile-recompute": fused(problem, sizes, "compile", "recompute"),
        "fused-eager-folded": fused(problem, sizes, "eager", "folded"),
        "given-compile": given(problem, sizes, "compile"),
    }


def time_methods(sizes: Sizes, names: list[str]) -> dict[str, Any]:
    """Return times, collectives and results on this rank."""
    problem = make_problem(sizes)
    methods = {name: method for name, method in methods_of(problem, sizes).items() if name in names}
    found = {}
    for name, method in methods.items():
        traffic = Traffic()
        with counted(traffic):
            loss = method()
        grad = problem.hidden_TD.grad
        found[name] = (loss, float(grad.norm()) if grad is not None else float("nan"), traffic)
    calls: dict[str, list[Any]] = {name: [] for name in methods}
    for name, method in interleaved(methods, sizes.repeats):
        calls[name].append(timed(method)[0])
    return {"calls": calls, "found": found}


def memory_of(sizes: Sizes, name: str) -> int:
    """Return the peak bytes of one method after a first run; main_grad and dH exist already."""
    problem = make_problem(sizes)
    method = methods_of(problem, sizes)[name]
    method()
    problem.hidden_TD.grad = problem.weight_WD.grad = None
    return peak_bytes(method) - problem.hidden_TD.numel() * 4


def measure(sizes: Sizes, names: list[str]) -> list[Row]:
    """Measure all methods at one size."""
    ranks = on_fresh_ranks(time_methods, sizes.world_size, sizes, names)
    slower = {name: slower_rank([rank["calls"][name] for rank in ranks]) for name in names}
    rows = []
    for name in names:
        loss, norm, traffic = ranks[0]["found"][name]
        seconds = [call.cpu_s for call in slower[name]]
        rows.append(
            Row(
                method=name,
                tokens=sizes.tokens,
                vocabulary=sizes.vocabulary,
                hidden=sizes.hidden,
                k=sizes.k,
                world_size=sizes.world_size,
                chunk_tokens=sizes.chunk_tokens,
                cpu_s=Spread.of(seconds),
                over_floor=Spread.of([mine / bare.cpu_s for mine, bare in zip(seconds, slower["floor"], strict=True)]),
                extra_bytes=max(on_fresh_ranks(memory_of, sizes.world_size, sizes, name)),
                collectives=str(traffic),
                loss=loss,
                gradient_norm=norm,
            )
        )
    return rows


def printed(rows: list[Row]) -> str:
    """Return the rows as a table."""
    cells = [
        [
            row.method,
            str(row.cpu_s),
            str(row.over_floor),
            f"{row.extra_bytes / 1e6:.0f}",
            row.collectives,
            f"{row.loss:.6g}",
            f"{row.gradient_norm:.6g}",
        ]
        for row in rows
    ]
    return table(["method", "CPU s [range]", "x floor [range]", "extra MB", "collectives", "loss", "|dH|"], cells)


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["floor", "fused-compile-folded", "fused-compile-deferred", "fused-eager-folded", "given-compile"],
    )
    parser.add_argument("--name", default="fused", help="results/<name>.json")
    args = parser.parse_args()
    sizes = Sizes(args.tokens, args.vocabulary, args.hidden, args.k, args.tp, args.chunk_tokens, args.repeats)
    rows = measure(sizes, args.methods)
    print(printed(rows))
    command = (
        f"python -m benchmarks.fused --tokens {args.tokens} --hidden {args.hidden} --chunk-tokens {args.chunk_tokens}"
    )
    print(write_result(args.name, rows, command=command))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.fused"):
        main()
