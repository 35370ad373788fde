"""Full-vocabulary divergences of the fused kernel against the float64 oracle, on one to three uneven shards.

Shapes: T tokens (13), V vocabulary (101), W width of one shard, D hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import divergence_oracles, oracles
from tests.collectives import counted_collectives
from tests.ranks import run_on_ranks
from tropd_mcore.errors import ModelError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses

TOKENS, VOCABULARY, HIDDEN = 13, 101, 19
KINDS = {"fkl": 0.5, "rkl": 0.5, "jsd": 0.3}
"""Divergences and their beta."""
LAYOUTS = {
    "tp1": (0, 101),
    "tp1-padded": (0, 112),
    "tp2-uneven": (0, 60, 104),
    "tp3-narrow-shard": (0, 50, 57, 104),
    "tp3-padding-only-shard": (0, 64, 101, 110),
    "tp3-empty-shard": (0, 101, 101, 105),
}
"""Shard borders; columns from the vocabulary on are padding."""


@dataclass(frozen=True)
class Case:
    """Logits of both models over the padded vocabulary, and how they are read."""

    student_TV: Tensor
    teacher_TV: Tensor
    grad_T: Tensor
    borders: tuple[int, ...]
    teacher_borders: tuple[int, ...]
    vocabulary: int = VOCABULARY
    teacher_vocabulary: int = VOCABULARY
    scaling: Scaling = field(default_factory=Scaling)
    chunk_tokens: int = 5
    overlap: bool = False
    grad_logp: float = 0.0
    """Weight of log p of id 3 in the loss, added to the divergence"""


@dataclass(frozen=True)
class RankResult:
    value_T: Tensor
    gradient_TW: Tensor
    calls: Counter[str]


def make_case(layout: str, *, dtype: torch.dtype = torch.float64, scale: float = 4.0, **changed: Any) -> Case:
    """Random rows. The padding holds large numbers that must not be read."""
    random = torch.Generator().manual_seed(5)
    borders = LAYOUTS[layout]

    def logits(vocabulary: int, width: int) -> Tensor:
        real_TV = scale * torch.randn(TOKENS, vocabulary, generator=random, dtype=torch.float64)
        return torch.cat([real_TV, torch.full((TOKENS, width - vocabulary), 90.0)], dim=1).to(dtype)

    teacher_borders = changed.pop("teacher_borders", borders)
    vocabularies = [changed.get(name, VOCABULARY) for name in ("vocabulary", "teacher_vocabulary")]
    return Case(
        student_TV=logits(vocabularies[0], borders[-1]),
        teacher_TV=logits(vocabularies[1], teacher_borders[-1]),
        grad_T=torch.randn(TOKENS, generator=random, dtype=torch.float64),
        borders=borders,
        teacher_borders=teacher_borders,
        **changed,
    )


def dense_on_this_rank(case: Case, kind: str, teacher: LogitSource | None = None) -> RankResult:
    """sum(grad x divergence) through the kernel. The gradient is that of this rank's columns."""
    (start, stop), (teacher_start, teacher_stop) = (
        borders[dist.get_rank() : dist.get_rank() + 2] for borders in (case.borders, case.teacher_borders)
    )
    group = dist.group.WORLD
    assert group is not None
    kernel = Kernel(
        shard=VocabShard(start, stop, case.vocabulary),
        group=group,
        backend=EagerBackend(),
        scaling=case.scaling,
        chunk_tokens=case.chunk_tokens,
        overlap=case.overlap,
    )
    dense = FullVocabulary(
        teacher or GivenLogits(case.teacher_TV[:, teacher_start:teacher_stop]),
        kernel,
        teacher_shard=VocabShard(teacher_start, teacher_stop, case.teacher_vocabulary),
        divergence=kind,
        beta=KINDS[kind],
    )

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        assert divergence_C is not None
        loss_C = case.grad_T[rows].to(divergence_C.dtype) * divergence_C + case.grad_logp * logp_CJ.sum(dim=1)
        return TokenLosses(loss_C, torch.ones(len(logp_CJ), dtype=torch.bool), {"divergence": divergence_C.detach()})

    logits_TW = case.student_TV[:, start:stop].clone().requires_grad_(True)
    ids_TJ = torch.full((TOKENS, 1), 3)
    with counted_collectives() as calls:
        # An identity output layer: dH is the gradient of the logits, in its own buffer.
        source = GivenLogits(logits_TW * 1.0) if not case.overlap else _identity_layer(logits_TW)
        output = support_loss(
            source,
            ids_TJ,
            token_loss,
            kernel,
            unique_run_lengths=(1,),
            full_vocab_term=dense,
            reduce_hidden_gradient=False,
        )
        forward_calls = Counter(calls)
        output.loss_sum.backward()
    assert logits_TW.grad is not None and calls == forward_calls
    return RankResult(output.columns["divergence"], logits_TW.grad, forward_calls)


def _identity_layer(logits_TW: Tensor) -> OutputLayer:
    return OutputLayer(logits_TW, torch.eye(logits_TW.shape[1], dtype=logits_TW.dtype))


def all_kinds_on_this_rank(case: Case) -> dict[str, RankResult]:
    return {kind: dense_on_this_rank(case, kind) for kind in KINDS}


def run(case: Case) -> list[dict[str, RankResult]]:
    return run_on_ranks(all_kinds_on_this_rank, len(case.borders) - 1, case)


def assert_equals_the_oracle(
    case: Case, results: list[dict[str, RankResult]], tolerance: float, rounding: float = 0.0
) -> None:
    """Values of every rank and the joined gradients. `rounding` is the relative step of the gradient's dtype."""
    common = min(case.vocabulary, case.teacher_vocabulary)
    for kind, beta in KINDS.items():
        gradient_TV = torch.cat([result[kind].gradient_TW for result in results], dim=1).double().numpy()
        for token in range(TOKENS):
            scaled, slope = scale_row(case.student_TV[token, :common].double().numpy(), case.scaling)
            log_p = oracles.log_softmax(scaled)
            untempered = Scaling(softcap=case.scaling.softcap)
            log_q = oracles.log_softmax(scale_row(case.teacher_TV[token, :common].double().numpy(), untempered)[0])
            value = divergence_oracles.exact(kind, log_q, log_p, beta)
            gradient = divergence_oracles.exact_gradient(kind, log_q, log_p, beta) * slope
            for result in results:
                assert abs(float(result[kind].value_T[token]) - value) <= tolerance * max(1.0, value)
            expected = np.zeros(case.borders[-1])
            expected[:common] = float(case.grad_T[token]) * gradient
            np.testing.assert_allclose(gradient_TV[token], expected, rtol=rounding, atol=tolerance)


def scale_row(z: oracles.Array, scaling: Scaling) -> tuple[oracles.Array, oracles.Array]:
    """z' = softcap tanh(z / softcap) / temperature and dz' / dz."""
    slope = np.ones_like(z)
    if scaling.softcap is not None:
        capped = scaling.softcap * np.tanh(z / scaling.softcap)
        z, slope = capped, 1.0 - (capped / scaling.softcap) ** 2
    return z / scaling.temperature, slope / scaling.temperature


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_vocabulary_divergences_and_gradients_equal_the_oracle(layout: str) -> None:
    case = make_case(layout, scaling=Scaling(temperature=0.7, softcap=9.0))
    assert_equals_the_oracle(case, run(case), 1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 0.0), (torch.bfloat16, 2.0**-8)])
def test_narrow_logits_are_read_in_float32_and_the_gradient_is_rounded_once(
    dtype: torch.dtype, rounding: float
) -> None:
    case = make_case("tp3-narrow-shard", dtype=dtype)
    results = run(case)
    assert all(result[kind].value_T.dtype == torch.float32 for result in results for kind in KINDS)
    assert all(result[kind].gradient_TW.dtype == dtype for result in results for kind in KINDS)
    assert_equals_the_oracle(case, results, 1e-5, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_value_and_gradient_are_exactly_zero_if_the_student_equals_its_teacher(dtype: torch.dtype) -> None:
    case = make_case("tp2-uneven", dtype=dtype)
    case = replace(case, teacher_TV=case.student_TV)
    for result in run(case):
        for kind in KINDS:
            assert not result[kind].value_T.any() and not result[kind].gradient_TW.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions_far_apart_stay_finite_and_exact(dtype: torch.dtype) -> None:
    """Most probabilities of one model are 0 in float32 where the other's are large. A log-prob has steps of 3e-5."""
    case = make_case("tp3-narrow-shard", dtype=dtype, scale=60.0)
    results = run(case)
    assert max(float(result["fkl"].value_T.max()) for result in results) > 100
    assert_equals_the_oracle(case, results, 1e-11 if dtype == torch.float64 else 3e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher_vocabulary": 107},
        {"teacher_vocabulary": 93},
        {"teacher_vocabulary": 107, "teacher_borders": (0, 128)},
        {"teacher_vocabulary": 93, "teacher_borders": (0, 96)},
    ],
    ids=str,
)
def test_ids_that_only_one_vocabulary_has_are_left_out(changed: dict[str, Any]) -> None:
    """They enter neither the value nor the normalisation, and their gradient is 0."""
    case = make_case("tp1-padded", **changed)
    assert_equals_the_oracle(case, run(case), 1e-12)


def test_ids_that_only_one_vocabulary_has_are_left_out_on_shards_too() -> None:
    for vocabulary in (98, 70, 55):
        case = make_case("tp3-narrow-shard", teacher_vocabulary=vocabulary)
        assert_equals_the_oracle(case, run(case), 1e-12)


def test_a_teacher_with_other_shard_borders_is_an_error_that_names_both_ranges() -> None:
    case = make_case("tp2-uneven", teacher_borders=(0, 64, 108))
    with pytest.raises(ModelError, match=r"found \[(0, 60\) and \[0, 64|60, 104\) and \[64, 108)\) of 101"):
        run(case)


@pytest.mark.parametrize("layout", ["tp2-uneven", "tp3-padding-only-shard"])
def test_the_value_is_bit_identical_on_all_ranks(layout: str) -> None:
    first, *others = run(make_case(layout, dtype=torch.float32))
    for other in others:
        assert all(torch.equal(first[kind].value_T, other[kind].value_T) for kind in KINDS)


@pytest.mark.parametrize(("chunk_tokens", "chunks"), [(1, 13), (8, 2), (1000, 1)])
def test_each_chunk_runs_one_all_reduce_and_two_for_the_jsd(chunk_tokens: int, chunks: int) -> None:
    for result in run(make_case("tp2-uneven", chunk_tokens=chunk_tokens)):
        assert {kind: result[kind].calls["all_reduce"] for kind in KINDS} == {
            "fkl": chunks,
            "rkl": chunks,
            "jsd": 2 * chunks,
        }
        assert all(result[kind].calls.keys() == {"all_reduce"} for kind in KINDS)


def test_chunk_size_and_overlap_do_not_change_a_bit() -> None:
    whole = run(make_case("tp2-uneven", dtype=torch.float32, chunk_tokens=1000))
    for changed in ({"chunk_tokens": 3}, {"chunk_tokens": 3, "overlap": True}, {"chunk_tokens": 6, "overlap": True}):
        for result, expected in zip(run(make_case("tp2-uneven", dtype=torch.float32, **changed)), whole, strict=True):
            for kind in KINDS:
                assert torch.equal(result[kind].value_T, expected[kind].value_T)
                assert torch.equal(result[kind].gradient_TW, expected[kind].gradient_TW)


def test_the_divergence_adds_to_the_gradient_of_the_support() -> None:
    case = make_case("tp2-uneven")
    alone, both = run(case), run(replace(case, grad_logp=0.4))
    for kind in KINDS:
        added_TV = torch.cat([result[kind].gradient_TW for result in both], dim=1) - torch.cat(
            [result[kind].gradient_TW for result in alone], dim=1
        )
        p_TV = case.student_TV[:, :VOCABULARY].softmax(dim=1)
        expected_TV = -0.4 * p_TV
        expected_TV[:, 3] += 0.4
        torch.testing.assert_close(added_TV[:, :VOCABULARY], expected_TV, rtol=0, atol=1e-14)


def _teacher_head_on_this_rank(case: Case, hidden_TD: Tensor, weight_VD: Tensor) -> dict[str, RankResult]:
    """The teacher as hidden states and its rows of the output layer, frozen or not."""
    start, stop = case.teacher_borders[dist.get_rank() : dist.get_rank() + 2]
    hidden_TD, weight_WD = hidden_TD.requires_grad_(True), weight_VD[start:stop].clone().requires_grad_(True)
    results = {kind: dense_on_this_rank(case, kind, OutputLayer(hidden_TD, weight_WD)) for kind in KINDS}
    assert hidden_TD.grad is None and weight_WD.grad is None
    return results


@pytest.mark.parametrize("overlap", [False, True])
def test_a_teacher_given_as_an_output_layer_equals_one_given_as_logits(overlap: bool) -> None:
    random = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=random, dtype=torch.float64)
    weight_VD = torch.randn(104, HIDDEN, generator=random, dtype=torch.float64)
    case = replace(make_case("tp2-uneven", overlap=overlap), teacher_TV=hidden_TD @ weight_VD.t())
    results = run_on_ranks(_teacher_head_on_this_rank, 2, case, hidden_TD, weight_VD)
    assert_equals_the_oracle(case, results, 1e-12)


def test_the_gradient_pass_is_skipped_if_no_gradient_is_needed() -> None:
    for values in run_on_ranks(_values_without_gradient, 2, make_case("tp2-uneven")):
        for kind, value_T in values.items():
            assert value_T.isfinite().all(), kind


def _values_without_gradient(case: Case) -> dict[str, Tensor]:
    start, stop = case.borders[dist.get_rank() : dist.get_rank() + 2]
    group = dist.group.WORLD
    assert group is not None
    kernel = Kernel(VocabShard(start, stop, VOCABULARY), group, EagerBackend(), Scaling(), chunk_tokens=8)

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        assert divergence_C is not None
        return TokenLosses(divergence_C, divergence_C != divergence_C, {"divergence": divergence_C})

    values = {}
    for kind, beta in KINDS.items():
        teacher = GivenLogits(case.teacher_TV[:, start:stop])
        dense = FullVocabulary(teacher, kernel, teacher_shard=kernel.shard, divergence=kind, beta=beta)
        with torch.no_grad():
            output = support_loss(
                GivenLogits(case.student_TV[:, start:stop]),
                torch.full((TOKENS, 1), 3),
                token_loss,
                kernel,
                unique_run_lengths=(1,),
                full_vocab_term=dense,
            )
        values[kind] = output.columns["divergence"]
    return values
