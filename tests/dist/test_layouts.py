"""Every parallel layout and form of the loss trains with the loss and gradients of an unpacked float64 reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.dist import reference
from tests.dist.layouts import Case, Constants, run_cases
from tests.ranks import run_on_ranks

TOLERANCE = 1e-5
"""Tolerance relative to the largest gradient of a tensor, float32 against float64."""
COLUMN_TOLERANCE = 2e-5
"""nats"""
LENGTHS = [(3, 4, 9), (5, 0, 12), (2, 6, 3), (7, 3, 17), (1, 0, 5), (4, 2, 1), (3, 1, 8)]
CONSTANTS = Constants(
    k=reference.TOPK,
    temperature=reference.TEMPERATURE,
    beta=reference.BETA,
    outlier_weight=reference.OUTLIER_WEIGHT,
)
CASES: dict[int, dict[str, Case]] = {
    1: {"one": Case()},
    2: {
        "tp2": Case(tensor=2),
        "tp2-sp": Case(tensor=2, sequence_parallel=True),
        "pp2": Case(pipeline=2),
        "pp2-vpp2": Case(pipeline=2, virtual_pipeline=2),
        "cp2": Case(context=2),
        "dp2": Case(),
    },
    4: {
        "tp2-pp2": Case(tensor=2, pipeline=2),
        "tp2-pp2-vpp2-sp": Case(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
        "tp2-cp2-sp": Case(tensor=2, context=2, sequence_parallel=True),
        "pp2-cp2": Case(pipeline=2, context=2),
        "dp2-cp2": Case(context=2),
        "dp2-pp2-vpp2": Case(pipeline=2, virtual_pipeline=2),
    },
}
FAMILIES = list(reference.STUDENTS)
MODES: list[dict[str, Any]] = [
    {"form": "fused", "weight_gradient": "deferred"},
    {"form": "logits", "weight_gradient": "deferred"},
    {"form": "fused", "weight_gradient": "folded", "overlap_chunks": True},
    {"form": "fused", "weight_gradient": "recompute"},
    {"form": "logits", "weight_gradient": "recompute"},
    {"form": "fused", "weight_gradient": "folded"},
    {"form": "fused", "weight_gradient": "deferred", "overlap_chunks": True},
]
"""Forms of the loss. Each layout is tested with three of these, each family with thirteen: see `cases_of`."""


def cases_of(family: str, world_size: int) -> dict[str, Case]:
    """The layouts, each with one mode, which differs between the families."""
    shift = 2 * FAMILIES.index(family)
    names = [name for cases in CASES.values() for name in cases]
    return {
        name: replace(case, **MODES[(names.index(name) + shift) % len(MODES)])
        for name, case in CASES[world_size].items()
    }


class Outcomes:
    """Steps by family and case, run on first use: all cases of one world size in one call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = reference.write_model(reference.TEACHER, folder / "teacher", seed=11)
        self.rollouts = reference.make_rollouts(LENGTHS)
        self._expected: dict[str, reference.Step] = {}
        self._found: dict[tuple[str, int], Any] = {}

    def student(self, family: str) -> Path:
        path = self.folder / family
        return path if path.exists() else reference.write_model(reference.STUDENTS[family], path, seed=5)

    def expected(self, family: str) -> reference.Step:
        if family not in self._expected:
            student, teacher = (reference.reference_model(path) for path in (self.student(family), self.teacher))
            self._expected[family] = reference.reference_step(student, teacher, self.rollouts)
        return self._expected[family]

    def found(self, family: str, world_size: int) -> dict[str, Any]:
        key = (family, world_size)
        if key not in self._found:
            arguments = (self.student(family), self.teacher, self.rollouts, cases_of(family, world_size), CONSTANTS)
            self._found[key] = {}  # a failure is raised once, not by every test again
            self._found[key] = run_on_ranks(run_cases, world_size, *arguments)[0]
        return self._found[key]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("models"))


def every_case() -> list[Any]:
    return [
        pytest.param(family, world_size, name, id=f"{family}-{name}-{case.form}-{case.weight_gradient}")
        for family in FAMILIES
        for world_size in CASES
        for name, case in cases_of(family, world_size).items()
    ]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference divided by the largest expected value, or by 1e-2 if that is larger.

    Some gradients cancel to almost nothing and keep the rounding of their parts (key bias: softmax ignores a shift).
    """
    scale = expected.abs().max().clamp_min(1e-2)
    return float((found.double() - expected.double()).abs().max() / scale)


@pytest.mark.parametrize(("family", "world_size", "name"), every_case())
def test_loss_and_all_gradients_equal_the_reference(
    outcomes: Outcomes, family: str, world_size: int, name: str
) -> None:
    expected, found = outcomes.expected(family), outcomes.found(family, world_size)[name]
    assert found["token_count"] == expected.token_count
    assert found["loss"] == pytest.approx(expected.loss, rel=TOLERANCE)
    assert set(found["gradients"]) == set(expected.gradients)
    errors = {key: relative_error(found["gradients"][key], expected.gradients[key]) for key in expected.gradients}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.2e}"


@pytest.mark.parametrize(("family", "world_size", "name"), every_case())
def test_log_probs_entropies_and_trust_of_every_token_equal_the_reference(
    outcomes: Outcomes, family: str, world_size: int, name: str
) -> None:
    """The teacher has another depth, width and vocabulary than the student."""
    expected, found = outcomes.expected(family).columns, outcomes.found(family, world_size)[name]["columns"]
    for column, values in expected.items():
        error = float((found[column] - values).abs().max())
        assert error <= COLUMN_TOLERANCE, f"{column}: {error:.2e}"


def test_the_reference_has_trusted_tokens_outliers_and_foreign_teacher_ids(outcomes: Outcomes) -> None:
    """Otherwise the comparison would not cover these cases."""
    for family in FAMILIES:
        trusted = outcomes.expected(family).columns["trusted"]
        assert 0.2 < float(trusted.mean()) < 0.9
        assert float(outcomes.found(family, 1)["one"]["columns"]["topk_overlap"].mean()) > 0.0
