"""A loss on vocabulary shards, computed by the kernel on every rank, and its oracle. Not a test module.

The loss of a token is sum_j (a_j log p_j + b_j p_j) + c H, so its gradient depends on the computed values. The oracle
is float64 and imports nothing from the package. The kernel is imported through `tests.mutants`, so that a faulty copy
can replace it.

Shapes: T tokens (37), V vocabulary (101) with padding, J support ids (16), D hidden (13), W width of one shard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests import oracles
from tests.collectives import counted_collectives
from tests.mutants import Losses, real_losses
from tests.ranks import run_on_ranks, run_with_compiler

TOKENS, VOCABULARY, HIDDEN = 37, 101, 13
DISTINCT = (1, 9, 6)
"""Runs of the support; ids of different runs may be equal."""
LAYOUTS = {
    "tp1": (0, 101),
    "tp1-padded": (0, 112),
    "tp2-uneven": (0, 60, 104),
    "tp3-support-wider-than-shard": (0, 50, 57, 104),
    "tp3-padding-only-shard": (0, 64, 101, 110),
    "tp3-empty-shard": (0, 101, 101, 105),
}
"""Shard borders; columns from 101 on are padding."""
FORMS = {
    "fused, deferred": {"form": "fused", "mode": "deferred"},
    "fused, folded": {"form": "fused", "mode": "folded", "factor": 1.0, "with_main_grad": True},
    "fused, recompute": {"form": "fused", "mode": "recompute"},
    "logits": {"form": "logits", "mode": "deferred"},
}
"""Changes to a case for each way to make the gradient."""


@dataclass(frozen=True)
class Case:
    hidden_TD: Tensor
    """float64, but representable in `dtype`, as the weight"""
    weight_VD: Tensor
    ids_TJ: Tensor
    a_TJ: Tensor
    b_TJ: Tensor
    c_T: Tensor
    borders: tuple[int, ...]
    dtype: torch.dtype
    temperature: float = 0.7
    softcap: float | None = None
    form: str = "fused"
    mode: str = "deferred"
    backend: str = "eager"
    factor: float = 2.0
    """Factor by which the loss is multiplied before the backward pass"""
    chunk_tokens: int = 8
    overlap: bool = False
    with_main_grad: bool = False
    """float32 (float64 for float64) beside the weight, filled with 1"""
    frozen: tuple[str, ...] = ()
    """`hidden`, `weight`: inputs that need no gradient"""
    reduce_hidden_gradient: bool = True
    measure_force: bool = False


@dataclass(frozen=True)
class RankResult:
    loss: Tensor
    row_TX: Tensor
    """log-probs and entropy as the loss saw them"""
    hidden_gradient_TD: Tensor | None
    weight_gradient_WD: Tensor | None
    """from main_grad where there is one"""
    forward_calls: Counter[str]
    backward_calls: Counter[str]
    force_T: Tensor | None
    """None if it is not measured"""


def make_case(layout: str, dtype: torch.dtype = torch.float64, *, tokens: int = TOKENS, **changes: Any) -> Case:
    """Random rows. Some ids are in two or three runs, some slots are unused (-1). Padding is as likely as the rest."""
    random = torch.Generator().manual_seed(7)
    borders = LAYOUTS[layout]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    ids_TJ = torch.empty(tokens, sum(DISTINCT), dtype=torch.int64)
    for token in range(tokens):
        ids_TJ[token] = torch.randperm(VOCABULARY, generator=random)[: sum(DISTINCT)]
        first, second, third = ids_TJ[token].split(DISTINCT)
        if token % 2:
            second[4] = first[0]
        if token % 3:
            third[2] = first[0]
        if token % 4:
            third[5] = second[7]
    ids_TJ[1::5, -4:] = -1
    case = Case(
        hidden_TD=normal(tokens, HIDDEN).to(dtype).double(),
        weight_VD=(1.2 * normal(borders[-1], HIDDEN)).to(dtype).double(),
        ids_TJ=ids_TJ,
        a_TJ=normal(*ids_TJ.shape),
        b_TJ=normal(*ids_TJ.shape),
        c_T=normal(tokens),
        borders=borders,
        dtype=dtype,
    )
    return replace(case, **changes)


def run_cases(cases: list[Case]) -> list[list[RankResult]]:
    """The results of each case by rank. All cases have the same number of shards."""
    world_size = len(cases[0].borders) - 1
    run = run_with_compiler if any(case.backend == "compile" for case in cases) else run_on_ranks
    by_rank = run(results_on_this_rank, world_size, cases)
    return [list(results) for results in zip(*by_rank, strict=True)]


def run_case(case: Case) -> list[RankResult]:
    return run_cases([case])[0]


def results_on_this_rank(cases: list[Case]) -> list[RankResult]:
    return [result_on_this_rank(case, real_losses()) for case in cases]


def result_on_this_rank(case: Case, losses: Losses) -> RankResult:
    start, stop = case.borders[dist.get_rank()], case.borders[dist.get_rank() + 1]
    hidden_TD = case.hidden_TD.to(case.dtype).requires_grad_("hidden" not in case.frozen)
    weight_WD = case.weight_VD[start:stop].to(case.dtype).requires_grad_("weight" not in case.frozen)
    if case.with_main_grad:
        main_dtype = torch.promote_types(case.dtype, torch.float32)
        weight_WD.main_grad = torch.ones_like(weight_WD, dtype=main_dtype, requires_grad=False)  # type: ignore[attr-defined]
    if case.form == "fused":
        source = losses["kernel.source"].OutputLayer(hidden_TD, weight_WD)
    else:
        source = losses["kernel.source"].GivenLogits(hidden_TD @ weight_WD.t())
    with counted_collectives() as forward_calls:
        output = losses["kernel.support_loss"].support_loss(
            source,
            case.ids_TJ,
            token_loss(case, losses),
            kernel(case, losses),
            unique_run_lengths=DISTINCT,
            weight_gradient=case.mode,
            reduce_hidden_gradient=case.reduce_hidden_gradient,
            measure_force=case.measure_force,
        )
    with counted_collectives() as backward_calls:
        if output.loss_sum.requires_grad:
            (output.loss_sum * case.factor).backward()
    hidden_gradient_TD, weight_gradient_WD = hidden_TD.grad, getattr(weight_WD, "main_grad", weight_WD.grad)
    if case.form == "logits" and hidden_gradient_TD is not None:
        dist.all_reduce(hidden_gradient_TD)
    return RankResult(
        output.loss_sum.detach(),
        output.columns["row"],
        hidden_gradient_TD,
        weight_gradient_WD,
        forward_calls,
        backward_calls,
        output.columns.get("force"),
    )


def kernel(case: Case, losses: Losses) -> Any:
    """The `Kernel` of this rank."""
    start, stop = case.borders[dist.get_rank()], case.borders[dist.get_rank() + 1]
    assert dist.group.WORLD is not None
    return losses["kernel.backend"].Kernel(
        shard=losses["kernel.shard"].VocabShard(start, stop, VOCABULARY),
        group=dist.group.WORLD,
        backend=losses["kernel.choose"].backend(case.backend, torch.device("cpu")),
        scaling=losses["kernel.shard"].Scaling(case.temperature, case.softcap),
        chunk_tokens=case.chunk_tokens,
        overlap=case.overlap,
    )


def token_loss(case: Case, losses: Losses) -> Any:
    """The `TokenLoss` of a case."""

    def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> Any:
        a_CJ, b_CJ, c_C = (number[rows].to(logp_CJ.dtype) for number in (case.a_TJ, case.b_TJ, case.c_T))
        loss_C = (a_CJ * logp_CJ).sum(dim=1) + (b_CJ * logp_CJ.exp()).sum(dim=1) + c_C * entropy_C
        counted_C = torch.ones(len(logp_CJ), dtype=torch.bool)
        row_CX = torch.cat([logp_CJ, entropy_C[:, None]], dim=1).detach()
        return losses["kernel.token_losses"].TokenLosses(loss_C, counted_C, {"row": row_CX})

    return loss


@dataclass(frozen=True)
class Expected:
    loss: float
    row_TX: np.ndarray
    hidden_gradient_TD: np.ndarray
    weight_gradient_VD: np.ndarray
    """of the real rows"""


def oracle(case: Case) -> Expected:
    """Loss and gradients of loss x factor, by the equations, in float64."""
    hidden, weight = case.hidden_TD.numpy(), case.weight_VD.numpy()[:VOCABULARY]
    logits, slope = hidden @ weight.T, 1.0
    if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
        slope = 1.0 - (logits / case.softcap) ** 2
    ids, a, b, c = (number.numpy() for number in (case.ids_TJ, case.a_TJ, case.b_TJ, case.c_T))
    logp, entropy = oracles.support(logits, ids, case.temperature)
    p = np.exp(logp)
    dz = slope * case.factor * oracles.support_gradient(logits, ids, a + b * p, c, case.temperature)
    return Expected(
        float((a * logp).sum() + (b * p).sum() + (c * entropy).sum()),
        np.concatenate([logp, entropy[:, None]], axis=1),
        dz @ weight,
        dz.T @ hidden,
    )


def assert_equals_the_oracle(results: list[RankResult], case: Case, tolerance: float) -> None:
    """Compare all values of all ranks. Errors are relative to the largest entry."""
    expected = oracle(case)
    for result in results:
        assert_close(result.loss, expected.loss, tolerance * len(case.hidden_TD))
        assert_close(result.row_TX, expected.row_TX, tolerance)
        if "hidden" not in case.frozen:
            assert_close(result.hidden_gradient_TD, expected.hidden_gradient_TD, tolerance)
    if "weight" not in case.frozen:
        assert_close(whole_weight_gradient(results, case), expected.weight_gradient_VD, tolerance)


def whole_weight_gradient(results: list[RankResult], case: Case) -> Tensor:
    """The gradient of the real rows, without the previous content of main_grad. That of the padding must be 0."""
    pieces = [result.weight_gradient_WD for result in results if result.weight_gradient_WD is not None]
    gradient_VD = torch.cat(pieces).double() - (1.0 if case.with_main_grad else 0.0)
    assert not gradient_VD[VOCABULARY:].any(), "error: padding has a gradient"
    return gradient_VD[:VOCABULARY]


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    right = np.asarray(expected, dtype=np.float64)
    found = actual.double().numpy() if isinstance(actual, Tensor) else np.asarray(actual, dtype=np.float64)
    assert found.shape == right.shape
    error = float(np.abs(found - right).max(initial=0.0)) / max(1.0, float(np.abs(right).max(initial=0.0)))
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
