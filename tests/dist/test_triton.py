"""A whole loss by the Triton backend, on two vocabulary shards, against the oracle and the eager backend.

The kernels run in Triton's interpreter. Shapes: T tokens (7), V vocabulary (37, padded to 40), J support ids (6),
D hidden (5), W width of one shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import oracles
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.backend import Backend, Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import WeightGradientMode, support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.kernel.triton_backend import TritonBackend

TOKENS, VOCABULARY, HIDDEN = 7, 37, 5
BORDERS = (0, 22, 40)
DISTINCT = (1, 5)
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    hidden_TD: Tensor
    weight_VD: Tensor
    ids_TJ: Tensor
    grad_logp_TJ: Tensor
    grad_entropy_T: Tensor
    form: str
    mode: WeightGradientMode
    backend: str = "triton"
    factor: float = 1.0
    """Factor of the loss in the backward pass"""
    overlap: bool = False


@dataclass(frozen=True)
class Result:
    loss: float
    logits_gradient_TW: Tensor | None
    hidden_gradient_TD: Tensor | None
    weight_gradient_WD: Tensor | None


def make_case(form: str, mode: WeightGradientMode, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> Case:
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    topk_TK = torch.stack([torch.randperm(VOCABULARY, generator=random)[:5] for _ in range(TOKENS)])
    sampled_T1 = torch.randint(VOCABULARY, (TOKENS, 1), generator=random)
    sampled_T1[::2] = topk_TK[::2, 2:3]
    ids_TJ = torch.cat([sampled_T1, topk_TK], dim=1)
    ids_TJ[1::3, -2:] = -1
    grad_logp_TJ = normal(TOKENS, 6).masked_fill(ids_TJ == -1, 0.0)
    hidden_TD, weight_VD = normal(TOKENS, HIDDEN).to(dtype), 2.0 * normal(BORDERS[-1], HIDDEN)
    return Case(hidden_TD, weight_VD.to(dtype), ids_TJ, grad_logp_TJ, normal(TOKENS), form, mode, factor=factor)


def loss_on_this_rank(case: Case) -> Result:
    """A loss that is linear in log-probs and entropies, so that the case determines its gradient."""

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        terms_C = (case.grad_logp_TJ[rows].to(logp_CJ.dtype) * logp_CJ).sum(dim=1)
        terms_C = terms_C + case.grad_entropy_T[rows].to(logp_CJ.dtype) * entropy_C
        return TokenLosses(terms_C, torch.ones(len(logp_CJ), dtype=torch.bool), {"loss": terms_C.detach()})

    start, stop = BORDERS[dist.get_rank()], BORDERS[dist.get_rank() + 1]
    group = dist.group.WORLD
    assert group is not None
    backend: Backend = TritonBackend(block_columns=16) if case.backend == "triton" else EagerBackend()
    shard = VocabShard(start, stop, VOCABULARY)
    kernel = Kernel(shard, group, backend, Scaling(TEMPERATURE), chunk_tokens=3, overlap=case.overlap)
    hidden_TD = case.hidden_TD.clone().requires_grad_(True)
    weight_WD = case.weight_VD[start:stop].clone().requires_grad_(True)
    source: LogitSource = OutputLayer(hidden_TD, weight_WD)
    if case.form == "logits":
        source = GivenLogits((case.hidden_TD @ case.weight_VD[start:stop].T).requires_grad_(True))
    elif case.mode == "folded":
        weight_WD.main_grad = torch.zeros_like(weight_WD, dtype=main_dtype(case), requires_grad=False)  # type: ignore[attr-defined]
    output = support_loss(
        source, case.ids_TJ, token_loss, kernel, unique_run_lengths=DISTINCT, weight_gradient=case.mode
    )
    assert int(output.token_count) == TOKENS
    (output.loss_sum * case.factor).backward()
    loss = float(output.loss_sum.detach())
    if isinstance(source, GivenLogits):
        return Result(loss, source.logits_TW.grad, None, None)
    return Result(loss, None, hidden_TD.grad, getattr(weight_WD, "main_grad", weight_WD.grad))


def main_dtype(case: Case) -> torch.dtype:
    return torch.float64 if case.weight_VD.dtype == torch.float64 else torch.float32


def run(case: Case) -> list[Result]:
    found: list[Result] = run_on_ranks(loss_on_this_rank, 2, case)
    return found


def whole(results: list[Result]) -> dict[str, np.ndarray]:
    """Gradients with both shards joined, including padding. Loss and hidden gradient are equal on every rank."""
    first, second = results
    assert first.loss == second.loss
    if first.logits_gradient_TW is not None and second.logits_gradient_TW is not None:
        return {"logits": torch.cat([first.logits_gradient_TW, second.logits_gradient_TW], dim=1).double().numpy()}
    assert first.hidden_gradient_TD is not None and second.hidden_gradient_TD is not None
    assert first.weight_gradient_WD is not None and second.weight_gradient_WD is not None
    assert torch.equal(first.hidden_gradient_TD, second.hidden_gradient_TD)
    return {
        "hidden": first.hidden_gradient_TD.double().numpy(),
        "weight": torch.cat([first.weight_gradient_WD, second.weight_gradient_WD]).double().numpy(),
    }


def oracle(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients from the rounded operands."""
    hidden, weight = case.hidden_TD.double().numpy(), case.weight_VD.double().numpy()
    logits, ids = hidden @ weight[:VOCABULARY].T, case.ids_TJ.numpy()
    grad_logp, grad_entropy = case.grad_logp_TJ.numpy(), case.grad_entropy_T.numpy()
    logp, entropy = oracles.support(logits, ids, TEMPERATURE)
    dz = case.factor * oracles.support_gradient(logits, ids, grad_logp, grad_entropy, TEMPERATURE)
    dz = np.concatenate([dz, np.zeros((TOKENS, BORDERS[-1] - VOCABULARY))], axis=1)
    gradients = {"logits": dz} if case.form == "logits" else {"hidden": dz @ weight, "weight": dz.T @ hidden}
    return float((grad_logp * logp).sum() + (grad_entropy * entropy).sum()), gradients


def assert_close(results: list[Result], loss: float, gradients: dict[str, np.ndarray], tolerance: float) -> None:
    """Gradients relative to their largest entry."""
    found = whole(results)
    assert results[0].loss == pytest.approx(loss, rel=max(tolerance, 1e-12))
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = np.abs(found[name] - gradient).max() / np.abs(gradient).max()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("form", ["fused", "logits"])
@pytest.mark.parametrize("mode", ["deferred", "folded", "recompute"])
def test_loss_and_gradients_equal_the_oracle_and_eager_in_float64(form: str, mode: WeightGradientMode) -> None:
    case = make_case(form, mode, factor=1.0 if mode == "folded" else 1.75)
    results = run(case)
    assert_close(results, *oracle(case), 1e-12)
    eager = run(replace(case, backend="eager"))
    assert_close(results, eager[0].loss, whole(eager), 1e-12)


@pytest.mark.parametrize("form", ["fused", "logits"])
def test_loss_and_gradients_equal_the_oracle_in_float32(form: str) -> None:
    case = make_case(form, "deferred", torch.float32)
    assert_close(run(case), *oracle(case), 1e-5)


@pytest.mark.parametrize("mode", ["deferred", "folded", "recompute"])
def test_bfloat16_weights_cost_one_rounding_of_the_logits_gradient(mode: WeightGradientMode) -> None:
    """The interpreter truncates where a GPU rounds, and the gradients themselves are bfloat16: 2^-7 each."""
    case = make_case("fused", mode, torch.bfloat16)
    loss, gradients = oracle(case)
    results = run(case)
    assert results[0].loss == pytest.approx(loss, rel=1e-5)
    assert_close(results, results[0].loss, gradients, 2.0**-6)


def test_overlapped_chunks_change_no_bit() -> None:
    case = make_case("fused", "deferred")
    plain, overlapped = run(case), run(replace(case, overlap=True))
    assert plain[0].loss == overlapped[0].loss
    assert all(np.array_equal(whole(plain)[name], gradient) for name, gradient in whole(overlapped).items())


def test_loss_and_gradients_are_bit_identical_in_a_second_run() -> None:
    case = make_case("fused", "deferred", torch.bfloat16)
    first, second = run(case), run(case)
    assert first[0].loss == second[0].loss
    assert all(np.array_equal(whole(first)[name], gradient) for name, gradient in whole(second).items())
