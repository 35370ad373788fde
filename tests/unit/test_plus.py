"""examples/plus.py: values and gradients against a loop over tokens, on one rank and on two, and its two promises."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from examples.plus import objective, plus
from tests.library_cases import VP, Case, V, run
from tests.objective_batch import Batch
from tests.one_state import TEACHER_V, expected_gradient, steps_to_leave, student, wrong_mass_after
from tests.ranks import run_on_ranks
from tropd_mcore import LossInputError, VocabParallel, distill_loss, objectives
from tropd_mcore.config.loader import load
from tropd_mcore.errors import ConfigError
from tropd_mcore.objectives.registry import bind_objective

ROOT = Path(__file__).parents[2]
CUTS = (0, 14, V)
"""Two uneven shards of the vocabulary."""
CONSTANTS: list[dict[str, Any]] = [
    {}, {"floor": -0.1, "weight": 0.4}, {"trust_mode": "soft", "weight": 2.0}, {"norm": "tail"}, {"weight": 0.0},
]  # fmt: skip


def of_token(z: Any, log_q: Any, x: int, old: float, u: float, top: Any, constants: dict[str, Any]) -> tuple[Any, Any]:
    """Loss and gradient in the logits of one token, from the equation. NumPy, float64, whole vocabulary."""
    floor, weight = constants.get("floor", np.log(0.3 / 0.7)), constants.get("weight", 1.0)
    log_p = z - np.log(np.exp(z).sum())
    p, q, r = np.exp(log_p), np.exp(log_q), log_q[x] - old
    trust = min(1.0, np.exp(r)) if constants.get("trust_mode") == "soft" else float(u < np.exp(r))
    inside = np.isin(np.arange(len(z)), top)
    fkl = (q * (log_q - log_p))[inside].sum()
    slope = q[inside].sum() * p - q * inside
    if constants.get("norm") == "tail":
        m, c = q[inside].sum(), p[inside].sum()
        fkl += (1 - m) * np.log((1 - m) / (1 - c))
        slope = np.where(inside, p - q, p * (1 - (1 - m) / (1 - c)))
    advantage, added = max(r, floor), weight * (1 - trust)
    one_hot = np.arange(len(z)) == x
    return -advantage * log_p[x] + added * fkl, advantage * (p - one_hot) + added * slope


def of_case(case: Case, constants: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Sum and gradient [tokens, V] of a case, token by token."""
    z, log_q = case.logits().reshape(-1, V).numpy(), case.teacher.log_softmax(-1).reshape(-1, V).numpy()
    total, gradient = 0.0, np.zeros_like(z)
    assert case.top.ids_TK is not None
    for token in range(len(z)):
        if not bool(case.mask.flatten()[token]):
            continue
        x, old = int(case.x.flatten()[token]), float(case.given["old_logp_T"].flatten()[token])
        u, top = float(case.given["trust_u_T"].flatten()[token]), case.top.ids_TK.reshape(len(z), -1)[token].numpy()
        value, slope = of_token(z[token], log_q[token], x, old, u, top, constants)
        weight = float(case.weights.flatten()[token])
        total, gradient[token] = total + weight * value, weight * slope
    return total, gradient


def arguments_of(case: Case) -> dict[str, Any]:
    return {
        "old_logp_T": case.given["old_logp_T"], "trust_u_T": case.given["trust_u_T"], "student_mask_T": case.mask,
        "weight_T": case.weights,
    }  # fmt: skip


@pytest.mark.parametrize("constants", CONSTANTS, ids=str)
def test_plus_equals_the_equation_token_by_token_in_value_and_gradient(constants: dict[str, Any]) -> None:
    case = Case()
    out, gradient = run(case, objective(**constants), old_logp_T=case.given["old_logp_T"])
    total, expected = of_case(case, constants)
    assert float(out.value) == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(gradient.reshape(-1, V).numpy(), expected, rtol=0, atol=1e-12)
    trusted = out.columns["trusted"][case.mask]
    assert 0 < float(trusted.mean()) < 1, "both kinds of tokens occur"


def _on_shards(constants: dict[str, Any]) -> tuple[float, torch.Tensor]:
    rank, group, case = dist.get_rank(), dist.group.WORLD, Case()
    assert group is not None
    columns = slice(CUTS[rank], CUTS[rank + 1])
    leaf = case.logits()[..., columns].contiguous().requires_grad_()
    vp = VocabParallel(group, V, start=CUTS[rank], chunk_tokens=4, debug=True)
    out = distill_loss(leaf * 1.0, case.x, case.top, objective(**constants), vp=vp, **arguments_of(case))
    out.loss_sum.backward()
    assert leaf.grad is not None
    return float(out.value), leaf.grad.reshape(-1, columns.stop - columns.start)


@pytest.mark.parametrize("constants", CONSTANTS[:3], ids=str)
def test_plus_on_two_vocabulary_shards_is_that_of_the_whole_vocabulary(constants: dict[str, Any]) -> None:
    total, expected = of_case(Case(), constants)
    found = run_on_ranks(_on_shards, 2, constants)
    assert [value for value, _ in found] == [found[0][0]] * 2, "the same bits on both ranks"
    assert found[0][0] == pytest.approx(total, rel=1e-12)
    joined = torch.cat([gradient for _, gradient in found], dim=1).numpy()
    np.testing.assert_allclose(joined, expected, rtol=0, atol=1e-12)


def test_without_the_forward_kl_plus_is_reopold() -> None:
    case = Case()
    mine, gradient = run(case, objective(weight=0.0), old_logp_T=case.given["old_logp_T"])
    theirs, expected = run(case, objectives.reopold(), old_logp_T=case.given["old_logp_T"])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)
    assert float(mine.value) == pytest.approx(float(theirs.value), rel=1e-12)


def test_plus_leaves_a_confident_mistake_in_a_logarithmic_number_of_steps_like_forward_kl() -> None:
    found = [steps_to_leave(objective(), eps, limit=50) for eps in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert found == [1, 3, 4, 5]
    assert steps_to_leave(objective(weight=0.0), 1e-3, limit=50) == 50, "the clipped reward alone does not"


def test_a_rare_mistake_fades_under_plus_as_fast_as_under_the_clipped_reward() -> None:
    """t^-1: a tenth of the mass after ten times the steps. Under the gate of TrOPD it is t^-1/2."""
    early, late = wrong_mass_after(objective(), (100, 1000))
    alone = wrong_mass_after(objective(weight=0.0), (1000,))[0]
    assert late < early / 6 and late == pytest.approx(alone, rel=0.05)
    gated_early, gated_late = wrong_mass_after(objectives.tropd(), (100, 1000))
    assert gated_late > gated_early / 4 and late < gated_late / 10


def test_the_row_of_plus_on_the_page_is_that_of_the_exact_gradient() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `plus` |")]
    left = [str(steps_to_leave(objective(), eps, limit=1000)) for eps in (1e-1, 1e-2, 1e-3)]
    masses = [f"{mass:.1e}" for mass in wrong_mass_after(objective(), (30, 300))]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == left + masses


@pytest.mark.parametrize("wrong", [0.999, 0.2])
def test_the_expected_gradient_of_plus_is_the_sum_of_its_two_parts(wrong: float) -> None:
    logits_V = student(wrong, 1 - wrong - 1e-4)
    forward = expected_gradient(objectives.gkd(norm="truncated"), logits_V)
    clipped = expected_gradient(objectives.reopold(), logits_V)
    p_V = logits_V.softmax(0)
    distance = 0.5 * float((p_V - TEACHER_V).abs().sum())
    found = expected_gradient(objective(trust_mode="soft"), logits_V)
    torch.testing.assert_close(found, clipped + distance * forward, rtol=1e-6, atol=1e-9)


def test_a_prefix_token_and_an_unsupervised_token_train_nothing() -> None:
    batch = Batch(moved=0.3)
    loss = plus(batch.inputs())
    assert not loss.loss_T[batch.off_T | batch.uncounted_T].any()
    gradient = batch.gradient(loss.loss_T.sum())
    assert not gradient[batch.off_T | batch.uncounted_T].any() and gradient[batch.on_T].any(dim=1).all()


def test_the_command_of_the_example_loads_binds_and_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job does it: the examples' folder on the path, the arguments of the command line."""
    text = (ROOT / "examples" / "plus.py").read_text(encoding="utf-8")
    (override,) = re.findall(r'"(objective=\{.*plus:plus.*\})"', text)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "plus", raising=False)
    config, _ = load(str(ROOT / "configs" / "quickstart-cpu.yaml"), [override])
    batch = Batch(moved=0.3)
    loss = bind_objective(config.objective)(batch.inputs()).loss_sum
    torch.testing.assert_close(loss, plus(batch.inputs()).loss_sum, rtol=0, atol=0)
    for page in ("choosing.md", "extending.md"):
        assert override in (ROOT / "docs" / page).read_text(encoding="utf-8"), page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor": 0.5}, "objective.arguments.floor: expected a number below 0 (nats), found 0.5"),
        ({"floor": "low"}, "objective.arguments.floor: expected a number below 0 (nats), found 'low'"),
        ({"floor": float("nan")}, "objective.arguments.floor: expected a number below 0 (nats), found nan"),
        ({"weight": -1.0}, "objective.arguments.weight: expected a number of at least 0, found -1.0"),
        ({"norm": "half"}, "objective.arguments.norm: expected one of truncated, tail, renorm, teacher_renorm, found"),
        ({"trust_mode": "hard"}, "objective.arguments.trust_mode: expected one of bernoulli, soft, threshold, none"),
    ],
    ids=str,
)
def test_a_constant_outside_its_range_is_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        partial(plus, **arguments)(Batch().inputs())


def test_a_call_without_uniforms_of_the_gate_is_refused() -> None:
    case = Case()
    with pytest.raises(LossInputError, match="trust_u_T"):
        distill_loss(case.logits(), case.x, case.top, objective(), vp=VP, student_mask_T=case.mask)
