"""Edge cases of a teacher server's answer: ids that the student lacks, samples without scores, lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_packing import make_rollout, options
from tests.waits import on_device, waits
from tropd_mcore.data.packing import pack
from tropd_mcore.errors import ServerError, TeacherError
from tropd_mcore.rollout.prefixes import ResponseSampling, generate_responses
from tropd_mcore.serving import fleet as fleet_module
from tropd_mcore.serving.wire import Generation, GenerationRequest, ScoringRequest, TokenScores
from tropd_mcore.serving.work import Dispatched
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.sglang import SampleScores, SglangTeacher, to_micro_batch
from tropd_mcore.types import Prompt

STUDENT_WIDTH = 300


class Scorer:
    """A client that gives every token the same candidates. A fleet asks it through `score_on`."""

    def __init__(self, ids: list[int], probabilities: list[float]) -> None:
        self.ids, self.logp = np.array(ids, np.int32), np.log(np.array(probabilities, np.float32))

    def info(self) -> SimpleNamespace:
        return SimpleNamespace(longest_input=1000)

    def score(self, requests: Sequence[ScoringRequest]) -> list[TokenScores]:
        return [self._score(len(request.token_ids) - request.first) for request in requests]

    def _score(self, tokens: int) -> TokenScores:
        logp_N = np.full(tokens, -1.0, np.float32)
        return TokenScores(logp_N, np.tile(self.ids, (tokens, 1)), np.tile(self.logp, (tokens, 1)))


@pytest.fixture(autouse=True)
def asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fleet_module, "score_on", lambda clients, requests, speeds: Dispatched(clients[0].score(requests))
    )


def scores(ids: list[int], probabilities: list[float], topk: int, excluded: tuple[int, ...] = ()) -> SampleScores:
    server = SimpleNamespace(client=Scorer(ids, probabilities), spec=SimpleNamespace(key="teacher.server"))
    teacher = SglangTeacher(
        server,  # type: ignore[arg-type]
        topk=topk,
        teacher_width=STUDENT_WIDTH + 20,
        student_width=STUDENT_WIDTH,
        on_failure="mask",
        excluded=excluded,
    )
    return teacher.fetch([make_rollout(0, 3, 0, 4, False)])


def test_the_first_id_beyond_the_students_vocabulary_is_no_candidate_and_the_last_one_in_it_is() -> None:
    found = scores([STUDENT_WIDTH, STUDENT_WIDTH - 1, 5], [0.5, 0.25, 0.125], topk=2)
    (sample,) = found.samples
    assert sample is not None
    assert sample.topk_ids_NK.tolist() == [[STUDENT_WIDTH - 1, 5]] * 4
    np.testing.assert_allclose(sample.tail_mass_N, 1.0 - 0.375, atol=1e-6)
    assert sample.complete_N.all()


def test_a_token_with_too_few_candidates_in_the_students_vocabulary_is_not_scored() -> None:
    (sample,) = scores([STUDENT_WIDTH, STUDENT_WIDTH + 1, 5], [0.5, 0.25, 0.125], topk=2).samples
    assert sample is not None and not sample.complete_N.any()


def test_tokens_that_only_the_teacher_has_are_not_candidates_stay_in_the_tail_and_are_counted() -> None:
    ids, probabilities = [7, 9, STUDENT_WIDTH, 5, 3], [0.4, 0.2, 0.1, 0.1, 0.05]
    (sample,) = scores(ids, probabilities, topk=2, excluded=(9, 7)).samples
    assert sample is not None and sample.excluded_N is not None
    assert sample.topk_ids_NK.tolist() == [[5, 3]] * 4
    assert sample.excluded_N.tolist() == [2] * 4
    np.testing.assert_allclose(sample.tail_mass_N, 1.0 - 0.15, atol=1e-6)
    assert sample.complete_N.all()
    (none,) = scores(ids, probabilities, topk=2).samples
    assert none is not None and none.excluded_N is None and none.topk_ids_NK.tolist() == [[7, 9]] * 4

    (batch,) = pack([make_rollout(0, 3, 0, 4, False)], **options()).micro_batches
    rows = to_micro_batch(SampleScores([sample], topk=2), batch)
    assert rows.excluded_T is not None and rows.excluded_T.tolist() == [2] * len(batch.rows_T)
    assert to_micro_batch(SampleScores([none], topk=2), batch).excluded_T is None


def test_more_entries_are_requested_if_tokens_are_excluded() -> None:
    (sample,) = scores([7, 5, 3], [0.4, 0.2, 0.1], topk=2, excluded=(7, 5)).samples
    assert sample is not None and not sample.complete_N.any()


def test_rows_of_a_sample_without_scores_have_no_entry_and_no_number_that_counts() -> None:
    batches = pack([make_rollout(index, 3, 0, 5, False) for index in range(2)], **options()).micro_batches
    for batch in batches:
        found = to_micro_batch(SampleScores([None, None], topk=3), batch)
        rows = len(batch.rows_T)
        assert not found.scored_T.any() and found.entropy_T is None
        assert torch.equal(found.topk_ids_TK, torch.full((rows, 3), -1))
        assert torch.equal(found.logp_T, torch.zeros(rows)) and torch.equal(found.tail_mass_T, torch.ones(rows))
        assert float(found.topk_logp_TK.exp().sum()) < 1e-15


def test_the_scores_of_a_micro_batch_wait_for_the_device_once() -> None:
    (batch,) = pack([make_rollout(index, 3, 0, 5, False) for index in range(2)], **options()).micro_batches
    moved = {name: on_device(getattr(batch, name)) for name in ("sample_index_T", "token_index_T")}
    found = to_micro_batch(SampleScores([None, None], topk=3), replace(batch, **moved))
    assert waits() == {"cpu": 1} and len(found.logp_T) == len(batch.rows_T) == 10


class Generator:
    """A fleet of one server whose sequences may have `longest` tokens."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.first = self
        self.spec = SimpleNamespace(key="teacher.server")

    def infos(self) -> list[tuple[Any, SimpleNamespace]]:
        return [(self, SimpleNamespace(longest_sequence=self.longest))]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        answer = Generation(
            output_ids=np.array([7, 2], np.int32),
            logp=np.zeros(2, np.float32),
            finish_reason="stop",
            weight_versions=("default",),
        )
        return [answer for _ in requests]


def test_a_prompt_with_its_response_may_fill_the_context_of_the_server_and_no_more(tmp_path: Path) -> None:
    prompts = [Prompt("p", np.arange(3, 9, dtype=np.int32), None, None)]
    sampling = ResponseSampling(
        max_new_tokens=4, temperature=1.0, top_p=1.0, eos_ids=(2,), vocab_size=50, served_width=50
    )
    out = tmp_path / "responses.jsonl"
    generate_responses(Generator(10), prompts, out, sampling)  # type: ignore[arg-type]
    assert json.loads(out.read_text())["response_ids"] == [7]
    with pytest.raises(
        ServerError,
        match=r"may reach 10 tokens, 4 of them --max-new-tokens, but the server takes 9: give --max-new-tokens 3",
    ):
        generate_responses(Generator(9), prompts, tmp_path / "other.jsonl", sampling)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank_zero_asks", [False, True])
def test_the_job_stops_if_all_samples_of_a_step_fail_but_not_if_all_of_one_replica_do(
    rank_zero_asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gates.masked_share` applies to the step. With many replicas, one of them may have no usable answer at all."""
    client = Scorer([5], [0.5])
    monkeypatch.setattr(client, "score", lambda requests: [ServerError("no") for _ in requests])
    server: Any = SimpleNamespace(client=client, spec=SimpleNamespace(key="teacher.server"))
    teacher = SglangTeacher(server, topk=1, teacher_width=300, student_width=300, on_failure="mask")
    nowhere: Any = SimpleNamespace()
    served = ServedTeacher(teacher, nowhere, topk=1, only_rank_zero=rank_zero_asks, masked_share=1.0)
    rollouts = [make_rollout(index, 3, 0, 4, False) for index in range(2)]
    if rank_zero_asks:  # for the whole step
        with pytest.raises(TeacherError, match="2 of 2 rollouts could not be scored"):
            served._fetch(rollouts, [0, 1])
    else:
        assert served._fetch(rollouts, [0, 1]) == [None, None]
    monkeypatch.setattr(served, "_failed_everywhere", lambda: {rollout.sample_id for rollout in rollouts})
    served._check_masked(3)
    with pytest.raises(TeacherError, match="2 of 2 samples of the step could not be scored"):
        served._check_masked(2)
