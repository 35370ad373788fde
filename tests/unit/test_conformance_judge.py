"""What counts as a miss in `tropd conformance`: the judge on answers derived from the oracle's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tropd_mcore.conformance.cases import make_batch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.entries import BY_NAME
from tropd_mcore.conformance.judge import Error, judge
from tropd_mcore.conformance.matrix import Result
from tropd_mcore.conformance.oracle.truth import evaluate
from tropd_mcore.conformance.our_loss import Answer
from tropd_mcore.conformance.report import as_json, tables

OURS = Cell("tropd", "tp2-padded", "float64", form="fused")
GIVEN = replace(OURS, form="logits")


def right_answers(cell: Cell, dtype: torch.dtype = torch.float64) -> list[Answer]:
    """The results of ranks without a fault, rounded to `dtype` where they are stored."""
    batch, entry = make_batch(cell.conditions()), BY_NAME[cell.objective]
    truth = evaluate(entry.objective, batch, entry.progress, cell.form)
    cuts, answers = cell.divided.cuts, []
    padding = cuts[-1] - batch.vocab_size
    logits_TW = torch.nn.functional.pad(truth.logits_TV, (0, padding)).to(dtype).double()
    weight_WD = torch.nn.functional.pad(truth.weight_VD, (0, 0, 0, padding))
    for start, stop in pairwise(cuts):
        if cell.form == "logits":
            answers.append(Answer(truth.loss, truth.token_count, logits_TW=logits_TW[:, start:stop].clone()))
        else:
            answers.append(
                Answer(truth.loss, truth.token_count, hidden_TD=truth.hidden_TD, weight_WD=weight_WD[start:stop])
            )
    return answers


def verdict(cell: Cell, answers: list[Answer], *, truncates: bool = False) -> dict[str, Error]:
    batch, entry = make_batch(cell.conditions()), BY_NAME[cell.objective]
    truth = evaluate(entry.objective, batch, entry.progress, cell.form)
    return judge(answers, truth, batch, cell, truncates=truncates)


def missed(errors: dict[str, Error]) -> set[str]:
    return {name for name, error in errors.items() if not error.ok}


@pytest.mark.parametrize("cell", [OURS, GIVEN])
def test_the_oracles_own_gradients_have_no_miss(cell: Cell) -> None:
    errors = verdict(cell, right_answers(cell))
    assert not missed(errors)
    assert set(errors) == {"loss", "count"} | ({"logits"} if cell.form == "logits" else {"hidden", "weight"})


def test_a_gradient_multiplied_by_the_number_of_ranks_is_a_miss_that_says_so() -> None:
    answers = [replace(answer, logits_TW=2.0 * present(answer.logits_TW)) for answer in right_answers(GIVEN)]
    errors = verdict(GIVEN, answers)
    assert missed(errors) == {"logits"}
    assert errors["logits"].value == pytest.approx(1.0)
    assert errors["logits"].factor == pytest.approx(2.0)
    assert errors["logits"].cosine == pytest.approx(1.0)


FAULTS: dict[str, tuple[Cell, Callable[[Answer], Answer], str]] = {
    "gradient in padding": (GIVEN, lambda answer: replace(answer, logits_TW=plus(answer.logits_TW)), "logits"),
    "one entry": (OURS, lambda answer: replace(answer, hidden_TD=plus(answer.hidden_TD)), "hidden"),
    "weight rows of padding": (OURS, lambda answer: replace(answer, weight_WD=plus(answer.weight_WD)), "weight"),
    "nan": (OURS, lambda answer: replace(answer, hidden_TD=torch.nan * present(answer.hidden_TD)), "hidden"),
    "loss": (OURS, lambda answer: replace(answer, loss=answer.loss + 1e-9), "loss"),
    "loss that is no number": (OURS, lambda answer: replace(answer, loss=float("nan")), "loss"),
    "count": (OURS, lambda answer: replace(answer, token_count=23), "count"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_only_the_last_rank_is_a_miss(name: str) -> None:
    cell, plant, number = FAULTS[name]
    answers = right_answers(cell)
    assert missed(verdict(cell, [answers[0], plant(answers[1])])) == {number}


def test_one_rounding_to_bfloat16_is_allowed_and_truncation_is_not() -> None:
    cell = replace(GIVEN, dtype="bfloat16")
    assert not missed(verdict(cell, right_answers(cell, torch.bfloat16)))
    answers = [replace(answer, logits_TW=truncated(present(answer.logits_TW))) for answer in right_answers(cell)]
    assert missed(verdict(cell, answers)) == {"logits"}
    assert not missed(verdict(cell, answers, truncates=True))


def test_the_table_shows_the_largest_error_and_marks_a_miss() -> None:
    good = Result(OURS, "ok", {"loss": Error(2e-16, 1e-12), "hidden": Error(3e-15, 1e-12)})
    bad = Result(replace(OURS, layout="tp1"), "miss", {"loss": Error(1e-3, 1e-12), "hidden": Error(1e-15, 1e-12)})
    absent = Result(replace(OURS, backend="triton"), "not run", reason="triton is not installed")
    text = tables([good, bad, absent])
    row = next(line for line in text.splitlines() if line.startswith("tropd "))
    assert row.split() == ["tropd", "1.0e-03!", "3.0e-15"]
    assert "1 within tolerance, 1 missed, 1 not run" in text
    assert "not run  1 cells: triton is not installed" in text
    assert "loss 1.0e-03 > 1e-12" in text


def test_the_json_has_every_cell_and_only_numbers_that_json_allows() -> None:
    bad = Result(OURS, "miss", {"loss": Error(float("inf"), 1e-12)})
    document = as_json([bad, Result(GIVEN, "-")], "cpu")
    assert document["totals"] == {"miss": 1, "-": 1}
    assert document["cells"][0]["errors"]["loss"] == {
        "value": None,
        "allowed": 1e-12,
        "beyond_rounding": None,
        "factor": None,
        "cosine": None,
    }
    assert document["cells"][1]["objective"] == "tropd"


def present(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def plus(gradient: Tensor | None) -> Tensor:
    """The gradient with its last entry, which is padding if there is any, off by 1e-9."""
    wrong = present(gradient).clone()
    wrong[-1, -1] += 1e-9
    return wrong


def truncated(gradient: Tensor) -> Tensor:
    """Rounded to bfloat16 towards zero."""
    return (gradient.float().view(torch.int32) & ~0xFFFF).view(torch.float32).double()
