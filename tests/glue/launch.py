"""One launch of the trainer whose model, optimizer and servers are stubs, with a list of what it did in order.

The student's log-prob of a row is the sampler's plus `gap`, and grows by `drift` after each optimizer step. The
teacher's is the student's at the start of the step plus `log_ratio`. The objective, the packs, the token table, the
metrics and the collectives are those of the product.

Shapes: T rows of a micro-batch, J support ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.glue.stubs import VOCABULARY, RowValue, make_rollouts, make_scores, make_student, nowhere, row_values
from tests.row_constants import constants_of
from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.phases import PhasesObjective
from tropd_mcore.config.schema import Config
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.mcore.loss import LossResult, observed
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.monitor.catalogue import compute_metrics
from tropd_mcore.monitor.record import StepRecord
from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.registry import function_of
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train import trainer as trainer_module
from tropd_mcore.train.gates import SamplerBounds
from tropd_mcore.train.phases import PhaseRun, PhaseState
from tropd_mcore.train.prefix_losses import PrefixLosses
from tropd_mcore.train.trainer import Components, Trainer
from tropd_mcore.types import MicroBatch, Rollout, RowContext, TeacherScores

Event = tuple[Any, ...]


def nothing(sample: int, token: int) -> float:
    """0 for every row."""
    return 0.0


@dataclass
class Launch:
    """`run` is the launch. Other attributes may be set before it. `rollouts`, `scores` and `monitor` replace a stub."""

    config: Config
    layout: Layout
    gap: float = 0.0
    drift: float = 0.0
    log_ratio: RowValue = nothing
    statistic: RowValue | None = None
    unscored: Callable[[int, int], bool] = nowhere
    has_average: bool = False
    rollouts: Any = None
    scores: Any = None
    monitor: Any = None
    teacher_check: Any = None
    fail_save: Exception | None = None
    events: list[Event] = field(default_factory=list)
    records: list[StepRecord | None] = field(default_factory=list)
    updates: int = 0
    """Optimizer steps so far."""
    phase: PhaseState | None = None
    """The phase in which the launch begins."""
    extras: dict[int, dict[str, Any]] = field(default_factory=dict)
    """{step: what the trainer adds to the JSON of its checkpoint}"""

    def run(self, first_step: int, last_step: int) -> Launch:
        """Train the steps first_step ... last_step - 1."""
        stubs = {
            "make_distillation_loss": self._loss,
            "run_pipeline": self._run_pipeline,
            "optimizer_step": self._optimizer_step,
            "learning_rate": lambda optimizer: 0.5 / (1 + self.updates),
            "save": self._save,
        }
        with mock.patch.multiple(trainer_module, **stubs):
            Trainer(self._parts(), first_step=first_step, last_step=last_step).fit()
        return self

    def did(self, *kinds: str) -> list[Event]:
        """The events of these kinds in order."""
        return [event for event in self.events if event[0] in kinds]

    def student_logp(self, micro_batch: MicroBatch) -> Tensor:
        """float32 [T], under the current weights."""
        return micro_batch.rollout_logp_T + self.gap + self.drift * self.updates

    def _parts(self) -> Components:
        objective = self.config.objective
        if not isinstance(objective, PhasesObjective):
            return self._parts_of(self.config)
        state = self.phase or PhaseState()
        parts = [self._parts_of(phase) for phase in phase_configs(self.config)[state.index :]]
        return dataclasses.replace(parts[0], phases=PhaseRun(objective, state, parts))

    def _parts_of(self, config: Config) -> Components:
        rollouts = self.rollouts or SimpleNamespace(at_step=self._sample, left_out=0)
        scores = self.scores or SimpleNamespace(at_step=self._score)
        parts: dict[str, Any] = {
            "config": config,
            "layout": self.layout,
            "run_dir": RunDir(self.config.run.dir),
            "student": make_student(self.layout),
            "optimizer": SimpleNamespace(zero_grad=lambda: None, chained_optimizers=[]),
            "scheduler": SimpleNamespace(),
            "teacher_model": None,
            "average": SimpleNamespace(update=self._update_average) if self.has_average else None,
            "ignored": IgnoredTokens(),
            "rollouts": rollouts,
            "prefixes": PrefixLosses(None, scores, rollouts),
            "scores": scores,
            "context": SimpleNamespace(student=self._student_pass, complete=self._complete),
            "monitor": self.monitor or SimpleNamespace(log=self._log),
            "renderer": SimpleNamespace(special_ids=frozenset({1})),
            "sampler_bounds": SamplerBounds.of(self.config, exact=True),
            "teacher_check": self.teacher_check if config.objective.reads_teacher else None,
        }
        return Components(**parts)

    def _sample(self, step: int) -> list[Rollout]:
        self.events.append(("sample", step))
        return make_rollouts(step)

    def _student_pass(self, packed: PackedStep) -> list[None]:
        return [None] * len(packed.micro_batches)

    def _score(self, step: int, rollouts: list[Rollout], packed: PackedStep, *_: Any) -> list[TeacherScores | None]:
        self.events.append(("score", step))
        return [self.score(micro_batch) for micro_batch in packed.micro_batches]

    def score(self, micro_batch: MicroBatch) -> TeacherScores:
        """The teacher's scores."""
        teacher_logp_T = self.student_logp(micro_batch) + row_values(micro_batch, self.log_ratio)
        return make_scores(micro_batch, teacher_logp_T, unscored=self.unscored)

    def _complete(self, step: int, rollouts: list[Rollout], packed: PackedStep, *_: Any) -> list[RowContext | None]:
        return [self._context(micro_batch) for micro_batch in packed.micro_batches]

    def _context(self, micro_batch: MicroBatch) -> RowContext:
        statistic_T = row_values(micro_batch, self.statistic) if self.statistic is not None else None
        return RowContext(old_logp_T=self.student_logp(micro_batch), statistic_T=statistic_T)

    def _loss(
        self,
        model: Any,
        objective: Objective,
        scores: Sequence[TeacherScores | None],
        context: Sequence[RowContext | None],
        settings: Any,
        *,
        teacher: Any = None,
    ) -> Callable[[MicroBatch, int], LossResult]:
        def loss(micro_batch: MicroBatch, index: int) -> LossResult:
            scored = scores[index]
            assert scored is not None
            constants = constants_of(micro_batch, scored, context[index] or RowContext(), VOCABULARY)
            logp_TJ = torch.full(constants.ids_TJ.shape, -2.0)
            logp_TJ[:, 0] = self.student_logp(micro_batch)
            entropy_T = torch.ones(len(logp_TJ))
            output = function_of(objective)(constants.inputs(logp_TJ, entropy_T, None, slice(0, len(logp_TJ))))
            columns = {**output.columns, "student_logp": logp_TJ[:, 0], "student_entropy": entropy_T}
            columns |= {**observed(micro_batch, scored), "topk_overlap": torch.full_like(scored.logp_T, torch.nan)}
            return LossResult(output.loss_sum, output.token_count, torch.tensor(False), columns)

        return loss

    def _run_pipeline(
        self, model: Any, micro_batches: list[MicroBatch], pack_length: int, *, loss: Any, forward_only: bool
    ) -> list[LossResult]:
        assert not forward_only
        samples = sorted({int(sample) for micro_batch in micro_batches for sample in micro_batch.sample_index_T})
        self.events.append(("gradients", samples))
        return [loss(micro_batch, index) for index, micro_batch in enumerate(micro_batches)]

    def _optimizer_step(self, model: Any, optimizer: Any, scheduler: Any, *, step: int) -> tuple[float, bool]:
        self.events.append(("optimizer", step))
        self.updates += 1
        return 2.5, True

    def _update_average(self) -> None:
        self.events.append(("average", self.updates))

    def _save(self, directory: Any, step: int, state: Any, *_: Any, extra: dict[str, Any], **__: Any) -> None:
        self.events.append(("save", step, state.average is not None))
        self.extras[step] = extra
        if self.fail_save is not None:
            raise self.fail_save

    def _log(self, step: int, record: StepRecord | None) -> dict[str, float]:
        self.events.append(("log", step))
        self.records.append(record)
        return compute_metrics(record) if record is not None else {}
