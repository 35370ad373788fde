"""The oracle of `tropd conformance` is right: golden values, exact expectations, and independence of what it checks."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

import tropd_mcore.conformance.oracle as oracle_package
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.conformance.batch import CaseBatch, Student, Tokens
from tropd_mcore.conformance.cases import Conditions, make_batch
from tropd_mcore.conformance.cells import plan_ours, plan_peer
from tropd_mcore.conformance.entries import BY_NAME, ENTRIES
from tropd_mcore.conformance.matrix import LEAST_MARGIN
from tropd_mcore.conformance.oracle.truth import Truth, evaluate

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tropd_vector.json").read_text())
LOG_P, LOG_Q = (
    torch.tensor(GOLDEN[f"{side}_logits"], dtype=torch.float64).log_softmax(0) for side in ("student", "teacher")
)
V = len(LOG_P)
K = GOLDEN["topk"]
IDS = torch.tensor(GOLDEN["teacher_topk_ids"])


def golden_batch(x_T: Tensor, weight_T: Tensor, **changes: Tensor) -> CaseBatch:
    """The golden state once for each x. None of them is sampled by the teacher."""
    tokens = len(x_T)
    nothing_T = torch.zeros(tokens, dtype=torch.float64)
    numbers = Tokens(
        target_ids_T=x_T,
        topk_ids_TK=IDS.expand(tokens, K),
        own_ids_TL=torch.arange(V).expand(tokens, V),
        teacher_logp_T=LOG_Q[x_T],
        teacher_topk_logp_TK=LOG_Q[IDS].expand(tokens, K),
        teacher_own_logp_TL=LOG_Q.expand(tokens, V),
        teacher_entropy_T=nothing_T + GOLDEN["teacher_entropy"],
        reference_logp_T=nothing_T - math.log(V),
        old_logp_T=LOG_P[x_T],
        old_own_logp_TL=LOG_P.expand(tokens, V),
        old_entropy_T=nothing_T,
        rollout_logp_T=LOG_P[x_T],
        trust_u_T=nothing_T + 0.5,
        student_mask_T=torch.ones(tokens, dtype=torch.bool),
        prefix_mask_T=torch.zeros(tokens, dtype=torch.bool),
        weight_T=weight_T,
        sample_T=torch.zeros(tokens, dtype=torch.int64),
    )

    def layer(log_probs_V: Tensor) -> Student:
        return Student(nothing_T[:, None], torch.zeros(V, 1, dtype=torch.float64), log_probs_V.expand(tokens, V))

    return CaseBatch(
        student=layer(LOG_P),
        teacher=layer(LOG_Q),
        vocab_size=V,
        temperature=1.0,
        softcap=None,
        tokens=replace(numbers, **changes),
        group_S=torch.zeros(1, dtype=torch.int64),
        reward_S=torch.ones(1, dtype=torch.float64),
    )


def truth_of(keys: dict[str, Any], batch: CaseBatch) -> Truth:
    objective = TypeAdapter[ObjectiveConfig](ObjectiveConfig).validate_python(keys)
    return evaluate(objective, batch, 0.0, "logits")


def one(keys: dict[str, Any], x: int = 0) -> Truth:
    return truth_of(keys, golden_batch(torch.tensor([x]), torch.ones(1, dtype=torch.float64)))


def expected_gradient(keys: dict[str, Any]) -> Tensor:
    """Over x ~ p, exactly: every x once, weighted by its probability."""
    return truth_of(keys, golden_batch(torch.arange(V), LOG_P.exp())).logits_TV.sum(dim=0)


def assert_golden(found: Tensor, golden: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(golden, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_oracle_imports_nothing_that_it_checks() -> None:
    folder = Path(oracle_package.__file__).parent
    allowed = ("tropd_mcore.config", "tropd_mcore.conformance.oracle", "tropd_mcore.conformance.batch")
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("tropd_mcore") or name.startswith(allowed), f"{path.name} imports {name}"


def test_the_catalogue_has_every_kind_of_objective() -> None:
    union = get_args(ObjectiveConfig)[0]
    assert {entry.objective.kind for entry in ENTRIES} == {
        member.model_fields["kind"].default for member in get_args(union)
    }


@pytest.mark.parametrize("norm", ["truncated", "tail", "renorm"])
def test_the_oracles_forward_kl_equals_the_golden_values(norm: str) -> None:
    truth = one({"kind": "gkd", "norm": norm, "topk": K})
    assert truth.loss == pytest.approx(GOLDEN["forward_kl_topk"][norm], abs=1e-9)
    assert_golden(truth.logits_TV[0], GOLDEN["forward_kl_topk_gradient"][norm])


def test_the_oracles_full_vocabulary_divergences_equal_the_golden_values() -> None:
    reverse = one({"kind": "gkd", "divergence": "rkl", "full_vocabulary": True})
    assert reverse.loss == pytest.approx(GOLDEN["reverse_kl"], abs=1e-9)
    assert_golden(reverse.logits_TV[0], GOLDEN["reverse_kl_gradient"])
    assert one({"kind": "gkd", "full_vocabulary": True}).loss == pytest.approx(GOLDEN["forward_kl"], abs=1e-9)


def test_the_oracles_local_support_matching_equals_the_golden_values() -> None:
    truth = one({"kind": "lsm", "topk": K})
    assert truth.loss == pytest.approx(0.9394879017, abs=1e-9)
    assert_golden(truth.logits_TV[0], [0.638140, -0.499427, 0, -0.138714, 0, 0, 0, 0])


def test_the_oracles_expected_gradient_of_opd_is_that_of_the_reverse_kl() -> None:
    assert_golden(expected_gradient({"kind": "opd"}), GOLDEN["reverse_kl_gradient"])


def test_all_ratios_have_the_same_expected_gradient_if_the_policy_has_not_moved() -> None:
    for ratio in ("importance", "ppo_clip"):
        found = expected_gradient({"kind": "opd", "policy_gradient": {"ratio": ratio}})
        assert_golden(found, GOLDEN["reverse_kl_gradient"])


@pytest.mark.parametrize(("outlier", "name"), [("fkl_direct", "fkl_direct"), ("fkl_scalar", "fkl_scalar")])
def test_the_oracles_expected_gradient_of_tropd_equals_the_golden_one(outlier: str, name: str) -> None:
    keys = {"kind": "tropd", "trust": {"mode": "soft"}, "outlier": {"mode": outlier, "topk": K}}
    assert_golden(expected_gradient(keys), GOLDEN["expected_gradient"][name])


def test_the_mean_gradient_of_the_bernoulli_gate_equals_that_of_the_soft_gate() -> None:
    draws = 501
    u_T = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    x_T = torch.full((draws,), 5)
    batch = golden_batch(x_T, torch.full((draws,), 1.0 / draws, dtype=torch.float64), trust_u_T=u_T)
    keys = {"kind": "tropd", "outlier": {"topk": K}}
    soft = truth_of({**keys, "trust": {"mode": "soft"}}, batch)
    torch.testing.assert_close(truth_of(keys, batch).logits_TV.sum(0), soft.logits_TV.sum(0), rtol=0, atol=2.0 / draws)


@pytest.mark.parametrize("loss", ["nll", "scalar_adv"])
def test_the_oracles_prefix_losses_have_the_golden_gradient(loss: str) -> None:
    keys = {"kind": "tropd", "guidance": {"loss": loss, "beta": 1.0}, "outlier": {"topk": K}}
    off = torch.ones(V, dtype=torch.bool)
    batch = golden_batch(torch.arange(V), LOG_Q.exp(), student_mask_T=~off, prefix_mask_T=off)
    assert_golden(truth_of(keys, batch).logits_TV.sum(dim=0), GOLDEN["guidance_gradient"][loss])


REWARDS = {
    "exopd": ({"kind": "exopd", "scale": 1.25}, GOLDEN["exopd_advantage"]),
    "vopd": ({"kind": "vopd", "student_topk": V}, GOLDEN["vopd_advantage"]),
    "topd": (
        {"kind": "topd", "mixing": 0.2, "future_mean": False, "normalise": False},
        GOLDEN["mixed_log_ratio"]["0.2"],
    ),
    "clip": ({"kind": "reopold", "floor": GOLDEN["clip_tau"]}, GOLDEN["clip_advantage"]),
    "mask": ({"kind": "tropd", "outlier": {"mode": "mask", "topk": K}}, GOLDEN["mask_advantage"]),
}


@pytest.mark.parametrize("name", REWARDS)
def test_the_oracles_rewards_give_the_golden_advantages(name: str) -> None:
    """The gradient of -A log p(x) in the logit of x is -A (1 - p(x))."""
    keys, golden = REWARDS[name]
    truth = truth_of(keys, golden_batch(torch.arange(V), torch.ones(V, dtype=torch.float64)))
    advantage = -truth.logits_TV.diagonal() / (1.0 - LOG_P.exp())
    assert_golden(advantage, golden)


def test_the_oracles_expected_gradient_of_the_jsd_is_that_of_its_divergence() -> None:
    """With the whole vocabulary as the teacher's candidates."""
    ids, log_q = torch.arange(V).expand(V, V), LOG_Q.expand(V, V)
    batch = golden_batch(torch.arange(V), LOG_P.exp(), topk_ids_TK=ids, teacher_topk_logp_TK=log_q)
    z = LOG_P.clone().requires_grad_()
    log_p = z.log_softmax(0)
    mixture = (0.3 * LOG_Q.exp() + 0.7 * log_p.exp()).log()
    exact = 0.3 * (LOG_Q.exp() * (LOG_Q - mixture)).sum() + 0.7 * (log_p.exp() * (log_p - mixture)).sum()
    (gradient,) = torch.autograd.grad(exact, z)
    found = truth_of({"kind": "jsd", "beta": 0.3}, batch).logits_TV.sum(dim=0)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_the_oracles_gradients_equal_finite_differences() -> None:
    """With everything on: softcap, temperature, candidates of both sides, tokens of all origins."""
    batch = make_batch(Conditions(temperature=0.8, softcap=6.0))
    step = 1e-5
    for name in ("tropd/soft-tail", "eopd/tail", "gkd/jsd-full", "rlad/reference"):
        entry = BY_NAME[name]
        truth = evaluate(entry.objective, batch, entry.progress, "logits")
        for row, column in ((4, 3), (9, 17), (20, 28)):
            losses = []
            for sign in (1.0, -1.0):
                logits_TW = batch.student.logits_TW.clone()
                logits_TW[row, column] += sign * step
                moved = replace(batch, student=replace(batch.student, logits_TW=logits_TW))
                losses.append(evaluate(entry.objective, moved, entry.progress, "logits").loss)
            slope = (losses[0] - losses[1]) / (2.0 * step)
            assert slope == pytest.approx(float(truth.logits_TV[row, column]), rel=1e-6, abs=1e-6), name


@pytest.mark.slow
def test_the_conformance_cases_reach_both_sides_of_every_decision() -> None:
    taken: dict[str, list[int]] = {}
    for temperature, softcap in ((1.0, None), (0.8, 6.0)):
        batch = make_batch(Conditions(temperature=temperature, softcap=softcap))
        for entry in ENTRIES:
            decisions = evaluate(entry.objective, batch, entry.progress, "fused").decisions
            for name, counts in decisions.taken.items():
                total = taken.setdefault(name, [0, 0])
                total[0] += counts[0]
                total[1] += counts[1]
    one_sided = {name: counts for name, counts in taken.items() if not all(counts)}
    assert not one_sided


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditions",
    sorted(
        {cell.conditions() for cell in [*plan_ours(ENTRIES, full=True), *plan_peer("any:peer", ENTRIES, full=True)]},
        key=repr,
    ),
)
def test_no_decision_in_a_conformance_case_is_within_float32_rounding_of_its_threshold(conditions: Conditions) -> None:
    batch = make_batch(conditions)
    for entry in ENTRIES:
        assert evaluate(entry.objective, batch, entry.progress, "fused").decisions.margin > LEAST_MARGIN, entry.name
