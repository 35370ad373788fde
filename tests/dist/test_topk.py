"""The distributed top-k against a sort in pure Python: exact ids and order, ties included.

Shapes: T tokens, V vocabulary (101), K entries.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracles
from tests.collectives import counted_collectives
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_log_probs import support_log_probs
from tropd_mcore.kernel.topk import SMALLEST_CUT, TILE, TopK, distributed_topk

TOKENS, VOCABULARY = 37, 101
PLAIN = Scaling()
LAYOUTS = {
    "tp1": (0, 108),
    "tp2-uneven": (0, 60, 104),
    "tp3-narrow-shard": (0, 50, 57, 104),
    "tp3-padding-only-shard": (0, 64, 101, 110),
    "tp3-empty-shard": (0, 101, 101, 105),
}


def kernel_of_this_rank(
    borders: tuple[int, ...], vocabulary: int, scaling: Scaling = PLAIN, chunk_tokens: int = 8
) -> Kernel:
    assert dist.group.WORLD is not None
    shard = VocabShard(borders[dist.get_rank()], borders[dist.get_rank() + 1], vocabulary)
    return Kernel(shard, dist.group.WORLD, EagerBackend(), scaling, chunk_tokens)


def topk_on_this_rank(
    logits_TV: Tensor, borders: tuple[int, ...], vocabulary: int, k: int, scaling: Scaling, chunk_tokens: int
) -> tuple[TopK, Counter[str]]:
    kernel = kernel_of_this_rank(borders, vocabulary, scaling, chunk_tokens)
    source = GivenLogits(logits_TV[:, kernel.shard.start : kernel.shard.stop])
    with counted_collectives() as calls:
        result = distributed_topk(source, k=k, kernel=kernel)
    return result, calls


def run_topk(
    logits_TV: Tensor,
    borders: tuple[int, ...],
    k: int,
    *,
    vocabulary: int = VOCABULARY,
    scaling: Scaling = PLAIN,
    chunk_tokens: int = 8,
) -> list[tuple[TopK, Counter[str]]]:
    world_size = len(borders) - 1
    return run_on_ranks(topk_on_this_rank, world_size, logits_TV, borders, vocabulary, k, scaling, chunk_tokens)


def random_logits(borders: tuple[int, ...], dtype: torch.dtype, tokens: int = TOKENS, scale: float = 4.0) -> Tensor:
    random = torch.Generator().manual_seed(11)
    logits_TV = scale * torch.randn(tokens, borders[-1], generator=random, dtype=torch.float64)
    logits_TV[:, VOCABULARY:] = 99.0
    return logits_TV.to(dtype)


def assert_equals_the_oracle(result: TopK, logits_TV: Tensor, k: int, temperature: float, tolerance: float) -> None:
    for token, z in enumerate(logits_TV[:, :VOCABULARY].double().numpy()):
        log_p = oracles.log_softmax(z, temperature)
        ids = oracles.top_ids(z, k)
        assert result.ids_TK[token].tolist() == ids
        np.testing.assert_allclose(result.logp_TK[token].numpy(), log_p[ids], rtol=tolerance, atol=tolerance)
        assert abs(float(result.tail_mass_T[token]) - max(0.0, 1.0 - np.exp(log_p[ids]).sum())) <= tolerance
        assert abs(float(result.lse_T[token]) - (z[0] / temperature - log_p[0])) <= tolerance * 10
        assert abs(float(result.entropy_T[token]) - oracles.entropy(z, temperature)) <= tolerance * 10


def assert_same_bits(one: TopK, other: TopK) -> None:
    for name, number in vars(one).items():
        assert number is None or torch.equal(number, getattr(other, name)), f"{name} differs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 16, 101])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_topk_equals_the_sort_of_the_whole_vocabulary(
    layout: str, k: int, dtype: torch.dtype, tolerance: float
) -> None:
    logits_TV = random_logits(LAYOUTS[layout], dtype)
    for result, _ in run_topk(logits_TV, LAYOUTS[layout], k, scaling=Scaling(0.5)):
        assert result.logp_TK.dtype == dtype and result.ids_TK.dtype == torch.int64
        assert_equals_the_oracle(result, logits_TV, k, 0.5, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lower_id_even_across_shards(layout: str, dtype: torch.dtype) -> None:
    """Rounded so coarsely that most entries tie, with both zeros among them."""
    logits_TV = random_logits(LAYOUTS[layout], torch.float64).round()
    logits_TV[:, ::3] *= 0.0
    logits_TV[:, 3::6] = -0.0
    logits_TV = logits_TV.to(dtype)
    ties = sum(len(set(row.tolist())) < VOCABULARY // 2 for row in logits_TV[:, :VOCABULARY])
    assert ties == TOKENS
    for result, _ in run_topk(logits_TV, LAYOUTS[layout], 16):
        assert_equals_the_oracle(result, logits_TV, 16, 1.0, 1e-12 if dtype == torch.float64 else 2e-6)


def test_bfloat16_rounding_of_large_logits_is_ordered_exactly() -> None:
    """Logits in [16, 32) have a spacing of 0.125 in bfloat16: ties at the cut are the rule."""
    borders = LAYOUTS["tp3-narrow-shard"]
    logits_TV = (random_logits(borders, torch.float64, scale=1.0) + 24.0).to(torch.bfloat16)
    for result, _ in run_topk(logits_TV, borders, 16):
        assert_equals_the_oracle(result, logits_TV, 16, 1.0, 4e-6)


@pytest.mark.parametrize("layout", ["tp2-uneven", "tp3-padding-only-shard"])
def test_the_top_k_is_bit_identical_on_all_ranks(layout: str) -> None:
    logits_TV = random_logits(LAYOUTS[layout], torch.bfloat16)
    (first, _), *others = run_topk(logits_TV, LAYOUTS[layout], 16)
    for other, _ in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize(("chunk_tokens", "chunks"), [(1, 37), (8, 5), (1000, 1)])
def test_each_chunk_runs_one_all_gather_and_chunk_size_does_not_change_a_bit(chunk_tokens: int, chunks: int) -> None:
    borders = LAYOUTS["tp2-uneven"]
    logits_TV = random_logits(borders, torch.float32)
    expected = run_topk(logits_TV, borders, 16, chunk_tokens=5)[0][0]
    for result, calls in run_topk(logits_TV, borders, 16, chunk_tokens=chunk_tokens):
        assert calls == {"all_gather": chunks}
        assert_same_bits(result, expected)


def test_the_top_k_of_zero_rows_is_empty() -> None:
    borders = LAYOUTS["tp2-uneven"]
    for result, calls in run_topk(random_logits(borders, torch.float32, tokens=0), borders, 16):
        assert result.ids_TK.shape == (0, 16) and result.tail_mass_T.shape == (0,)
        assert calls == {}


def test_a_k_above_the_vocabulary_size_is_an_error_that_names_the_key() -> None:
    borders = LAYOUTS["tp2-uneven"]
    with pytest.raises(ValueError, match=r"102 candidates .* has 101 tokens; set objective\.topk, .* <= 101"):
        run_topk(random_logits(borders, torch.float32), borders, 102)


def _topk_with_ids(
    hidden_TD: Tensor, weight_VD: Tensor, ids_TJ: Tensor, borders: tuple[int, ...], form: str
) -> tuple[TopK, Tensor, Counter[str]]:
    """The top 16 and `logp_TJ` of one pass, and the latter from `support_log_probs`."""
    kernel = kernel_of_this_rank(borders, VOCABULARY, Scaling(0.7, 9.0))
    layer = OutputLayer(hidden_TD, weight_VD[kernel.shard.start : kernel.shard.stop])
    source: LogitSource = layer if form == "fused" else GivenLogits(layer.logits(slice(0, layer.tokens)))
    with counted_collectives() as calls:
        result = distributed_topk(source, k=16, kernel=kernel, ids_TJ=ids_TJ)
    logp_TJ, _ = support_log_probs(source, ids_TJ, kernel, unique_run_lengths=(1,) * ids_TJ.shape[1])
    return result, logp_TJ, calls


@pytest.mark.parametrize("form", ["fused", "logits"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_of_given_ids_come_from_the_same_pass_and_all_gather(layout: str, form: str) -> None:
    """An output layer with a softcap: ids, order and log-probs of the oracle; unused slots 0, unknown ids NaN."""
    random = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(TOKENS, 7, generator=random, dtype=torch.float64)
    weight_VD = 1.5 * torch.randn(LAYOUTS[layout][-1], 7, generator=random, dtype=torch.float64)
    ids_TJ = torch.randint(VOCABULARY, (TOKENS, 3), generator=random)
    ids_TJ[::4, 1], ids_TJ[5, 2] = -1, VOCABULARY
    capped_TV = 9.0 * torch.tanh(hidden_TD @ weight_VD[:VOCABULARY].t() / 9.0)
    known = ids_TJ.where(ids_TJ < VOCABULARY, -1).numpy()
    expected, _ = oracles.support(capped_TV.numpy(), known, 0.7)
    expected[5, 2] = np.nan
    for result, logp_TJ, calls in run_on_ranks(
        _topk_with_ids, len(LAYOUTS[layout]) - 1, hidden_TD, weight_VD, ids_TJ, LAYOUTS[layout], form
    ):
        assert calls == ({"all_gather": 5} if len(LAYOUTS[layout]) > 2 else {}), "one rank communicates nothing"
        assert_equals_the_oracle(result, capped_TV, 16, 0.7, 1e-12)
        assert result.logp_TJ is not None
        np.testing.assert_allclose(result.logp_TJ.numpy(), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(result.logp_TJ.nan_to_num(), logp_TJ.nan_to_num())


def test_without_given_ids_no_log_probs_are_returned() -> None:
    borders = LAYOUTS["tp2-uneven"]
    assert all(result.logp_TJ is None for result, _ in run_topk(random_logits(borders, torch.float32), borders, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_searching_only_the_best_tiles_gives_the_same_top_k_as_a_sort(dtype: torch.dtype, scale: float) -> None:
    """Wide shards, one that ends in a part of a tile; at scale 0.2, rounded, whole tiles tie and are zeros."""
    width, k = 20 * TILE + 5, 5
    assert SMALLEST_CUT * k * TILE < width - 8
    random = torch.Generator().manual_seed(4)
    logits_TV = scale * torch.randn(TOKENS, 2 * width, generator=random, dtype=torch.float64)
    if scale < 1.0:
        logits_TV = (4.0 * logits_TV).round().clamp_min(0.0)
        logits_TV[0] = 0.0
    logits_TV = logits_TV.to(dtype)
    vocabulary = 2 * width - 8
    for result, _ in run_topk(logits_TV, (0, width, 2 * width), k, vocabulary=vocabulary):
        for token, z in enumerate(logits_TV[:, :vocabulary].double().numpy()):
            assert result.ids_TK[token].tolist() == oracles.top_ids(z, k)


def test_logits_that_become_equal_only_by_scaling_keep_their_order() -> None:
    """tanh of both is 1 in float32: the larger logit still comes first, with the same log-prob."""
    logits_TV = torch.zeros(1, VOCABULARY)
    logits_TV[0, 3], logits_TV[0, 70] = 200.0, 201.0
    for result, _ in run_topk(logits_TV, (0, 60, VOCABULARY), 2, scaling=Scaling(softcap=10.0)):
        assert result.ids_TK[0].tolist() == [70, 3]
        assert result.logp_TK[0, 0] == result.logp_TK[0, 1]


@settings(deadline=None, max_examples=30)
@given(
    row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=9),
    k=st.integers(1, 5),
    cut=st.integers(0, 5),
)
def test_the_order_is_exact_for_any_float32_logits(row: list[float], k: int, cut: int) -> None:
    """Denormals, both zeros, huge values, repeated values; two shards cut anywhere."""
    logits_TV = torch.tensor([row], dtype=torch.float32)
    for result, _ in run_topk(logits_TV, (0, cut, len(row)), k, vocabulary=len(row)):
        assert result.ids_TK[0].tolist() == oracles.top_ids(logits_TV[0].double().numpy(), k)
