"""The student as its own teacher: rows scored in other contexts come back to the rows that the student trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.dist import reference, self_teacher_ranks
from tests.dist.layouts import Case
from tests.dist.self_teacher_ranks import IGNORED, K, candidates
from tests.ranks import run_on_ranks
from tropd_mcore.types import Rollout

LENGTHS = [(3, 4, 9), (5, 0, 12), (2, 6, 3), (7, 3, 17), (1, 0, 5), (4, 2, 1), (3, 1, 8)]
CONTEXTS = [11, None, 2, 6, 17, None, 1]
"""Tokens that the teacher reads instead of the prompts. None: the sample has no teacher."""
ONE_PACK = 256
FAST = {"tp2": Case(tensor=2), "cp2": Case(context=2), "dp2": Case()}
SLOW: dict[int, dict[str, Case]] = {
    2: {"pp2": Case(pipeline=2), "pp2-vpp2": Case(pipeline=2, virtual_pipeline=2)},
    4: {
        "tp2-cp2-sp": Case(tensor=2, context=2, sequence_parallel=True),
        "dp2-cp2": Case(context=2),
        "dp2-pp2-vpp2": Case(pipeline=2, virtual_pipeline=2),
    },
}
LAYOUTS = [
    pytest.param(2, FAST, id="fast"),
    *(pytest.param(size, cases, id=f"slow on {size}", marks=pytest.mark.slow) for size, cases in SLOW.items()),
]
SCORES = ("logp_T", "topk_ids_TK", "topk_logp_TK", "tail_mass_T", "entropy_T", "scored_T", "logp_of_student_topk_TL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.write_model(reference.STUDENTS["qwen3"], tmp_path_factory.mktemp("models") / "student", seed=5)


def found_in(
    folder: Path, size: int, cases: dict[str, Case], contexts: list[Any], rollouts: list[Rollout]
) -> list[Any]:
    return run_on_ranks(self_teacher_ranks.scored, size, folder, rollouts, contexts, cases, reference.VOCABULARY)


@pytest.mark.parametrize(("size", "cases"), LAYOUTS)
def test_a_self_teacher_given_the_original_prompts_scores_like_any_teacher(
    folder: Path, size: int, cases: dict[str, Case]
) -> None:
    """Bit for bit if the packs are the same, as with one data rank and one pack."""
    rollouts = reference.make_rollouts(LENGTHS)
    contexts = [rollout.prompt_ids for rollout in rollouts]
    whole = {name: replace(case, tokens_per_micro_batch=ONE_PACK) for name, case in cases.items()}
    several = {f"{name} in several packs": case for name, case in cases.items()}
    rows = 0
    for answer in found_in(folder, size, whole | several, contexts, rollouts):
        for name, columns in answer.items():
            if not columns:
                continue
            found, expected = columns["self"], columns["plain"]
            rows += len(found["logp_T"])
            assert found.keys() == expected.keys() >= set(SCORES)
            same = name in whole and "dp2" not in name
            for column in found:
                if same or not found[column].is_floating_point():
                    assert torch.equal(found[column], expected[column]), (name, column)
                torch.testing.assert_close(found[column], expected[column], rtol=0, atol=2e-5)
    assert rows > 100


@pytest.mark.parametrize(("size", "cases"), LAYOUTS)
def test_rows_after_another_context_equal_the_reference_and_the_others_are_left_out(
    folder: Path, size: int, cases: dict[str, Case]
) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    random = np.random.default_rng(8)
    contexts = [
        None if count is None else random.integers(0, reference.VOCABULARY, count, dtype=np.int32) for count in CONTEXTS
    ]
    expected = {
        (sample, token): row
        for sample, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True))
        for token, row in rows_of(folder, sample, rollout, context).items()
    }
    answers = found_in(folder, size, cases, contexts, rollouts)
    for name in cases:
        seen = set()
        for answer in answers:
            columns = answer[name].get("self")
            if columns is None:
                continue
            for index in range(len(columns["logp_T"])):
                place = int(columns["sample"][index]), int(columns["token"][index])
                seen.add(place)
                compare({column: columns[column][index] for column in SCORES}, expected[place])
        assert seen == expected.keys(), name


def rows_of(folder: Path, sample: int, rollout: Rollout, context: Any) -> dict[int, dict[str, Tensor] | None]:
    """{token: scores} of the supervised tokens of a sample, float64. None if it has no teacher."""
    start, end = len(rollout.prompt_ids), len(rollout.token_ids)
    first = start if rollout.carries_prefix_loss else start + len(rollout.prefix_ids)
    tokens = [token for token in range(first, end) if rollout.token_ids[token] != IGNORED]
    if context is None:
        return dict.fromkeys(tokens)
    ids = torch.from_numpy(np.concatenate([context, rollout.token_ids[start:]]).astype(np.int64))
    with torch.no_grad():
        log_q = reference.reference_model(folder)(ids[None]).logits[0].log_softmax(-1)
    found = {}
    for token in tokens:
        place = token - start + len(context)
        row = log_q[place - 1]
        own = candidates(torch.tensor([sample]), torch.tensor([token]), reference.VOCABULARY)[0]
        top = row.topk(K)
        found[token] = {
            "logp_T": row[ids[place]],
            "topk_ids_TK": top.indices,
            "topk_logp_TK": top.values,
            "tail_mass_T": 1.0 - top.values.exp().sum(),
            "entropy_T": -(row.exp() * row).sum(),
            "scored_T": torch.tensor(True),
            "logp_of_student_topk_TL": row[own],
        }
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor] | None) -> None:
    if expected is None:
        assert not found["scored_T"] and (found["topk_ids_TK"] == -1).all()
        assert torch.isneginf(found["topk_logp_TK"]).all() and torch.isneginf(found["logp_of_student_topk_TL"]).all()
        return
    for column, value in found.items():
        torch.testing.assert_close(value, expected[column].to(value.dtype), rtol=0, atol=2e-5)


def test_a_step_without_any_teacher_has_no_scored_row(folder: Path) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    for answer in found_in(folder, 2, {"cp2": FAST["cp2"]}, [None] * len(rollouts), rollouts):
        assert all(not columns["self"]["scored_T"].any() for columns in answer.values())
