"""The force of each token against a float64 loop over the vocabulary, on one to three uneven shards.

Shapes: T tokens, V vocabulary (101) with padding, J support ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import divergence_oracles, oracles
from tests.collectives import counted_collectives
from tests.dist.kernel_cases import (
    DISTINCT,
    FORMS,
    LAYOUTS,
    VOCABULARY,
    Case,
    RankResult,
    kernel,
    make_case,
    run_case,
    run_cases,
    token_loss,
)
from tests.mutants import real_losses
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.kernel.source import GivenLogits, OutputLayer
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def force_of(result: RankResult) -> Tensor:
    assert result.force_T is not None
    return result.force_T


def oracle(case: Case) -> np.ndarray:
    """By the equations: dL/dz'_v of every v, then the sum of |.| with all v outside the support as one."""
    logits = case.hidden_TD.numpy() @ case.weight_VD.numpy()[:VOCABULARY].T
    if case.softcap is not None:
        logits = case.softcap * np.tanh(logits / case.softcap)
    found = []
    numbers = (number.numpy() for number in (case.ids_TJ, case.a_TJ, case.b_TJ, case.c_T))
    for z, ids, a, b, c in zip(logits, *numbers, strict=True):
        logp = oracles.log_softmax(z / case.temperature)
        p = np.exp(logp)
        entropy = -(p * logp).sum()
        gradient = -c * p * (logp + entropy)
        for slot, v in enumerate(ids):
            if v >= 0:
                push = a[slot] + b[slot] * p[v]
                gradient -= push * p
                gradient[v] += push
        inside = sorted({int(v) for v in ids if v >= 0})
        outside = [v for v in range(VOCABULARY) if v not in inside]
        found.append(np.abs(gradient[inside]).sum() + abs(gradient[outside].sum()))
    return np.array(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_force_equals_a_loop_over_the_vocabulary_in_every_form(layout: str, dtype: torch.dtype) -> None:
    """With ids in several slots, unused slots, an entropy term, temperature 0.7, with and without softcap."""
    measured = [{**changes, "softcap": cap, "measure_force": True} for changes in FORMS.values() for cap in (None, 5.0)]
    cases = [make_case(layout, dtype, **changes) for changes in measured]
    for results, case in zip(run_cases(cases), cases, strict=True):
        expected = oracle(case)
        for result in results:
            assert np.abs(force_of(result).double().numpy() - expected).max() <= TOLERANCE[dtype] * expected.max()
            calls = {"all_reduce": 5} if len(case.borders) > 2 else {}
            assert result.forward_calls == calls, "the measure adds a collective"


def test_without_an_entropy_term_the_force_is_the_norm_over_the_whole_vocabulary() -> None:
    case = make_case("tp2-uneven", temperature=1.0, measure_force=True)
    case = replace(case, c_T=torch.zeros_like(case.c_T))
    force = force_of(run_case(case)[0])
    logits_TV = (case.hidden_TD @ case.weight_VD[:VOCABULARY].t()).requires_grad_(True)
    logp_TV = logits_TV.log_softmax(1)
    used_TJ = case.ids_TJ >= 0
    logp_TJ = logp_TV.gather(1, case.ids_TJ.clamp_min(0))
    ((case.a_TJ * logp_TJ + case.b_TJ * logp_TJ.exp()) * used_TJ).sum().backward()
    assert logits_TV.grad is not None
    torch.testing.assert_close(force, logits_TV.grad.abs().sum(1), rtol=1e-11, atol=1e-11)


def test_the_measure_changes_no_bit_of_the_gradient_and_zero_rows_are_accepted() -> None:
    fused = [changes for changes in FORMS.values() if changes["form"] == "fused"]
    cases = [make_case("tp2-uneven", torch.float32, **changes) for changes in fused]
    empty = [make_case("tp2-uneven", tokens=0, measure_force=True, **changes) for changes in FORMS.values()]
    for first, _ in run_cases(empty):
        assert force_of(first).shape == (0,)
    measured = run_cases([replace(case, measure_force=True) for case in cases])
    for (plain, _), (first, _) in zip(run_cases(cases), measured, strict=True):
        assert plain.hidden_gradient_TD is not None and first.hidden_gradient_TD is not None
        assert torch.equal(plain.hidden_gradient_TD, first.hidden_gradient_TD)


def test_without_gradients_the_force_is_unknown() -> None:
    assert all(force.isnan().all() for force in run_on_ranks(_without_gradients, 1, make_case("tp1"))[0])


def _without_gradients(case: Case) -> list[Tensor]:
    losses, found = real_losses(), []
    for source in (OutputLayer(case.hidden_TD, case.weight_VD), GivenLogits(case.hidden_TD @ case.weight_VD.t())):
        with torch.no_grad():
            output = support_loss(
                source,
                case.ids_TJ,
                token_loss(case, losses),
                kernel(case, losses),
                unique_run_lengths=DISTINCT,
                measure_force=True,
            )
        found.append(output.columns["force"])
    return found


DENSE = {"fkl": 0.5, "rkl": 0.5, "jsd": 0.3}


def _dense_on_this_rank(case: Case, teacher_TV: Tensor) -> dict[str, tuple[Tensor, Any]]:
    start, stop = case.borders[dist.get_rank()], case.borders[dist.get_rank() + 1]
    losses, found = real_losses(), {}
    for kind, beta in DENSE.items():
        its = kernel(case, losses)
        term = FullVocabulary(
            GivenLogits(teacher_TV[:, start:stop].contiguous()),
            its,
            teacher_shard=its.shard,
            divergence=kind,
            beta=beta,
        )

        def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
            assert divergence_C is not None
            loss_C = case.c_T[rows] * divergence_C + case.a_TJ[rows, 0] * logp_CJ[:, 0]
            return TokenLosses(loss_C, torch.ones(len(logp_CJ), dtype=torch.bool), {})

        hidden_TD = case.hidden_TD.clone().requires_grad_(True)
        with counted_collectives() as calls:
            output = support_loss(
                OutputLayer(hidden_TD, case.weight_VD[start:stop].clone()),
                case.ids_TJ,
                loss,
                its,
                unique_run_lengths=DISTINCT,
                full_vocab_term=term,
                measure_force=True,
            )
        found[kind] = output.columns["force"], calls
    return found


@pytest.mark.parametrize("layout", ["tp1-padded", "tp3-support-wider-than-shard", "tp3-empty-shard"])
def test_the_force_of_a_divergence_over_the_vocabulary_equals_a_loop_and_costs_an_all_reduce_per_chunk(
    layout: str,
) -> None:
    case = make_case(layout, temperature=1.0)
    teacher_TV = 2.0 * torch.randn(len(case.c_T), case.borders[-1], dtype=torch.float64, generator=_seeded())
    for result in run_on_ranks(_dense_on_this_rank, len(case.borders) - 1, case, teacher_TV):
        for kind, beta in DENSE.items():
            force, calls = result[kind]
            ranks = len(case.borders) - 1
            assert calls == ({"all_reduce": (3 if kind == "jsd" else 2) * 5} if ranks > 1 else {})
            for token, ids in enumerate(case.ids_TJ.tolist()):
                logp = oracles.log_softmax((case.hidden_TD[token] @ case.weight_VD[:VOCABULARY].t()).numpy())
                logq = oracles.log_softmax(teacher_TV[token, :VOCABULARY].numpy())
                dense = divergence_oracles.exact_gradient(kind, logq, logp, beta)
                gradient = float(case.c_T[token]) * dense - float(case.a_TJ[token, 0]) * np.exp(logp)
                gradient[ids[0]] += float(case.a_TJ[token, 0])
                inside = sorted({v for v in ids if v >= 0})
                expected = np.abs(gradient[inside]).sum() + abs(np.delete(gradient, inside).sum())
                assert float(force[token]) == pytest.approx(expected, rel=1e-10), (kind, token)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(23)
