"""Teacher log-probs from an SGLang server: one scoring request per rollout, distributed to the micro-batches' rows.

This module does not sample from the teacher (see `rollout.prefixes`). Invariants: only `fetch` uses HTTP, so one rank
can fetch and send the arrays to the others. Log-probs are over the teacher's whole vocabulary at temperature 1. A
sample that could not be scored has `scored_T` False on all of its rows; made-up numbers never count.

Shapes: N scored tokens of one sample, T rows of a micro-batch, K teacher top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from tropd_mcore.errors import ServerError, TeacherError
from tropd_mcore.sentinels import NO_ENTRY_LOGP
from tropd_mcore.serving.fleet import ServerFleet, fleet_of
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import ScoringRequest, TokenScores, find_outside
from tropd_mcore.types import FloatArray, IntArray, MicroBatch, Rollout, TeacherScores

log = logging.getLogger(__name__)

PADDING_MARGIN = 16
"""Extra top-k entries to request if the teacher's vocabulary is wider, because some may be padding ids."""
EXCLUDED_MARGIN = 64
"""Most extra entries for excluded ids. A row that still has fewer than k candidates is not complete."""


@dataclass(frozen=True)
class SampleScore:
    """Scores of the supervised tokens of one rollout: indices first, first + 1, ... of `Rollout.token_ids`."""

    first: int
    logp_N: FloatArray
    topk_ids_NK: IntArray
    topk_logp_NK: FloatArray
    tail_mass_N: FloatArray
    complete_N: npt.NDArray[np.bool_]
    """False if padding ids of a wider teacher, or excluded ids, leave fewer than K entries"""
    excluded_N: IntArray | None = None
    """Number of excluded ids among the K best entries; None if no ids are excluded"""


@dataclass(frozen=True)
class SampleScores:
    """One entry per rollout, in order; None if the teacher could not score it. Plain numpy, to send between ranks."""

    samples: list[SampleScore | None]
    topk: int

    @property
    def failed(self) -> int:
        """Number of rollouts without scores."""
        return sum(sample is None for sample in self.samples)


class SglangTeacher:
    """Scores rollouts on `server`, one or a fleet, which the caller starts and stops.

    `teacher_width` and `student_width` are the vocabulary sizes of the two models' configs. Ids outside the first kill
    the server, and the loss accepts only ids inside the second. `excluded` are ids that cannot be candidates because
    the student's tokenizer lacks them.
    """

    def __init__(
        self,
        server: SupervisedServer | ServerFleet,
        *,
        topk: int,
        teacher_width: int,
        student_width: int,
        on_failure: Literal["mask", "stop"],
        excluded: Sequence[int] = (),
    ) -> None:
        if topk > min(teacher_width, student_width):
            raise TeacherError(
                f"the objective's topk={topk} is wider than the vocabulary "
                f"({min(teacher_width, student_width)}); lower it"
            )
        self.failed = 0
        """Number of rollouts that could not be scored, over the teacher's life."""
        self._fleet = fleet_of(server)
        self._key = self._fleet.first.spec.key
        self._topk = topk
        self._excluded = np.array(sorted(excluded), dtype=np.int32)
        margin = min(max(teacher_width - student_width, 0), PADDING_MARGIN) + min(len(excluded), EXCLUDED_MARGIN)
        self._asked = min(teacher_width, topk + margin)
        self._teacher_width = teacher_width
        self._student_width = student_width
        self._on_failure = on_failure

    def check_length(self, longest: int) -> None:
        """Raise TeacherError if a rollout of `longest` tokens does not fit into the teacher's context."""
        for server, info in self._fleet.infos():
            key, limit = server.spec.key, info.longest_input
            if longest > limit:
                raise TeacherError(
                    f"{key}: the longest rollout has {longest} tokens but the teacher's server scores at most {limit}: "
                    f"lower rollout.max_new_tokens, or raise {key}.max_total_tokens or --context-length in "
                    f"{key}.extra_args"
                )

    def fetch(self, rollouts: Sequence[Rollout], *, may_have_scores: bool = False) -> SampleScores:
        """Score all rollouts and restart the server if it dies. Uses only HTTP and numpy; call it on one rank.

        `may_have_scores`: other rollouts of the step may have scores even if none of these has. Raises TeacherError if
        a rollout is longer than the teacher's context, if the step has no scores, or, with on_failure=stop, if any
        rollout could not be scored. Raises ServerDied when all restarts are used up.
        """
        requests = [self._request(rollout) for rollout in rollouts]
        answers = self._answers(requests)
        samples: list[SampleScore | None] = []
        problems: list[str] = []
        for rollout, request, answer in zip(rollouts, requests, answers, strict=True):
            if isinstance(answer, ServerError):
                problems.append(f"{rollout.sample_id}: {answer}")
                samples.append(None)
            else:
                samples.append(self._sample_score(request.first, answer))
        if problems:
            self.failed += len(problems)
            summary = f"{len(problems)} of {len(rollouts)} rollouts could not be scored; first: {problems[0]}"
            if self._on_failure == "stop" or (len(problems) == len(rollouts) and not may_have_scores):
                section = self._key.rpartition(".server")[0]
                raise TeacherError(f"{summary} ({section}.on_failure={self._on_failure})")
            log.warning("%s: %s; they are left out of the loss", self._key, summary)
        return SampleScores(samples, self._topk)

    def _request(self, rollout: Rollout) -> ScoringRequest:
        return ScoringRequest(
            rollout.token_ids, first=first_scored(rollout), topk=self._asked, vocab_size=self._teacher_width
        )

    def _answers(self, requests: list[ScoringRequest]) -> list[TokenScores | ServerError]:
        """One answer per request. A dead server is restarted; it, or the others, get the missing ones."""
        answers: list[TokenScores | ServerError | None] = [self._refused(request) for request in requests]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing:
            self.check_length(max(len(request.token_ids) for request in requests))
        scores = self._fleet.score([requests[index] for index in missing])
        for index, answer in zip(missing, scores, strict=True):
            answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _refused(self, request: ScoringRequest) -> ServerError | None:
        outside = find_outside(request.token_ids, self._teacher_width)
        if outside is None:
            return None
        return ServerError(f"token id {outside} is outside the teacher's vocabulary of {self._teacher_width}")

    def _sample_score(self, first: int, scores: TokenScores) -> SampleScore:
        """Keep the k best entries that the student also has, by descending log-prob, then ascending id."""
        ids, logp = scores.topk_ids_NK, scores.topk_logp_NK
        excluded = np.isin(ids, self._excluded)
        foreign = (ids >= self._student_width) | excluded
        best = np.lexsort((ids, -logp, foreign), axis=-1)[:, : self._topk]
        topk_logp = np.take_along_axis(logp, best, axis=-1)
        mass = np.exp(topk_logp.astype(np.float64)).sum(axis=-1)
        return SampleScore(
            first=first,
            logp_N=scores.logp_N,
            topk_ids_NK=np.take_along_axis(ids, best, axis=-1),
            topk_logp_NK=topk_logp,
            tail_mass_N=np.clip(1.0 - mass, 0.0, 1.0).astype(np.float32),
            complete_N=(~foreign).sum(axis=-1) >= self._topk,
            excluded_N=_among_best(excluded, ids, logp, self._topk) if len(self._excluded) else None,
        )


def _among_best(chosen: npt.NDArray[np.bool_], ids: IntArray, logp: FloatArray, topk: int) -> IntArray:
    """Number of `chosen` entries among the `topk` best of each row, int32 [N]."""
    best = np.lexsort((ids, -logp), axis=-1)[:, :topk]
    return np.take_along_axis(chosen, best, axis=-1).sum(axis=-1, dtype=np.int32)


def first_scored(rollout: Rollout) -> int:
    """Return the index in `token_ids` from which a rollout is scored.

    This is the start of the response, or of the prefix if the rollout carries the prefix loss. All samples of a prompt
    share its prefix; scoring it in each of them would transfer K candidates per prefix token every time.
    """
    return len(rollout.prompt_ids) + (0 if rollout.carries_prefix_loss else len(rollout.prefix_ids))


def to_micro_batch(scores: SampleScores, batch: MicroBatch) -> TeacherScores:
    """Return the scores of the rows of `batch`, on its device. Pure: every rank can call it with the same `scores`.

    It waits for the device once.
    Rows of a failed sample, and of a prefix that no sample scored, have `scored_T` False, log-prob 0 and ids -1. So do
    rows that are not complete.
    """
    sample_T, token_T = torch.stack([batch.sample_index_T, batch.token_index_T]).cpu().numpy()
    rows, topk = len(sample_T), scores.topk
    logp_T = np.zeros(rows, np.float32)
    topk_ids_TK = np.full((rows, topk), -1, np.int64)
    topk_logp_TK = np.full((rows, topk), NO_ENTRY_LOGP, np.float32)
    tail_mass_T = np.ones(rows, np.float32)
    scored_T = np.zeros(rows, np.bool_)
    excluded_T = np.zeros(rows, np.int32)
    counted = any(sample is not None and sample.excluded_N is not None for sample in scores.samples)
    for sample_index in np.unique(sample_T):
        sample = scores.samples[sample_index]
        if sample is None:
            continue
        mine = np.flatnonzero(sample_T == sample_index)
        entry = token_T[mine] - sample.first
        assert entry.max() < len(sample.logp_N), "a row that was not scored"
        mine, entry = mine[entry >= 0], entry[entry >= 0]
        mine, entry = mine[sample.complete_N[entry]], entry[sample.complete_N[entry]]
        logp_T[mine] = sample.logp_N[entry]
        topk_ids_TK[mine] = sample.topk_ids_NK[entry]
        topk_logp_TK[mine] = sample.topk_logp_NK[entry]
        tail_mass_T[mine] = sample.tail_mass_N[entry]
        scored_T[mine] = True
        if sample.excluded_N is not None:
            excluded_T[mine] = sample.excluded_N[entry]
    device = batch.sample_index_T.device
    return TeacherScores(
        logp_T=torch.from_numpy(logp_T).to(device),
        topk_ids_TK=torch.from_numpy(topk_ids_TK).to(device),
        topk_logp_TK=torch.from_numpy(topk_logp_TK).to(device),
        tail_mass_T=torch.from_numpy(tail_mass_T).to(device),
        entropy_T=None,
        scored_T=torch.from_numpy(scored_T).to(device),
        excluded_T=torch.from_numpy(excluded_T).to(device) if counted else None,
    )
