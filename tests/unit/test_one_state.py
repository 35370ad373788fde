"""How fast each objective leaves a confident mistake, and how fast a rare one fades: docs/choosing.md's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from tests.one_state import RIGHT, TEACHER_V, WRONG, expected_gradient, steps_to_leave, student, wrong_mass_after
from tropd_mcore import objectives
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.objectives.catalogue import Objective

PAGE = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
OBJECTIVES: dict[str, Objective] = {
    "opd": objectives.opd(), "tropd": objectives.tropd(), "tropd, soft gate": objectives.tropd(trust_mode="soft"),
    "tropd, fkl_scalar": objectives.tropd(outlier_mode="fkl_scalar"),
    "tropd, mask": objectives.tropd(outlier_mode="mask"), "tropd, clip": objectives.tropd(outlier_mode="clip"),
    "gkd, fkl": objectives.gkd(norm="truncated"), "gkd, rkl": objectives.gkd(divergence="rkl", norm="renorm"),
    "gkd, jsd": objectives.gkd(divergence="jsd", norm="renorm"), "lsm": objectives.lsm(),
    "reopold": objectives.reopold(), "vopd": objectives.vopd(), "iw_opd": objectives.iw_opd(),
    "power_opd": objectives.power_opd(), "jsd": objectives.jsd(), "aopd": objectives.aopd(),
    "tropd_aopd": objectives.tropd_aopd(), "eopd": objectives.eopd(), "rethinking": objectives.rethinking(),
}  # fmt: skip
ROWS = {name: cells for name, *cells in (
    [cell.strip(" `") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")
) if name in OBJECTIVES}  # fmt: skip
LEAVES_FAST = ("tropd", "tropd, soft gate", "gkd, fkl", "aopd", "tropd_aopd")
FADES_SLOWLY = ("tropd", "tropd, soft gate", "tropd, fkl_scalar", "tropd, mask", "aopd", "tropd_aopd", "power_opd")


def test_the_page_has_a_row_for_every_objective_of_the_problem() -> None:
    assert set(ROWS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_steps_and_the_masses_of_the_page_are_those_of_the_exact_gradient(name: str) -> None:
    left = [steps_to_leave(OBJECTIVES[name], eps, limit=1000) for eps in (1e-1, 1e-2, 1e-3)]
    masses = wrong_mass_after(OBJECTIVES[name], (30, 300))
    assert ROWS[name] == [*map(str, left), *(f"{mass:.1e}" for mass in masses)]


def test_only_forward_kl_forces_leave_a_confident_mistake_in_a_logarithmic_number_of_steps() -> None:
    for name, (_, at_100, at_1000, *_) in ROWS.items():
        if name in LEAVES_FAST:
            assert int(at_1000) <= int(at_100) + 1, name
        else:
            assert int(at_1000) > 4 * int(at_100), name


def test_a_gate_lets_a_rare_mistake_fade_with_the_square_root_of_time() -> None:
    """t^-1 takes ten times the steps to a tenth of the mass, t^-1/2 to a third of it."""
    for name, (*_, early, late) in ROWS.items():
        assert (float(late) / float(early) > 0.25) == (name in FADES_SLOWLY), name


SECTIONS: dict[str, dict[str, Any]] = {
    "tropd, soft gate": {"kind": "tropd", "trust": {"mode": "soft"}},
    "tropd, fkl_scalar": {"kind": "tropd", "outlier": {"mode": "fkl_scalar"}},
    "tropd, mask": {"kind": "tropd", "outlier": {"mode": "mask"}},
    "tropd, clip": {"kind": "tropd", "outlier": {"mode": "clip"}},
    "gkd, fkl": {"kind": "gkd"}, "gkd, rkl": {"kind": "gkd", "divergence": "rkl"},
    "gkd, jsd": {"kind": "gkd", "divergence": "jsd"},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_traits_that_hints_follow_are_those_of_the_table(name: str) -> None:
    section = TypeAdapter(ObjectiveConfig).validate_python(SECTIONS.get(name, {"kind": name}))
    assert section.leaves_confident_mistakes is (name in LEAVES_FAST)
    assert section.keeps_rare_mistakes is (name in FADES_SLOWLY)


@pytest.mark.parametrize("wrong", [0.999, 0.2])
def test_the_expected_gradients_of_opd_and_tropd_are_the_closed_forms(wrong: float) -> None:
    """OPD: p (log p/q - KL). TrOPD: the trusted part's score-function gradient, and TV times (p - q)."""
    logits_V = student(wrong, 1 - wrong - 1e-4)
    p_V, q_V = logits_V.softmax(0), TEACHER_V
    ratio_V = (p_V / q_V).log()
    torch.testing.assert_close(
        expected_gradient(objectives.opd(), logits_V), p_V * (ratio_V - (p_V * ratio_V).sum()), rtol=1e-9, atol=1e-12
    )
    trust_V = torch.minimum(p_V, q_V)  # p times rho
    reward = (trust_V * ratio_V).sum()
    expected_V = trust_V * ratio_V - p_V * reward + (1 - trust_V.sum()) * (p_V - q_V)
    found_V = expected_gradient(objectives.tropd(trust_mode="soft"), logits_V)
    torch.testing.assert_close(found_V, expected_V, rtol=1e-6, atol=1e-7)


def test_the_signal_of_opd_vanishes_at_a_confident_mistake_and_that_of_forward_kl_does_not() -> None:
    logits_V = student(1 - 2e-4, 1e-4)
    assert float(expected_gradient(objectives.opd(), logits_V).norm()) < 0.01
    forward = expected_gradient(objectives.gkd(norm="truncated"), logits_V)
    assert float(forward[WRONG]) > 0.99 and float(forward[RIGHT]) < -0.99
