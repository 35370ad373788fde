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


@pytest.fixture(scope="module")
def eager() -> Outcomes:
    (found,) = run_with_compiler(autograd_cases.outcomes, 1, "eager")
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
    for found in run_with_compiler(autograd_cases.outcomes, 2, "eager"):
        assert found == eager


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize("backend", ["compile", "triton"])
def test_every_backend_gives_the_same_outcomes_as_eager(backend: str, eager: Outcomes) -> None:
    """Triton runs in its interpreter here. tests/gpu/test_autograd_on_cuda.py runs it on a GPU."""
    run = run_on_ranks if backend == "triton" else run_with_compiler
    (found,) = run(autograd_cases.outcomes, 1, backend, timeout_s=LONG_S)
    assert found == eager


def table_in_docs() -> Outcomes:
    lines = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows if len(row) == len(header)}


def test_the_table_in_the_docs_matches_the_outcomes(eager: Outcomes) -> None:
    stated = table_in_docs()
    assert list(stated) == list(SITUATIONS)
    for situation, row in stated.items():
        assert list(row) == list(FORMS)
        found = {form: outcome.split(":")[0] for form, outcome in eager[situation].items()}
        assert {form: cell.replace("-", "right").split(" ")[0] for form, cell in row.items()} == found, situation


def test_at_most_two_different_outcomes_besides_right_occur_per_situation(eager: Outcomes) -> None:
    """The table names each reason once. One situation may have both an in-place change and a repeated forward pass."""
    for row in eager.values():
        assert len({outcome for outcome in row.values() if outcome != "right"}) <= 2
