"""The statistic over a batch: its log-probs, its rows, and its return to the ranks of the rows.

The expected values are loops over samples and tokens in float64, written from the equations of the objectives.

Shapes: T rows of a micro-batch, L student top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.glue.faults import on_ranks
from tests.glue.stubs import (
    Axis,
    by_place,
    make_config,
    make_layout,
    make_rollouts,
    make_scores,
    make_student,
    nowhere,
    one_rank,
    pack_for,
    row_values,
)
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.train import batch_context as batch_context_module
from tropd_mcore.train.batch_context import BatchContextSource
from tropd_mcore.types import MicroBatch, Rollout, StudentPass

Place = tuple[int, int]
PROMPTS, SAMPLES = 2, 3
UNSCORED_SAMPLE = 4
IW_OPD = {"kind": "iw_opd", "gamma": 0.5, "topk": 3}
TOPD = {"kind": "topd", "mixing": 0.9, "topk": 3}
ENTROPY = {"kind": "entropy_opd", "fraction": 0.3, "topk": 3}
KDRL = {"kind": "kdrl", "topk": 3}
REOPOLD = {"kind": "reopold", "stages": 2, "switch_at": 0.5, "entropy_fraction": 0.3, "topk": 3}


def old_logp(sample: int, token: int) -> float:
    """The trainer's log-prob before the update, not the sampler's."""
    return -0.3 - 0.17 * ((3 * sample + 5 * token) % 7)


def teacher_logp(sample: int, token: int) -> float:
    return -0.2 - 0.23 * ((5 * sample + 3 * token) % 11)


def entropy(sample: int, token: int) -> float:
    return 0.5 + 0.31 * ((7 * sample + 4 * token) % 13) + 1e-3 * sample + 1e-4 * token


def one_sample(sample: int, token: int) -> bool:
    return sample == UNSCORED_SAMPLE


def some_rows(sample: int, token: int) -> bool:
    return (sample + token) % 4 == 1


UNSCORED = {"none": nowhere, "a sample": one_sample, "some rows": some_rows}


@dataclass
class Expected:
    """The batch as one list of samples, and the statistic of each token by the equations."""

    unscored: str = "none"
    rollouts: list[Rollout] = field(default_factory=lambda: make_rollouts(0, prompts=PROMPTS, samples=SAMPLES))

    def tokens(self, sample: int) -> list[int]:
        """Sampled and scored tokens of a sample."""
        rollout = self.rollouts[sample]
        every = range(len(rollout.prompt_ids) + len(rollout.prefix_ids), len(rollout.token_ids))
        return [token for token in every if not UNSCORED[self.unscored](sample, token)]

    def rollout_logp(self, sample: int, token: int) -> float:
        rollout = self.rollouts[sample]
        return float(rollout.rollout_logp[token - len(rollout.prompt_ids) - len(rollout.prefix_ids)])

    def history_weight(self) -> dict[Place, float]:
        """IW-OPD: 1 + gamma (1 - share of |log q - log p_sampler| of the sample that is before the token)."""
        found = {}
        for sample in range(len(self.rollouts)):
            size = {t: abs(teacher_logp(sample, t) - self.rollout_logp(sample, t)) for t in self.tokens(sample)}
            for token in size:
                before = sum(value for other, value in size.items() if other < token)
                found[sample, token] = 1.0 + 0.5 * (1.0 - before / sum(size.values()))
        return found

    def mixed_return(self) -> dict[Place, float]:
        """TOP-D: log(alpha q / p_old + 1 - alpha) plus its mean over the later tokens, normalised over the prompt."""
        found = {}
        for sample in range(len(self.rollouts)):
            mixed = {
                t: math.log(0.9 * math.exp(teacher_logp(sample, t) - old_logp(sample, t)) + 0.1)
                for t in self.tokens(sample)
            }
            for token, value in mixed.items():
                later = [other for place, other in mixed.items() if place > token]
                found[sample, token] = value + (sum(later) / len(later) if later else 0.0)
        for prompt in range(PROMPTS):
            group = [place for place in found if place[0] // SAMPLES == prompt]
            mean = sum(found[place] for place in group) / len(group)
            spread = math.sqrt(sum((found[place] - mean) ** 2 for place in group) / len(group))
            for place in group:
                found[place] = (found[place] - mean) / spread
        return found

    def most_uncertain(self) -> dict[Place, float]:
        """1 for the 30 % of all sampled and scored tokens with the highest entropy of the student."""
        places = [(sample, token) for sample in range(len(self.rollouts)) for token in self.tokens(sample)]
        best = sorted(places, key=lambda place: -entropy(*place))[: round(0.3 * len(places))]
        return {place: float(place in best) for place in places}

    def group_advantage(self, verdicts: Sequence[bool | None]) -> dict[Place, float]:
        """KDRL: the reward of the sample, normalised over the judged samples of the prompt."""
        advantage = [0.0] * len(self.rollouts)
        for prompt in range(PROMPTS):
            group = [s for s in range(prompt * SAMPLES, (prompt + 1) * SAMPLES) if verdicts[s] is not None]
            mean = sum(float(bool(verdicts[s])) for s in group) / len(group)
            spread = math.sqrt(sum((float(bool(verdicts[s])) - mean) ** 2 for s in group) / len(group))
            for sample in group:
                advantage[sample] = (float(bool(verdicts[sample])) - mean) / spread if spread else 0.0
        return {(s, token): advantage[s] for s in range(len(self.rollouts)) for token in self.tokens(s)}

    def everywhere(self, found: dict[Place, float]) -> dict[Place, float]:
        """The same with 0 for the sampled tokens that were not scored."""
        return {
            (sample, token): found.get((sample, token), 0.0)
            for sample, rollout in enumerate(self.rollouts)
            for token in range(len(rollout.prompt_ids), len(rollout.token_ids))
        }


VERDICTS = (True, False, True, False, None, True)


def student_pass(_model: Any, micro_batches: list[MicroBatch], *_: Any, **__: Any) -> list[StudentPass]:
    """Stands in for a forward pass."""
    return [
        StudentPass(
            logp_T=row_values(micro_batch, old_logp),
            entropy_T=row_values(micro_batch, entropy),
            own_ids_TL=torch.zeros(len(micro_batch.rows_T), 0, dtype=torch.int64),
            own_logp_TL=torch.zeros(len(micro_batch.rows_T), 0),
        )
        for micro_batch in micro_batches
    ]


def contexts(
    layout: Layout, objective: dict[str, Any], unscored: str, step: int = 0
) -> tuple[dict[Place, float] | None, dict[Place, float]]:
    """(statistic, old log-prob) of this rank's rows. The statistic is None if no row has one."""
    config = make_config(objective=objective)
    source = BatchContextSource(config, make_student(layout), None)
    rollouts = make_rollouts(0, prompts=PROMPTS, samples=SAMPLES)
    packed = pack_for(rollouts, layout)
    with mock.patch.object(batch_context_module, "student_pass", student_pass):
        passes = source.student(packed)
    if not layout.is_last_stage:
        passes = [None] * len(packed.micro_batches)
    scores = [
        make_scores(micro_batch, row_values(micro_batch, teacher_logp), unscored=UNSCORED[unscored])
        if layout.is_last_stage
        else None
        for micro_batch in packed.micro_batches
    ]
    verdicts = list(VERDICTS) if layout.rank == 0 else []
    found = source.complete(step, rollouts, packed, passes, scores, verdicts)
    assert len(found) == len(packed.micro_batches)
    if not layout.is_last_stage:
        assert found == [None] * len(found)
        return None, {}
    present = [context for context in found if context is not None]
    assert len(present) == len(found)
    olds = [context.old_logp_T for context in present if context.old_logp_T is not None]
    statistics = [context.statistic_T for context in present if context.statistic_T is not None]
    statistic = by_place(packed.micro_batches, statistics) if statistics else None
    return statistic, by_place(packed.micro_batches, olds) if olds else {}


def contexts_on_ranks(axis: Axis, cases: list[tuple[dict[str, Any], str]]) -> list[Any]:
    """`contexts` of each case on this rank."""
    layout = make_layout(axis)
    return [contexts(layout, objective, unscored)[0] for objective, unscored in cases]


def assert_equal(found: dict[Place, float] | None, expected: dict[Place, float]) -> None:
    assert found is not None and found.keys() == expected.keys()
    np.testing.assert_allclose([found[place] for place in expected], list(expected.values()), rtol=1e-5, atol=1e-6)


def statistic(objective: dict[str, Any], unscored: str = "none", step: int = 0) -> dict[Place, float] | None:
    with one_rank() as layout:
        return contexts(layout, objective, unscored, step)[0]


@pytest.mark.parametrize("unscored", list(UNSCORED))
def test_the_history_weight_uses_the_samplers_log_prob(unscored: str) -> None:
    expected = Expected(unscored)
    assert_equal(statistic(IW_OPD, unscored), expected.everywhere(expected.history_weight()))


@pytest.mark.parametrize("unscored", list(UNSCORED))
def test_the_mixed_return_uses_the_trainers_log_prob_before_the_update(unscored: str) -> None:
    expected = Expected(unscored)
    assert_equal(statistic(TOPD, unscored), expected.everywhere(expected.mixed_return()))


@pytest.mark.parametrize("unscored", list(UNSCORED))
def test_the_most_uncertain_tokens_are_chosen_among_the_scored_ones(unscored: str) -> None:
    expected = Expected(unscored)
    assert_equal(statistic(ENTROPY, unscored), expected.everywhere(expected.most_uncertain()))


@pytest.mark.parametrize("unscored", list(UNSCORED))
def test_every_token_gets_the_group_advantage_of_its_sample(unscored: str) -> None:
    expected = Expected(unscored)
    assert_equal(statistic(KDRL, unscored), expected.everywhere(expected.group_advantage(VERDICTS)))


def test_the_old_log_prob_of_a_row_is_that_of_the_students_scoring_pass() -> None:
    with one_rank() as layout:
        _, old = contexts(layout, IW_OPD, "none")
    assert_equal(old, {place: old_logp(*place) for place in old})
    assert len(old) == sum(len(rollout.response_ids) for rollout in Expected().rollouts)


@pytest.mark.parametrize(("step", "has_statistic"), [(0, False), (1, False), (2, True), (3, True)])
def test_reopold_has_a_statistic_only_from_its_second_phase_on(step: int, has_statistic: bool) -> None:
    found = statistic(REOPOLD, step=step)
    assert (found is not None) is has_statistic
    if has_statistic:
        assert_equal(found, Expected().everywhere(Expected().most_uncertain()))


def test_an_objective_without_a_statistic_reads_no_row_before_the_update() -> None:
    with one_rank() as layout:
        assert contexts(layout, {"kind": "opd", "topk": 3}, "none") == (None, {})


CASES = [(IW_OPD, "none"), (IW_OPD, "some rows"), (TOPD, "a sample"), (ENTROPY, "some rows"), (KDRL, "none")]


def expected_of_cases() -> list[dict[Place, float]]:
    return [
        Expected("none").everywhere(Expected("none").history_weight()),
        Expected("some rows").everywhere(Expected("some rows").history_weight()),
        Expected("a sample").everywhere(Expected("a sample").mixed_return()),
        Expected("some rows").everywhere(Expected("some rows").most_uncertain()),
        Expected("none").everywhere(Expected("none").group_advantage(VERDICTS)),
    ]


def test_the_statistic_is_computed_over_all_data_ranks_and_each_rank_gets_its_own_rows() -> None:
    one, two = on_ranks(contexts_on_ranks, 2, "data", CASES)
    for mine, theirs, expected in zip(one, two, expected_of_cases(), strict=True):
        assert mine and theirs and not mine.keys() & theirs.keys()
        assert_equal({**mine, **theirs}, {place: expected[place] for place in {**mine, **theirs}})
        assert {**mine, **theirs}.keys() == expected.keys()


def test_rows_held_by_several_tensor_ranks_count_once() -> None:
    one, two = on_ranks(contexts_on_ranks, 2, "tensor", CASES)
    for mine, theirs, expected in zip(one, two, expected_of_cases(), strict=True):
        assert mine == theirs
        assert_equal(mine, expected)


def test_only_the_last_pipeline_stage_has_a_batch_context() -> None:
    first, last = on_ranks(contexts_on_ranks, 2, "pipeline", CASES)
    assert first == [None] * len(CASES)
    for found, expected in zip(last, expected_of_cases(), strict=True):
        assert_equal(found, expected)
