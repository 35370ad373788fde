"""The loss with a gradient computed chunk by chunk, against the float64 oracle, on one, two and three uneven shards.

Shapes as in `kernel_cases`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.allocations import traced_allocations
from tests.dist.kernel_cases import (
    DISTINCT,
    FORMS,
    HIDDEN,
    LAYOUTS,
    VOCABULARY,
    Case,
    assert_close,
    assert_equals_the_oracle,
    kernel,
    make_case,
    oracle,
    results_on_this_rank,
    run_case,
    run_cases,
    token_loss,
    whole_weight_gradient,
)
from tests.mutants import real_losses
from tests.ranks import run_on_ranks
from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import BLOCK_ELEMENTS, EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, OutputLayer
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest error, relative to the largest entry."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_equal_the_oracle_in_every_form_and_mode(layout: str, dtype: torch.dtype) -> None:
    """With temperature 0.7, with and without softcap, 37 tokens in chunks of 8, entries in up to three runs."""
    cases = [
        make_case(layout, dtype, **changes, softcap=softcap) for changes in FORMS.values() for softcap in (None, 5.0)
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert all(result.loss.dtype == dtype for result in results)
        assert_equals_the_oracle(results, case, DTYPES[dtype])


def test_the_loss_equals_the_oracle_at_any_chunk_size_and_temperature() -> None:
    cases = [
        make_case("tp2-uneven", chunk_tokens=chunk_tokens, temperature=temperature, **FORMS[form])
        for form in FORMS
        for chunk_tokens, temperature in ((1, 1.0), (36, 1.0), (1000, 2.5))
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert_equals_the_oracle(results, case, 1e-12)


def test_overlap_does_not_change_a_bit() -> None:
    """Two alternating logits buffers. A gradient from the wrong one would be detected."""
    cases = [
        make_case("tp2-uneven", dtype, **changes)
        for dtype in (torch.float32, torch.bfloat16)
        for changes in FORMS.values()
    ]
    found = run_cases(cases + [replace(case, overlap=True) for case in cases])
    for one, other in zip(found[: len(cases)], found[len(cases) :], strict=True):
        for result, overlapped in zip(one, other, strict=True):
            _assert_same_bits(result, overlapped)


@pytest.mark.parametrize("layout", ["tp2-uneven", "tp3-padding-only-shard"])
def test_all_ranks_and_a_second_run_give_the_same_bits(layout: str) -> None:
    cases = [make_case(layout, torch.bfloat16, **changes) for changes in FORMS.values()]
    found = run_cases(cases + cases)
    for results, again in zip(found[: len(cases)], found[len(cases) :], strict=True):
        for result, second in zip(results, again, strict=True):
            _assert_same_bits(result, second)
            assert torch.equal(result.loss, results[0].loss) and torch.equal(result.row_TX, results[0].row_TX)


def _assert_same_bits(one: Any, other: Any) -> None:
    for name, number in vars(one).items():
        same = torch.equal(number, getattr(other, name)) if isinstance(number, Tensor) else True
        assert same, f"{name} differs"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("chunk_tokens", "chunks"), [(8, 5), (37, 1), (1000, 1)])
def test_the_forward_runs_one_all_reduce_per_chunk_and_the_backward_one_for_the_hidden_gradient(
    overlap: bool, chunk_tokens: int, chunks: int
) -> None:
    cases = [make_case("tp2-uneven", chunk_tokens=chunk_tokens, overlap=overlap, **FORMS[form]) for form in FORMS]
    for case, results in zip(cases, run_cases(cases), strict=True):
        for result in results:
            assert result.forward_calls == {"all_reduce": chunks}
            assert result.backward_calls == ({"all_reduce": 1} if case.form == "fused" else {})


def test_without_its_reduction_the_hidden_gradient_is_a_part_that_the_caller_sums() -> None:
    cases = [
        make_case("tp2-uneven", reduce_hidden_gradient=False, **FORMS[form])
        for form in ("fused, deferred", "fused, recompute")
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert all(result.backward_calls == {} for result in results)
        parts = [result.hidden_gradient_TD for result in results if result.hidden_gradient_TD is not None]
        assert_close(torch.stack(parts).sum(0), oracle(case).hidden_gradient_TD, 1e-12)


def test_zero_rows_are_accepted_on_all_ranks() -> None:
    for form in FORMS:
        for result in run_case(make_case("tp2-uneven", tokens=0, **FORMS[form])):
            assert float(result.loss) == 0.0 and result.forward_calls == {}
            assert result.hidden_gradient_TD is not None and result.hidden_gradient_TD.shape == (0, HIDDEN)
            assert result.weight_gradient_WD is not None
            assert torch.equal(
                result.weight_gradient_WD, torch.full_like(result.weight_gradient_WD, float("folded" in form))
            )


def test_an_id_outside_the_vocabulary_makes_the_loss_nan() -> None:
    case = make_case("tp2-uneven")
    case.ids_TJ[3, 2] = VOCABULARY + 1
    for result in run_case(case):
        assert result.loss.isnan()
        assert result.row_TX.isnan().nonzero().tolist() == [[3, 2]]


def test_frozen_inputs_get_no_gradient() -> None:
    cases = [
        make_case("tp2-uneven", frozen=frozen, **{**FORMS[form], "with_main_grad": True})
        for form in FORMS
        if FORMS[form]["form"] == "fused"
        for frozen in (("hidden",), ("weight",), ("hidden", "weight"))
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert_equals_the_oracle(results, case, 1e-12)
        for result in results:
            assert (result.hidden_gradient_TD is None) == ("hidden" in case.frozen)
            if "weight" in case.frozen:
                main_grad = result.weight_gradient_WD
                assert main_grad is not None and torch.equal(main_grad, torch.ones_like(main_grad))


def _without_autograd(case: Case) -> list[Any]:
    with torch.no_grad():
        return results_on_this_rank([case])


def test_without_autograd_the_value_is_computed_and_main_grad_is_not_touched() -> None:
    for form in FORMS:
        case = make_case("tp2-uneven", **{**FORMS[form], "with_main_grad": True})
        for (result,) in run_on_ranks(_without_autograd, 2, case):
            assert not result.loss.requires_grad
            assert_close(result.loss, oracle(case).loss, 1e-11)
            assert torch.equal(result.weight_gradient_WD, torch.ones_like(result.weight_gradient_WD))


def test_the_gradient_is_added_to_main_grad_in_float32() -> None:
    """float32 parameters within the tolerance of float32. With bfloat16 ones, dz is rounded once and the sum is not."""
    forms = ("fused, deferred", "fused, folded", "fused, recompute")
    cases = [
        make_case("tp2-uneven", dtype, **{**FORMS[form], "with_main_grad": True})
        for form in forms
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert all(
            result.weight_gradient_WD is not None and result.weight_gradient_WD.dtype == torch.float32
            for result in results
        )
        expected = oracle(case).weight_gradient_VD
        assert_close(whole_weight_gradient(results, case), expected, 1e-5 if case.dtype == torch.float32 else 2.0**-8)


def _tied_weight(case: Case) -> tuple[Tensor, Tensor]:
    """(main_grad, .grad) of a weight that is also the embedding; Megatron's hook adds the second to the first."""
    start, stop = case.borders[dist.get_rank()], case.borders[dist.get_rank() + 1]
    weight_WD = case.weight_VD[start:stop].clone().requires_grad_()
    weight_WD.main_grad = torch.zeros_like(weight_WD, requires_grad=False)  # type: ignore[attr-defined]
    weight_WD.zero_out_wgrad = True  # type: ignore[attr-defined]
    hidden_TD = case.hidden_TD + weight_WD[:1].sum(dim=0)
    losses = real_losses()
    output = support_loss(
        OutputLayer(hidden_TD, weight_WD),
        case.ids_TJ,
        token_loss(case, losses),
        kernel(case, losses),
        unique_run_lengths=DISTINCT,
        weight_gradient=case.mode,  # type: ignore[arg-type]
        reduce_hidden_gradient=False,
    )
    output.loss_sum.backward()
    assert weight_WD.grad is not None and weight_WD.grad_added_to_main_grad  # type: ignore[attr-defined]
    return weight_WD.main_grad, weight_WD.grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["deferred", "folded", "recompute"])
def test_a_tied_weight_keeps_its_embedding_gradient_separate_from_main_grad(mode: str) -> None:
    case = make_case("tp1", mode=mode, factor=1.0)
    ((main_grad, grad),) = run_on_ranks(_tied_weight, 1, case)
    expected = oracle(replace(case, hidden_TD=case.hidden_TD + case.weight_VD[0]))
    assert_close(main_grad, expected.weight_gradient_VD, 1e-12)
    embedding = np.zeros_like(expected.weight_gradient_VD)
    embedding[0] = expected.hidden_gradient_TD.sum(axis=0)
    assert_close(grad, embedding, 1e-12)


def test_a_folded_gradient_raises_if_the_loss_was_scaled() -> None:
    for with_main_grad in (True, False):
        case = make_case("tp1", **{**FORMS["fused, folded"], "factor": 2.0, "with_main_grad": with_main_grad})
        with pytest.raises(RuntimeError, match="weight_gradient=folded: the loss was scaled"):
            run_case(case)


def _constant_loss(case: Case, form: str) -> tuple[Tensor, Tensor]:
    hidden_TD, weight_WD = case.hidden_TD.clone().requires_grad_(), case.weight_VD.clone().requires_grad_()
    source = OutputLayer(hidden_TD, weight_WD) if form == "fused" else GivenLogits(hidden_TD @ weight_WD.t())
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        return TokenLosses(torch.ones(len(logp_CJ), dtype=torch.float64), torch.ones(len(logp_CJ), dtype=torch.bool))

    output = support_loss(source, case.ids_TJ, loss, kernel(case, real_losses()), unique_run_lengths=DISTINCT)
    (output.loss_sum * scale).backward()
    zero = torch.zeros(())
    return tuple(zero if number.grad is None else number.grad for number in (hidden_TD, weight_WD))  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["fused", "logits"])
def test_a_loss_that_depends_on_no_log_prob_has_gradient_zero(form: str) -> None:
    for gradients in run_on_ranks(_constant_loss, 1, make_case("tp1"), form):
        assert not any(gradient.any() for gradient in gradients)


def _backward_twice(case: Case) -> None:
    weight_WD = case.weight_VD.clone().requires_grad_()
    losses = real_losses()
    source = OutputLayer(case.hidden_TD, weight_WD)
    output = support_loss(
        source, case.ids_TJ, token_loss(case, losses), kernel(case, losses), unique_run_lengths=DISTINCT
    )
    output.loss_sum.backward(retain_graph=True)
    output.loss_sum.backward()


def test_a_second_backward_pass_is_refused() -> None:
    with pytest.raises(LossInputError, match="second backward pass"):
        run_on_ranks(_backward_twice, 1, make_case("tp1"))


# ---- memory ----

WIDE, ROWS, CHUNK, SLOTS = 8192, 384, 96, 9
"""A block is 64 rows of this width, less than a chunk."""


def _peak_bytes(form: str, mode: str, chunk_tokens: int, dtype: torch.dtype) -> int:
    """Most bytes alive at once, besides hidden states, weight and given logits."""
    random = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(ROWS, 8, generator=random).to(dtype).requires_grad_()
    weight_WD = torch.randn(WIDE, 8, generator=random).to(dtype).requires_grad_()
    source: Any = OutputLayer(hidden_TD, weight_WD) if form == "fused" else GivenLogits(hidden_TD @ weight_WD.t())
    ids_TJ = torch.randint(WIDE, (ROWS, SLOTS), generator=random)

    def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        return TokenLosses(logp_CJ.exp().sum(dim=1) + entropy_C, torch.ones(len(logp_CJ), dtype=torch.bool))

    assert dist.group.WORLD is not None
    chunked = Kernel(VocabShard(0, WIDE, WIDE), dist.group.WORLD, EagerBackend(), Scaling(0.9, 30.0), chunk_tokens)
    with traced_allocations() as allocated:
        output = support_loss(source, ids_TJ, loss, chunked, unique_run_lengths=(1,) * SLOTS, weight_gradient=mode)  # type: ignore[arg-type]
        if form == "fused":
            output.loss_sum.backward()
        else:
            torch.autograd.grad(output.loss_sum, source.logits_TW)
    return allocated.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "mode", "chunk_tokens", "chunk_logits", "dtype"),
    [
        ("fused", "deferred", CHUNK, 1, torch.float32),
        ("fused", "recompute", CHUNK, 1, torch.float32),
        ("logits", "deferred", ROWS, 0, torch.float32),
        ("logits", "deferred", ROWS, 0, torch.bfloat16),
        ("fused", "deferred", CHUNK, 1, torch.bfloat16),  # the gradient lies over the float32 logits of its chunk
    ],
)
def test_peak_memory_is_the_logits_of_one_chunk_and_three_blocks(
    form: str, mode: str, chunk_tokens: int, chunk_logits: int, dtype: torch.dtype
) -> None:
    """Besides a few times the gradients of weight and hidden states, and some tens of numbers per token and slot.

    Given logits are one chunk here. The bound would not allow even one copy of them.
    """
    (peak,) = run_on_ranks(_peak_bytes, 1, form, mode, chunk_tokens, dtype)
    small = 4 * (3 * WIDE * 8 + 3 * ROWS * 8 + 40 * ROWS * SLOTS)
    bound = chunk_logits * CHUNK * WIDE * 4 + 3 * BLOCK_ELEMENTS * 4 + small
    assert peak <= bound, f"{peak} bytes > {bound}"
