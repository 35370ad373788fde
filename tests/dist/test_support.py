"""Log-probs of given logits' support against the float64 oracle, on one, two and three uneven vocabulary shards.

Shapes: T tokens (37), V vocabulary (101), J support ids (1 + 16), W width of one shard.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import oracles
from tests.collectives import counted_collectives
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits
from tropd_mcore.kernel.support_log_probs import support_log_probs

TOKENS, VOCABULARY, SUPPORT = 37, 101, 17
DISTINCT = (1, SUPPORT - 1)
LAYOUTS = {
    "tp1": (0, 101),
    "tp1-padded": (0, 112),
    "tp2-uneven": (0, 60, 104),
    "tp3-support-wider-than-shard": (0, 50, 57, 104),
    "tp3-padding-only-shard": (0, 64, 101, 110),
    "tp3-empty-shard": (0, 101, 101, 105),
}
"""Shard borders; columns from 101 on are padding."""


@dataclass(frozen=True)
class Case:
    logits_TV: Tensor
    """padded"""
    ids_TJ: Tensor
    grad_logp_TJ: Tensor
    grad_entropy_T: Tensor
    temperature: float
    chunk_tokens: int


@dataclass(frozen=True)
class RankResult:
    logp_TJ: Tensor
    entropy_T: Tensor
    gradient_TW: Tensor
    forward_calls: Counter[str]
    backward_calls: Counter[str]


def make_case(
    borders: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    tokens: int = TOKENS,
    temperature: float = 0.7,
    chunk_tokens: int = 8,
    scale: float = 4.0,
) -> Case:
    """Random rows: column 0 is often also in the rest of the support, and some slots are unused (-1)."""
    random = torch.Generator().manual_seed(7)
    logits_TV = scale * torch.randn(tokens, VOCABULARY, generator=random, dtype=torch.float64)
    padding = torch.full((tokens, borders[-1] - VOCABULARY), 50.0, dtype=torch.float64)
    topk_TK = torch.stack(
        [torch.randperm(VOCABULARY, generator=random)[: SUPPORT - 1] for _ in range(tokens)] or [torch.empty(0)]
    )
    topk_TK = topk_TK.reshape(tokens, SUPPORT - 1).to(torch.int64)
    sampled_T1 = torch.randint(VOCABULARY, (tokens, 1), generator=random)
    sampled_T1[::2] = topk_TK[::2, 3:4]
    ids_TJ = torch.cat([sampled_T1, topk_TK], dim=1)
    ids_TJ[1::5, -4:] = -1
    return Case(
        logits_TV=torch.cat([logits_TV, padding], dim=1).to(dtype),
        ids_TJ=ids_TJ,
        grad_logp_TJ=torch.randn(tokens, SUPPORT, generator=random, dtype=torch.float64),
        grad_entropy_T=torch.randn(tokens, generator=random, dtype=torch.float64),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )


def kernel_on_this_rank(case: Case, borders: tuple[int, ...], with_entropy_gradient: bool = True) -> RankResult:
    kernel = kernel_of_this_rank(case, borders)
    logits_TW = case.logits_TV[:, kernel.shard.start : kernel.shard.stop].clone().requires_grad_(True)
    with counted_collectives() as forward_calls:
        logp_TJ, entropy_T = support_log_probs(GivenLogits(logits_TW), case.ids_TJ, kernel, unique_run_lengths=DISTINCT)
    with counted_collectives() as backward_calls:
        loss = (logp_TJ * case.grad_logp_TJ.to(logp_TJ.dtype)).sum()
        if with_entropy_gradient:
            loss = loss + (entropy_T * case.grad_entropy_T.to(entropy_T.dtype)).sum()
        loss.backward()
    assert logits_TW.grad is not None
    return RankResult(logp_TJ.detach(), entropy_T.detach(), logits_TW.grad, forward_calls, backward_calls)


def kernel_of_this_rank(case: Case, borders: tuple[int, ...]) -> Kernel:
    assert dist.group.WORLD is not None
    shard = VocabShard(borders[dist.get_rank()], borders[dist.get_rank() + 1], VOCABULARY)
    return Kernel(shard, dist.group.WORLD, EagerBackend(), Scaling(case.temperature), case.chunk_tokens)


def run_kernel(case: Case, borders: tuple[int, ...], with_entropy_gradient: bool = True) -> list[RankResult]:
    return run_on_ranks(kernel_on_this_rank, len(borders) - 1, case, borders, with_entropy_gradient)


def oracle(case: Case, with_entropy_gradient: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log-probs [T, J], entropy [T] and gradient [T, V] of the case, from its rounded logits."""
    logits, ids = case.logits_TV[:, :VOCABULARY].double().numpy(), case.ids_TJ.numpy()
    grad_entropy = case.grad_entropy_T.numpy() if with_entropy_gradient else np.zeros(len(logits))
    logp, entropy = oracles.support(logits, ids, case.temperature)
    return (
        logp,
        entropy,
        oracles.support_gradient(logits, ids, case.grad_logp_TJ.numpy(), grad_entropy, case.temperature),
    )


def whole_gradient(results: list[RankResult]) -> np.ndarray:
    gradient_TV = torch.cat([result.gradient_TW for result in results], dim=1).double().numpy()
    assert not gradient_TV[:, VOCABULARY:].any(), "padding columns have a gradient"
    return gradient_TV[:, :VOCABULARY]


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max(initial=0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_values_and_gradients_equal_the_oracle_to_1e_12(layout: str) -> None:
    case = make_case(LAYOUTS[layout])
    results = run_kernel(case, LAYOUTS[layout])
    logp, entropy, gradient = oracle(case)
    for result in results:
        assert result.logp_TJ.dtype == torch.float64
        assert largest_error(result.logp_TJ.numpy(), logp) <= 1e-12
        assert largest_error(result.entropy_T.numpy(), entropy) <= 1e-12
    assert largest_error(whole_gradient(results), gradient) <= 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_values_and_gradients_equal_the_oracle_to_1e_5_relative(layout: str) -> None:
    case = make_case(LAYOUTS[layout], dtype=torch.float32)
    results = run_kernel(case, LAYOUTS[layout])
    logp, entropy, gradient = oracle(case)
    for result in results:
        assert result.logp_TJ.dtype == torch.float32
        np.testing.assert_allclose(result.logp_TJ.numpy(), logp, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.entropy_T.numpy(), entropy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole_gradient(results), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["tp1-padded", "tp2-uneven", "tp3-padding-only-shard"])
def test_bfloat16_logits_cost_one_rounding_of_the_gradient_and_nothing_else(layout: str) -> None:
    case = make_case(LAYOUTS[layout], dtype=torch.bfloat16)
    results = run_kernel(case, LAYOUTS[layout])
    logp, entropy, gradient = oracle(case)
    for result in results:
        assert result.logp_TJ.dtype == torch.float32
        np.testing.assert_allclose(result.logp_TJ.numpy(), logp, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result.entropy_T.numpy(), entropy, rtol=1e-5, atol=1e-6)
        assert result.gradient_TW.dtype == torch.bfloat16
    half_unit_in_the_last_place = 2.0**-8
    np.testing.assert_allclose(whole_gradient(results), gradient, rtol=half_unit_in_the_last_place, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_without_an_entropy_term_equals_the_oracle(dtype: torch.dtype) -> None:
    borders = LAYOUTS["tp3-support-wider-than-shard"]
    case = make_case(borders, dtype=dtype)
    _, _, gradient = oracle(case, with_entropy_gradient=False)
    results = run_kernel(case, borders, with_entropy_gradient=False)
    assert largest_error(whole_gradient(results), gradient) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("layout", ["tp2-uneven", "tp3-support-wider-than-shard", "tp3-padding-only-shard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_and_entropy_are_bit_identical_on_all_ranks(layout: str, dtype: torch.dtype) -> None:
    first, *others = run_kernel(make_case(LAYOUTS[layout], dtype=dtype, scale=9.0), LAYOUTS[layout])
    for other in others:
        assert torch.equal(first.logp_TJ, other.logp_TJ)
        assert torch.equal(first.entropy_T, other.entropy_T)


@pytest.mark.parametrize("layout", ["tp1", "tp2-uneven", "tp3-empty-shard"])
@pytest.mark.parametrize(("chunk_tokens", "chunks"), [(1, 37), (8, 5), (37, 1), (1000, 1)])
def test_the_forward_runs_one_all_reduce_per_chunk_and_the_backward_no_collective(
    layout: str, chunk_tokens: int, chunks: int
) -> None:
    for result in run_kernel(make_case(LAYOUTS[layout], chunk_tokens=chunk_tokens), LAYOUTS[layout]):
        assert result.forward_calls == ({} if layout == "tp1" else {"all_reduce": chunks}), (
            "one rank communicates nothing"
        )
        assert result.backward_calls == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_chunk_size_does_not_change_a_bit(dtype: torch.dtype) -> None:
    borders = LAYOUTS["tp2-uneven"]
    whole = run_kernel(make_case(borders, dtype=dtype, chunk_tokens=1000), borders)
    for chunk_tokens in (1, 5, 36):
        for one, other in zip(
            whole, run_kernel(make_case(borders, dtype=dtype, chunk_tokens=chunk_tokens), borders), strict=True
        ):
            assert torch.equal(one.logp_TJ, other.logp_TJ)
            assert torch.equal(one.entropy_T, other.entropy_T)
            assert torch.equal(one.gradient_TW, other.gradient_TW)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_rows_are_accepted_and_run_no_collective(layout: str) -> None:
    for result in run_kernel(make_case(LAYOUTS[layout], tokens=0), LAYOUTS[layout]):
        assert result.logp_TJ.shape == (0, SUPPORT) and result.entropy_T.shape == (0,)
        assert result.gradient_TW.shape[0] == 0
        assert result.forward_calls == {} and result.backward_calls == {}


def test_an_unused_slot_has_log_prob_zero_and_no_gradient() -> None:
    borders = LAYOUTS["tp2-uneven"]
    case = make_case(borders)
    unused = Case(**{**vars(case), "ids_TJ": torch.full_like(case.ids_TJ, -1)})
    for result in run_kernel(unused, borders, with_entropy_gradient=False):
        assert not result.logp_TJ.any()
        assert not result.gradient_TW.any()


def test_an_id_outside_the_vocabulary_gives_nan_even_where_a_padding_column_has_it() -> None:
    borders = LAYOUTS["tp2-uneven"]
    case = make_case(borders)
    case.ids_TJ[3, 2] = VOCABULARY + 1
    case.ids_TJ[4, 5] = -2
    for result in run_kernel(case, borders):
        nan_TJ = result.logp_TJ.isnan()
        assert nan_TJ.nonzero().tolist() == [[3, 2], [4, 5]]


def test_extreme_logits_stay_finite_and_exact() -> None:
    """Logits of +-1e4 and a shard far below the maximum: no overflow, and the far shard's entries are exact."""
    borders = LAYOUTS["tp2-uneven"]
    case = make_case(borders, scale=1.0)
    case.logits_TV[:, :60] += 1e4
    logp, entropy, gradient = oracle(case)
    results = run_kernel(case, borders)
    assert largest_error(results[1].logp_TJ.numpy(), logp) <= 1e-11 * 1e4
    assert largest_error(results[1].entropy_T.numpy(), entropy) <= 1e-11
    assert largest_error(whole_gradient(results), gradient) <= 1e-11


def test_a_group_of_none_is_refused_because_it_would_mean_the_world() -> None:
    nobody: Any = None
    with pytest.raises(AssertionError, match="group of None"):
        Kernel(VocabShard(0, 5, 5), nobody, EagerBackend(), Scaling(), chunk_tokens=1)


def _saved_for_backward(borders: tuple[int, ...]) -> list[tuple[tuple[int, ...], bool]]:
    """Shape of each tensor that the forward saves, and whether it is the storage of the logits."""
    case = make_case(borders)
    kernel = kernel_of_this_rank(case, borders)
    logits_TW = case.logits_TV[:, kernel.shard.start : kernel.shard.stop].clone().requires_grad_(True)
    saved: list[tuple[tuple[int, ...], bool]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append((tuple(tensor.shape), tensor.data_ptr() == logits_TW.data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        support_log_probs(GivenLogits(logits_TW), case.ids_TJ, kernel, unique_run_lengths=DISTINCT)
    return saved


def test_forward_saves_the_logits_themselves_the_ids_and_two_numbers_per_token() -> None:
    for saved in run_on_ranks(_saved_for_backward, 2, LAYOUTS["tp2-uneven"]):
        assert [is_logits for _, is_logits in saved] == [True, False, False, False]
        assert [shape for shape, _ in saved[1:]] == [(TOKENS, sum(DISTINCT)), (TOKENS,), (TOKENS,)]
