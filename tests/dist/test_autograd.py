"""The loss inside other autograd code: right, or one clear error, in every form, mode, backend and situation.

The situations are in tests/autograd_situations.py, the table that users read is in docs/autograd.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import autograd_cases
from tests.autograd_cases import FORMS, SITUATIONS
from tests.ranks import run_on_ranks, run_with_compiler

DOCS = Path(__file__).parents[2] / "docs" / "autograd.md"
LONG_S = 1200.0
"""Time limit for Triton's interpreter and for the C++ compiler on a loaded machine."""
Outcomes = dict[str, dict[str, str]]
TRACED = ["torch.compile of the caller"]
"""Nine seconds per form, in which Dynamo traces the loss; all other situations take seven together."""
DIRECT = [name for name in SITUATIONS if name not in TRACED]


@pytest.fixture(scope="module")
def eager() -> Outcomes:
    (found,) = run_with_compiler(autograd_cases.outcomes, 1, "eager", "cpu", DIRECT)
    return found


@pytest.fixture(scope="module")
def traced() -> Outcomes:
    (found,) = run_with_compiler(autograd_cases.outcomes, 1, "eager", "cpu", TRACED, timeout_s=LONG_S)
    return found


def wrong(found: Outcomes) -> list[str]:
    return [
        f"{situation} | {form}: {outcome}"
        for situation, row in found.items()
        for form, outcome in row.items()
        if outcome.startswith("WRONG")
    ]


def test_every_form_is_right_or_refused_in_every_situation(eager: Outcomes) -> None:
    assert wrong(eager) == []


def test_two_ranks_give_the_same_outcomes_as_one(eager: Outcomes) -> None:
    for found in run_with_compiler(autograd_cases.outcomes, 2, "eager", "cpu", DIRECT):
        assert found == eager


def test_a_form_of_each_kind_is_right_if_torch_compiles_the_caller() -> None:
    (found,) = run_with_compiler(autograd_cases.outcomes, 1, "eager", "cpu", TRACED, ["logits", "fused, deferred"])
    assert found == {TRACED[0]: {"logits": "right", "fused, deferred": "right"}}


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("backend", ["compile", "triton"])
def test_every_backend_gives_the_same_outcomes_as_eager(backend: str, eager: Outcomes, traced: Outcomes) -> None:
    """Triton runs in its interpreter here. tests/gpu/test_autograd_on_cuda.py runs it on a GPU."""
    run = run_on_ranks if backend == "triton" else run_with_compiler
    (found,) = run(autograd_cases.outcomes, 1, backend, timeout_s=LONG_S)
    assert found == eager | traced


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
def test_every_form_is_right_on_one_and_two_ranks_if_torch_compiles_the_caller(traced: Outcomes) -> None:
    assert wrong(traced) == []
    for found in run_with_compiler(autograd_cases.outcomes, 2, "eager", "cpu", TRACED, timeout_s=LONG_S):
        assert found == traced


def table_in_docs() -> Outcomes:
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows if len(row) == len(header)}


def assert_stated(outcomes: Outcomes) -> None:
    """The table of docs/autograd.md states these outcomes."""
    stated = table_in_docs()
    for situation, row in outcomes.items():
        assert list(stated[situation]) == list(FORMS)
        found = {form: outcome.split(":")[0] for form, outcome in row.items()}
        cells = {form: cell.replace("-", "right").split(" ")[0] for form, cell in stated[situation].items()}
        assert cells == found, situation


def test_the_table_in_the_docs_has_every_situation_and_matches_the_outcomes(eager: Outcomes) -> None:
    assert list(table_in_docs()) == list(SITUATIONS)
    assert_stated(eager)


@pytest.mark.slow
def test_the_row_of_the_docs_about_a_compiled_caller_matches_the_outcomes(traced: Outcomes) -> None:
    assert_stated(traced)


def test_at_most_two_different_outcomes_besides_right_occur_per_situation(eager: Outcomes) -> None:
    """The table names each reason once. One situation may have both an in-place change and a repeated forward pass."""
    for row in eager.values():
        assert len({outcome for outcome in row.values() if outcome != "right"}) <= 2
