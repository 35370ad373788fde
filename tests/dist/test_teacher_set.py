"""Several teachers in one job: each row has the scores of the teacher of its sample, in every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import reference, teacher_set_ranks
from tests.dist.layouts import Case
from tests.dist.self_teacher_ranks import IGNORED, K, candidates
from tests.ranks import run_on_ranks
from tropd_mcore.types import Rollout

LENGTHS = [(3, 4, 9), (5, 0, 12), (2, 6, 3), (7, 3, 17), (1, 0, 5), (4, 2, 1), (3, 1, 8)]
TEACHERS = ("math", "code", "math", "math", "code", "code", "math")
"""The teacher of each sample. Packs of 48 tokens hold samples of both."""
LAYOUTS = [
    pytest.param(1, {"dp1": Case(), "dp1 in one pack": Case(tokens_per_micro_batch=256)}, id="1"),
    pytest.param(
        2,
        {"dp2": Case(), "tp2": Case(tensor=2), "pp2": Case(pipeline=2), "cp2": Case(context=2)},
        id="2",
    ),
]
SCORES = ("logp_T", "topk_ids_TK", "topk_logp_TK", "tail_mass_T", "entropy_T", "scored_T", "logp_of_student_topk_TL")
Row = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two teachers of one vocabulary and of other sizes."""
    root = tmp_path_factory.mktemp("models")
    configs = {"math": reference.STUDENTS["qwen3"], "code": reference.STUDENTS["qwen2"]}
    return {
        name: reference.write_model(config, root / name, seed) for seed, (name, config) in enumerate(configs.items())
    }


def rollouts_of(teachers: tuple[str, ...] = TEACHERS) -> list[Rollout]:
    plain = reference.make_rollouts(LENGTHS)
    return [replace(rollout, teacher=teacher) for rollout, teacher in zip(plain, teachers, strict=True)]


@lru_cache
def log_probs(folder: Path, ids: tuple[int, ...]) -> Tensor:
    """log q of every next token by the model in `folder` alone, float64 [tokens, vocabulary]."""
    with torch.no_grad():
        logits: Any = reference.reference_model(folder)(torch.tensor(ids)[None]).logits
    return logits[0].log_softmax(-1)


def expected_rows(folders: Mapping[str, Path], rollouts: list[Rollout]) -> dict[tuple[int, int], Row]:
    """{(sample, token): scores} of every supervised token, by the teacher that its sample names."""
    found = {}
    for sample, rollout in enumerate(rollouts):
        assert rollout.teacher is not None
        log_q = log_probs(folders[rollout.teacher], tuple(rollout.token_ids.tolist()))
        first = len(rollout.prompt_ids) + (0 if rollout.carries_prefix_loss else len(rollout.prefix_ids))
        for token in range(first, len(rollout.token_ids)):
            if rollout.token_ids[token] == IGNORED:
                continue
            row, top = log_q[token - 1], log_q[token - 1].topk(K)
            own = candidates(torch.tensor([sample]), torch.tensor([token]), reference.VOCABULARY)[0]
            found[sample, token] = {
                "logp_T": row[rollout.token_ids[token]],
                "topk_ids_TK": top.indices,
                "topk_logp_TK": top.values,
                "tail_mass_T": 1.0 - top.values.exp().sum(),
                "entropy_T": -(row.exp() * row).sum(),
                "scored_T": torch.tensor(True),
                "logp_of_student_topk_TL": row[own],
            }
    return found


def found_rows(answers: list[dict[str, dict[str, Tensor]]], case: str) -> dict[tuple[int, int], Row]:
    """The rows of all ranks. Tensor ranks have the same rows, bit for bit."""
    found: dict[tuple[int, int], Row] = {}
    for answer in answers:
        columns = answer[case]
        for index in range(len(columns["logp_T"]) if columns else 0):
            place = int(columns["sample"][index]), int(columns["token"][index])
            row = {name: columns[name][index] for name in SCORES}
            assert place not in found or all(torch.equal(found[place][name], row[name]) for name in SCORES)
            found[place] = row
    return found


def differs(found: dict[tuple[int, int], Row], expected: dict[tuple[int, int], Row]) -> list[tuple[int, int]]:
    """The places of rows with other scores."""
    assert found.keys() == expected.keys()
    return [
        place
        for place, row in found.items()
        if not all(
            torch.allclose(row[name].double(), expected[place][name].double(), rtol=0, atol=2e-5) for name in SCORES
        )
    ]


@pytest.mark.parametrize(("size", "cases"), LAYOUTS)
def test_each_row_has_the_scores_of_the_teacher_of_its_sample(
    folders: dict[str, Path], size: int, cases: dict[str, Case]
) -> None:
    rollouts = rollouts_of()
    expected = expected_rows(folders, rollouts)
    swapped = expected_rows({"math": folders["code"], "code": folders["math"]}, rollouts)
    answers = run_on_ranks(teacher_set_ranks.scored, size, folders, rollouts, cases, reference.VOCABULARY)
    for case in cases:
        found = found_rows(answers, case)
        assert differs(found, expected) == [], case
        assert len(differs(found, swapped)) == len(expected), "this test notices swapped teachers in every row"


@pytest.mark.parametrize(("size", "cases"), LAYOUTS)
def test_a_step_in_which_a_teacher_has_no_samples_is_scored_by_the_others(
    folders: dict[str, Path], size: int, cases: dict[str, Case]
) -> None:
    """With two data ranks, one sample of a teacher leaves the other rank without samples of it."""
    for teachers in (("code",) * 7, ("math", *("code",) * 6)):
        rollouts = rollouts_of(teachers)
        answers = run_on_ranks(teacher_set_ranks.scored, size, folders, rollouts, cases, reference.VOCABULARY)
        for case in cases:
            assert differs(found_rows(answers, case), expected_rows(folders, rollouts)) == [], (teachers, case)


def test_a_step_without_samples_has_scores_without_rows(folders: dict[str, Path]) -> None:
    (answer,) = run_on_ranks(teacher_set_ranks.scored, 1, folders, [], {"dp1": Case()}, reference.VOCABULARY)
    assert len(answer["dp1"]["logp_T"]) == 0 and answer["dp1"]["topk_ids_TK"].shape == (0, K)
