"""The samples that carry the prefix loss, by objective and by the samples that the teacher scored."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.unit.test_packing import make_rollout, options
from tropd_mcore.config.objectives import KINDS, ObjectiveConfig
from tropd_mcore.data.packing import pack
from tropd_mcore.data.supervision import hand_over, with_carriers
from tropd_mcore.data.verdicts import Verdicts
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout.requests import cut_response
from tropd_mcore.teacher.sglang import SampleScore, SampleScores, to_micro_batch
from tropd_mcore.train.trainer import Trainer
from tropd_mcore.types import Rollout

WITH_PREFIX_LOSS = [
    *({"kind": kind} for kind in ("tropd", "tropd_aopd", "sft")),
    *({"kind": "tropd", "guidance": {"loss": loss}} for loss in ("nll", "topk_fkl", "scalar_adv")),
    {"kind": "tropd", "guidance": {"beta": 0.0}},
    {"kind": "custom", "function": "a:b", "arguments": {"prefix_loss": "nll"}},
]
WITHOUT = [
    *({"kind": kind} for kind in sorted(KINDS.keys() - {"tropd", "tropd_aopd", "sft", "custom"})),
    {"kind": "tropd", "guidance": {"loss": "none"}},
    {"kind": "tropd", "guidance": {"enabled": False}},
    {"kind": "tropd_aopd", "guidance": {"loss": "none"}},
    {"kind": "custom", "function": "a:b"},
    {"kind": "custom", "function": "a:b", "arguments": {"prefix_loss": "none"}},
]


def objective(settings: dict[str, Any]) -> ObjectiveConfig:
    return TypeAdapter(ObjectiveConfig).validate_python(settings)


def step_of(groups: list[tuple[str, int, int]], carriers: set[int]) -> list[Rollout]:
    """(prompt, prefix tokens, samples) of each run of samples. The same prompt always has the same ids."""
    rollouts = []
    for name, prefix, samples in groups:
        first = make_rollout(ord(name), 3, prefix, 6, False)
        rollouts += [
            replace(first, sample_id=f"{name}/{len(rollouts) + n}", prompt_id=name, response_ids=first.response_ids + n)
            for n in range(samples)
        ]
    return [replace(rollout, carries_prefix_loss=index in carriers) for index, rollout in enumerate(rollouts)]


def carriers_of(rollouts: list[Rollout]) -> set[int]:
    return {index for index, rollout in enumerate(rollouts) if rollout.carries_prefix_loss}


@pytest.mark.parametrize("settings", WITH_PREFIX_LOSS, ids=str)
def test_an_objective_with_a_prefix_term_declares_it(settings: dict[str, Any]) -> None:
    assert objective(settings).has_prefix_loss


@pytest.mark.parametrize("settings", WITHOUT, ids=str)
def test_every_other_objective_has_no_prefix_rows(settings: dict[str, Any]) -> None:
    assert not objective(settings).has_prefix_loss
    stored = step_of([("a", 4, 3), ("b", 2, 3)], {0, 3})
    used = with_carriers(stored, prefix_loss=objective(settings).has_prefix_loss)
    plain = [replace(rollout, carries_prefix_loss=False) for rollout in stored]
    for aggregation in ("token_mean", "sequence_mean"):
        for denominator in ("joint", "separate"):
            given = options() | {"aggregation": aggregation, "prefix_denominator": denominator}
            found, expected = pack(used, **given), pack(plain, **given)
            assert found.global_token_count == expected.global_token_count == sum(len(r.response_ids) for r in stored)
            for one, two in zip(found.micro_batches, expected.micro_batches, strict=True):
                assert (
                    not one.prefix_mask_T.any()
                    and one.weight_T.equal(two.weight_T)
                    and one.token_index_T.equal(two.token_index_T)
                )


def test_stored_carriers_are_kept_and_a_group_without_one_gets_its_first_sample() -> None:
    rollouts = step_of([("a", 4, 3), ("b", 2, 3), ("c", 0, 2), ("d", 5, 1)], {1})
    assert carriers_of(with_carriers(rollouts, prefix_loss=True)) == {1, 3, 8}


def test_a_prompt_that_occurs_twice_keeps_a_carrier_for_each_occurrence() -> None:
    rollouts = step_of([("a", 4, 6)], {0, 3})
    assert carriers_of(with_carriers(rollouts, prefix_loss=True)) == {0, 3}
    moved = hand_over(rollouts, {0, 1})
    assert moved is not None and carriers_of(moved) == {2, 3}


def test_a_truncated_replay_keeps_its_prefix_carriers() -> None:
    rollouts = [cut_response(rollout, 0) for rollout in step_of([("a", 4, 3)], set())]
    assert carriers_of(with_carriers(rollouts, prefix_loss=True)) == {0}


@st.composite
def failures(draw):
    groups = draw(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=5)
    )
    rollouts = with_carriers(step_of(groups, set()), prefix_loss=True)
    lost = draw(st.sets(st.integers(0, len(rollouts) - 1)))
    return rollouts, lost


@settings(max_examples=200, deadline=None)
@given(failures())
def test_each_prefix_is_carried_by_one_scored_sample_if_its_prompt_has_one(case):
    rollouts, lost = case
    moved = hand_over(rollouts, lost)
    after = rollouts if moved is None else moved
    assert (moved is None) == (carriers_of(after) == carriers_of(rollouts))
    start = 0
    while start < len(rollouts):
        stop = start
        key = (rollouts[start].prompt_id, rollouts[start].prefix_ids.tolist())
        while stop < len(rollouts) and (rollouts[stop].prompt_id, rollouts[stop].prefix_ids.tolist()) == key:
            stop += 1
        group = set(range(start, stop))
        carrying = carriers_of(after) & group
        scored = sorted(group - lost)
        if not key[1]:
            assert not carrying
        elif not scored:
            assert carrying == {start}, "its rows are left out with the teacher's failure"
        else:
            assert carrying == {start if start not in lost else scored[0]}
        start = stop
    assert hand_over(after, lost) is None, "what was handed over stays"


@given(failures())
@settings(max_examples=30, deadline=None)
def test_no_carrier_moves_if_all_samples_are_scored(case):
    assert hand_over(case[0], set()) is None


def test_a_prefix_that_no_sample_has_scores_for_is_not_trained() -> None:
    (rollout,) = step_of([("a", 4, 1)], {0})
    (batch,) = pack([rollout], **options()).micro_batches
    first = len(rollout.prompt_ids) + len(rollout.prefix_ids)
    count, zeros = len(rollout.response_ids), np.zeros
    score = SampleScore(
        first, zeros(count, np.float32), zeros((count, 2), np.int32), zeros((count, 2), np.float32),
        zeros(count, np.float32), np.ones(count, np.bool_),
    )  # fmt: skip
    scores = to_micro_batch(SampleScores([score], 2), batch)
    assert scores.scored_T.equal(batch.student_mask_T) and batch.prefix_mask_T.sum() == 4


def test_every_result_of_a_step_is_computed_on_the_packs_with_the_final_carriers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The student's pass, the scores and the context must not use the packs from before the carriers moved."""
    seen: list[Any] = []

    def note(*arguments: Any) -> str:
        seen.append([argument for argument in arguments if isinstance(argument, str)])
        return f"result {len(seen)}"

    parts = SimpleNamespace(
        rollouts=SimpleNamespace(at_step=lambda step: "sampled"),
        prefixes=SimpleNamespace(settle=lambda step, rollouts, packed, pack: ("moved", pack("moved"))),
        context=SimpleNamespace(student=note, complete=note),
        scores=SimpleNamespace(at_step=note),
        teacher_check=None,
        held_out=None,
    )
    monkeypatch.setattr(Trainer, "may_stop", lambda trainer: None)
    trainer = Trainer.__new__(Trainer)
    trainer.components = parts  # type: ignore[assignment]
    trainer.pack = lambda rollouts: f"packs of {rollouts}"  # type: ignore[assignment,method-assign]
    trainer.verify = lambda rollouts: Verdicts()  # type: ignore[method-assign]
    batch = trainer.prepare(0, StepClock())
    assert (batch.rollouts, batch.packed) == ("moved", "packs of moved")
    assert seen == [
        ["packs of moved"],
        ["moved", "packs of moved", "result 1"],
        ["moved", "packs of moved", "result 1", "result 2"],
    ]
