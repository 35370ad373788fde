"""Several served teachers over data ranks: each server is asked for its own samples, and a lost sample keeps its place.

The scores themselves are compared with transformers in tests/dist/test_teacher_set.py and tests/e2e/test_teachers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.glue.faults import on_ranks
from tests.glue.stubs import TOPK, by_place, make_layout, make_rollouts, one_rank, pack_for
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.errors import TeacherError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.teacher.own_packs import Packing
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.sglang import SampleScore, SampleScores, first_scored
from tropd_mcore.teacher.teacher_set import TeacherChecks, TeacherSet
from tropd_mcore.types import Rollout

NAMES = ("math", "code")
LOGP = {"math": -1.0, "code": -2.0}
"""The log-prob that a server gives to every token."""


@dataclass
class Server:
    """A teacher's server in the place of `SglangTeacher`; it cannot score the samples in `lost`."""

    logp: float
    lost: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)

    def fetch(self, rollouts: Sequence[Rollout], *, may_have_scores: bool = False) -> SampleScores:
        self.asked += [rollout.sample_id for rollout in rollouts]
        return SampleScores([None if each.sample_id in self.lost else self._score(each) for each in rollouts], TOPK)

    def _score(self, rollout: Rollout) -> SampleScore:
        first = first_scored(rollout)
        tokens = len(rollout.token_ids) - first
        return SampleScore(
            first=first,
            logp_N=np.full(tokens, self.logp, np.float32),
            topk_ids_NK=np.tile(np.arange(TOPK, dtype=np.int32), (tokens, 1)),
            topk_logp_NK=np.full((tokens, TOPK), self.logp, np.float32),
            tail_mass_N=np.full(tokens, 0.25, np.float32),
            complete_N=np.ones(tokens, np.bool_),
        )


def rollouts_of(step: int = 0) -> list[Rollout]:
    """Four prompts with two samples each; the prompts have the teachers in turn."""
    return [
        replace(rollout, teacher=NAMES[int(rollout.prompt_id[1:]) % 2]) for rollout in make_rollouts(step, prompts=4)
    ]


def made(layout: Layout, servers: dict[str, Server], *, masked_share: float = 1.0) -> TeacherSet:
    teachers: dict[str, Any] = {
        name: ServedTeacher(
            server,  # type: ignore[arg-type]
            layout,
            topk=TOPK,
            only_rank_zero=name == "math",
            masked_share=masked_share,
            key=f"teachers.{name}.server",
        )
        for name, server in servers.items()
    }
    return TeacherSet(teachers, Packing(layout, torch.device("cpu"), 24, IgnoredTokens()))


def _scored(lost: frozenset[str]) -> tuple[dict[str, list[str]], dict[Any, float], dict[Any, float], set[int]]:
    layout, rollouts = make_layout("data"), rollouts_of()
    servers = {name: Server(logp, lost) for name, logp in LOGP.items()}
    teachers, packed = made(layout, servers), pack_for(rollouts, layout)
    missing = teachers.lost(rollouts, packed)
    scores = teachers.score(rollouts, packed, [None] * len(packed.micro_batches), [])
    present = [score for score in scores if score is not None]
    assert len(present) == len(scores) and all(score.entropy_T is None for score in present)
    logp = by_place(packed.micro_batches, [score.logp_T for score in present])
    counted = by_place(packed.micro_batches, [score.scored_T.float() for score in present])
    return {name: server.asked for name, server in servers.items()}, logp, counted, missing


@pytest.mark.parametrize("number", [None, 2, 7])
def test_each_server_is_asked_once_for_its_own_samples_and_a_lost_one_has_no_scored_row(number: int | None) -> None:
    """One is asked by rank 0, the other by each replica for its own samples."""
    rollouts = rollouts_of()
    lost = frozenset() if number is None else frozenset({rollouts[number].sample_id})
    answers = on_ranks(_scored, 2, lost)
    for name in NAMES:
        asked = [sample for answer in answers for sample in answer[0][name]]
        assert sorted(asked) == sorted(rollout.sample_id for rollout in rollouts if rollout.teacher == name)
        assert bool(answers[1][0][name]) is (name == "code"), "rank 0 alone asks the server that it started"
    seen = set()
    for _, logp, counted, missing in answers:
        assert missing == (set() if number is None else {number})
        for (sample, token), value in logp.items():
            seen.add(sample)
            assert counted[sample, token] == (sample != number)
            assert value == (0.0 if sample == number else LOGP[str(rollouts[sample].teacher)])
    assert seen == set(range(len(rollouts)))


def test_too_many_lost_samples_of_one_teacher_stop_the_run_with_its_key() -> None:
    """They are counted among the samples of this teacher alone."""
    rollouts = rollouts_of()
    lost = frozenset(rollout.sample_id for rollout in rollouts if rollout.prompt_id == "p1")
    with one_rank() as layout:
        packed = pack_for(rollouts, layout)
        teachers = made(layout, {name: Server(logp, lost) for name, logp in LOGP.items()}, masked_share=0.4)
        with pytest.raises(TeacherError, match=r"^teachers\.code\.server: 2 of 4 samples of the step could not"):
            teachers.score(rollouts, packed, [None] * len(packed.micro_batches), [])


def test_the_checks_of_all_served_teachers_run_in_order_at_every_step_and_before_a_checkpoint() -> None:
    did: list[tuple[str, str, int]] = []

    class Check:
        def __init__(self, name: str) -> None:
            self.name = name

        def at_step(self, step: int) -> None:
            did.append((self.name, "step", step))

        def before_checkpoint(self, done: int) -> None:
            did.append((self.name, "checkpoint", done))

    checks = TeacherChecks({name: Check(name) for name in NAMES})  # type: ignore[misc]
    checks.at_step(3)
    checks.before_checkpoint(4)
    assert did == [("math", "step", 3), ("code", "step", 3), ("math", "checkpoint", 4), ("code", "checkpoint", 4)]
