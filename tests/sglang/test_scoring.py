"""The SGLang teacher against the whole softmax of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sglang.conftest import VOCABULARY, Oracle
from tests.sglang.streams import plan, stream
from tropd_mcore.errors import TeacherError
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.teacher.sglang import SglangTeacher, to_micro_batch
from tropd_mcore.types import MicroBatch, Rollout

TOPK = 9


@pytest.fixture(scope="module", autouse=True)
def teacher_weights(server: SupervisedServer, other_folder: Path) -> None:
    WeightPublisher(server.client, plan(other_folder)).publish(stream(other_folder), "teacher")


def rollout(name: str, prompt: int, prefix: int, response: int, *, carries: bool = False, seed: int = 0) -> Rollout:
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, prompt + prefix + response).astype(np.int32)
    return Rollout(
        sample_id=name,
        prompt_id=name,
        prompt_ids=ids[:prompt],
        prefix_ids=ids[prompt : prompt + prefix],
        response_ids=ids[prompt + prefix :],
        rollout_logp=np.zeros(response, np.float32),
        trust_u=np.zeros(response, np.float32),
        policy_version="x",
        finish_reason="length",
        carries_prefix_loss=carries,
        answer=None,
    )


ROLLOUTS = [
    rollout("one", 1, 0, 1, seed=1),
    rollout("plain", 7, 5, 13, seed=2),
    rollout("carries", 7, 5, 13, carries=True, seed=2),
    rollout("chunked", 70, 60, 200, carries=True, seed=3),
]


def make_teacher(server: SupervisedServer, **settings: object) -> SglangTeacher:
    defaults = {"topk": TOPK, "teacher_width": VOCABULARY, "student_width": VOCABULARY, "on_failure": "mask"}
    return SglangTeacher(server, **(defaults | settings))  # type: ignore[arg-type]


def rows_of(rollouts: list[Rollout]) -> MicroBatch:
    """The supervised rows of all rollouts, shuffled."""
    pairs = []
    for index, item in enumerate(rollouts):
        first = len(item.prompt_ids) + (0 if item.carries_prefix_loss else len(item.prefix_ids))
        pairs += [(index, token) for token in range(first, len(item.token_ids))]
    order = np.random.default_rng(5).permutation(len(pairs))
    sample_index, token_index = torch.tensor([pairs[position] for position in order]).T
    empty = torch.zeros(len(pairs))
    return MicroBatch(
        input_ids_P=torch.zeros(0, dtype=torch.int64),
        position_ids_P=torch.zeros(0, dtype=torch.int64),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        rows_T=torch.zeros(len(pairs), dtype=torch.int64),
        target_ids_T=torch.zeros(len(pairs), dtype=torch.int64),
        student_mask_T=empty.bool(),
        prefix_mask_T=empty.bool(),
        rollout_logp_T=empty,
        trust_u_T=empty,
        weight_T=empty,
        sample_index_T=sample_index,
        token_index_T=token_index,
    )


@pytest.mark.parametrize("topk", [TOPK, VOCABULARY])
def test_scores_equal_the_full_log_softmax_of_transformers(
    server: SupervisedServer, other_folder: Path, log_softmax: Oracle, topk: int
) -> None:
    batch = rows_of(ROLLOUTS)
    scores = to_micro_batch(make_teacher(server, topk=topk).fetch(ROLLOUTS), batch)
    assert scores.scored_T.all() and scores.entropy_T is None
    tables = [log_softmax(other_folder, item.token_ids.tolist()) for item in ROLLOUTS]
    for row in range(len(batch.sample_index_T)):
        sample, token = int(batch.sample_index_T[row]), int(batch.token_index_T[row])
        table = tables[sample][token - 1]
        assert abs(table[ROLLOUTS[sample].token_ids[token]] - float(scores.logp_T[row])) < 1e-4
        ids = scores.topk_ids_TK[row].numpy()
        np.testing.assert_allclose(scores.topk_logp_TK[row].numpy(), np.sort(table)[::-1][:topk], atol=1e-4)
        np.testing.assert_allclose(scores.topk_logp_TK[row].numpy(), table[ids], atol=1e-4)
        assert len(set(ids.tolist())) == topk
        assert abs(1.0 - np.exp(np.sort(table)[::-1][:topk]).sum() - float(scores.tail_mass_T[row])) < 1e-4


def test_ids_beyond_the_students_vocabulary_are_replaced_by_the_next_best_candidates(
    server: SupervisedServer, other_folder: Path, log_softmax: Oracle
) -> None:
    narrow = VOCABULARY - 7
    rollouts = [item for item in ROLLOUTS if item.token_ids.max() < narrow] or [rollout("low", 2, 0, 3, seed=6)]
    batch = rows_of(rollouts)
    scores = to_micro_batch(make_teacher(server, student_width=narrow).fetch(rollouts), batch)
    assert scores.scored_T.all()
    for row in range(len(batch.sample_index_T)):
        ids = rollouts[int(batch.sample_index_T[row])].token_ids
        table = log_softmax(other_folder, ids.tolist())[int(batch.token_index_T[row]) - 1]
        expected = np.sort(table[:narrow])[::-1][:TOPK]
        np.testing.assert_allclose(scores.topk_logp_TK[row].numpy(), expected, atol=1e-4)
        assert abs(1.0 - np.exp(expected).sum() - float(scores.tail_mass_T[row])) < 1e-4


def test_rows_without_enough_entries_are_not_scored(server: SupervisedServer) -> None:
    batch = rows_of(ROLLOUTS[:1])
    scores = to_micro_batch(make_teacher(server, student_width=TOPK).fetch(ROLLOUTS[:1]), batch)
    assert not scores.scored_T.any()
    assert torch.isfinite(scores.topk_logp_TK).all()


def test_a_rollout_that_cannot_be_scored_is_masked_and_counted_or_stops_the_run(server: SupervisedServer) -> None:
    bad = rollout("bad", 3, 0, 4)
    bad.response_ids[1] = VOCABULARY
    rollouts = [ROLLOUTS[1], bad]
    teacher = make_teacher(server)
    scores = to_micro_batch(teacher.fetch(rollouts), batch := rows_of(rollouts))
    assert torch.equal(scores.scored_T, batch.sample_index_T == 0)
    assert teacher.failed == 1
    with pytest.raises(TeacherError, match=r"1 of 2 rollouts could not be scored; first: bad: token id 307 is outside"):
        make_teacher(server, on_failure="stop").fetch(rollouts)
    with pytest.raises(TeacherError, match="1 of 1 rollouts could not be scored"):
        teacher.fetch([bad])


def test_a_teacher_with_a_shorter_context_than_the_longest_rollout_is_refused(server: SupervisedServer) -> None:
    limit = server.client.info().longest_input
    with pytest.raises(
        TeacherError, match=rf"{limit + 1} tokens but the teacher's server scores at most {limit}.*rollou"
    ):
        make_teacher(server).fetch([ROLLOUTS[0], rollout("long", 11, 0, limit - 10)])
    scores = make_teacher(server).fetch([rollout("fits", 11, 0, limit - 11)])
    assert scores.failed == 0 and scores.samples[0] is not None and len(scores.samples[0].logp_N) == limit - 11
