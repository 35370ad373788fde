"""Code that the ranks of the prefix-loss tests run: replays of guided rollouts, with a teacher that may fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.layouts import Case, build, gather_results, layout_of, pack_for, whole_gradients
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ServerError
from tropd_mcore.mcore.loss import make_distillation_loss
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.wire import ScoringRequest, TokenScores
from tropd_mcore.teacher.score_source import ScoreSource
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.teacher.sglang import SglangTeacher
from tropd_mcore.train.prefix_losses import PrefixLosses
from tropd_mcore.types import Rollout


def log_softmax_after(ids: Sequence[int], vocabulary: int) -> Tensor:
    """The artificial teacher's log-probs after these tokens, float64 [V]. They depend on all of the tokens."""
    seed = sum((place + 1) * int(token) for place, token in enumerate(ids)) + 7919 * len(ids)
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)).log_softmax(0)


class MadeUpFleet(ServerFleet):
    """Answers like a teacher's servers, except for requests that match one of `refused`: (tokens, first or None)."""

    def __init__(self, vocabulary: int, refused: list[tuple[np.ndarray, int | None]]) -> None:
        named: Any = SimpleNamespace(spec=SimpleNamespace(key="teacher.server"))
        super().__init__([named])
        self.vocabulary = vocabulary
        self.refused = refused
        self.asked: list[ScoringRequest] = []

    def infos(self) -> list[tuple[Any, Any]]:
        return [(self.first, SimpleNamespace(longest_input=1000))]

    def score(self, requests: list[ScoringRequest]) -> list[TokenScores | ServerError]:
        self.asked += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: ScoringRequest) -> TokenScores | ServerError:
        for token_ids, first in self.refused:
            if np.array_equal(request.token_ids, token_ids) and first in (None, request.first):
                return ServerError("refused by the test")
        ids = request.token_ids.tolist()
        tables = [log_softmax_after(ids[:place], self.vocabulary) for place in range(request.first, len(ids))]
        tops = [table.topk(request.topk) for table in tables]
        return TokenScores(
            logp_N=np.array([float(t[ids[request.first + i]]) for i, t in enumerate(tables)], dtype=np.float32),
            topk_ids_NK=np.stack([top.indices.numpy() for top in tops]).astype(np.int32),
            topk_logp_NK=np.stack([top.values.numpy() for top in tops]).astype(np.float32),
        )


@dataclass(frozen=True)
class Launch:
    """One launch of a step: what the server refuses, and how far it gets."""

    refused: list[tuple[int, str]] = field(default_factory=list)
    """(rollout, `always` or `prefix`): the samples and the parts that cannot be scored"""
    killed_before_scores: bool = False
    masked_share: float = 1.0
    """Share of the step's samples that may have no scores"""


@dataclass(frozen=True)
class Outcome:
    """The results of a launch, on rank 0."""

    carriers: list[int]
    """Rollouts that carry a prefix loss, on every rank"""
    stored: list[int]
    """The same on disk"""
    asked: list[tuple[int, int]]
    """(rollout, first scored token) of every request of all ranks, sorted"""
    results: dict[str, Any] | None = None
    """Loss, count and columns"""
    gradients: dict[str, Tensor] | None = None


def config_of(objective: dict[str, Any], replay: Path, run_dir: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": run_dir, "steps": 3, "replay": replay},
            "student": {"path": "student"},
            "teacher": {"kind": "sglang", "path": "teacher"},
            "data": {"prompts": "prompts.jsonl"},
            "objective": objective,
            "rollout": {"temperature": 0.8},
        }
    )


def launches(
    folder: Path, replay: Path, run_dir: Path, objective: dict[str, Any], case: Case, one_asks: bool,
    wanted: list[Launch], vocabulary: int,
) -> list[Outcome]:  # fmt: skip
    """Step 0 of a replay, once per launch, in the same run directory. `one_asks`: only rank 0 asks the teacher."""
    config = config_of(objective, replay, run_dir)
    found = []
    with layout_of(case) as (layout, platform):
        student = build(folder, case, layout, platform, trainable=True)
        for launch in wanted:
            found.append(_launch(student, config, layout, case, one_asks, launch, vocabulary))
    return found


def _launch(
    student: Any, config: Config, layout: Layout, case: Case, one_asks: bool, launch: Launch, vocabulary: int
) -> Outcome:
    run_dir, k = RunDir(config.run.dir), config.objective.teacher_topk
    source = RolloutSource(config, run_dir, None, None, layout, vocab_size=vocabulary)  # type: ignore[arg-type]
    rollouts = source.at_step(0)
    places = {rollout.sample_id: index for index, rollout in enumerate(rollouts)}
    refused = [
        (rollouts[index].token_ids, None if what == "always" else len(rollouts[index].prompt_ids))
        for index, what in launch.refused
    ]
    fleet = MadeUpFleet(vocabulary, refused)
    asks = layout.rank == 0 if one_asks else True
    teacher = ServedTeacher(
        SglangTeacher(fleet, topk=k, teacher_width=vocabulary, student_width=vocabulary, on_failure="mask")
        if asks else None,
        layout, topk=k, only_rank_zero=one_asks, masked_share=launch.masked_share,
    )  # fmt: skip
    scores = ScoreSource(teacher, run_dir, layout, replay=config.run.replay, name="made up", on_disk=True)
    fallible = teacher if config.objective.has_prefix_loss else None

    def pack(rollouts: list[Rollout]) -> Any:
        return pack_for(rollouts, case, layout)

    rollouts, packed = PrefixLosses(fallible, scores, source).settle(0, rollouts, pack(rollouts), pack)
    results: dict[str, Any] | None = None
    gradients: dict[str, Tensor] | None = None
    if not launch.killed_before_scores:
        passes = [None] * len(packed.micro_batches)
        scored = scores.at_step(0, rollouts, packed, passes, [])
        settings = case.settings(config.rollout.temperature)
        loss = make_distillation_loss(student, objective_of(config.objective), scored, passes, settings)
        outputs = run_pipeline(student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
        results, gradients = gather_results(layout, packed, outputs), whole_gradients(student, layout)
    asked = [[(_place(request, rollouts, places), request.first) for request in fleet.asked]] * layout.world_size
    dist.all_gather_object(asked, list(asked[0]), group=layout.groups.control)
    on_disk = RolloutSource(config, run_dir, None, None, layout, vocab_size=vocabulary)._stored(0)  # type: ignore[arg-type]
    assert on_disk is not None
    return Outcome(
        carriers=carriers(rollouts),
        stored=carriers(on_disk),
        asked=sorted(request for part in asked for request in part),
        results=results,
        gradients=gradients,
    )


def carriers(rollouts: list[Rollout]) -> list[int]:
    return [index for index, rollout in enumerate(rollouts) if rollout.carries_prefix_loss]


def _place(request: ScoringRequest, rollouts: list[Rollout], places: dict[str, int]) -> int:
    return next(
        places[rollout.sample_id] for rollout in rollouts if np.array_equal(rollout.token_ids, request.token_ids)
    )
