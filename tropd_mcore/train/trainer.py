"""The training loop: sample, pack, score, update, log, maybe checkpoint.

The parts that do the work are built once from the configuration (`train.job`). Invariants: the state at the start of
step t is the checkpointed state, and the rollouts of t come from exactly these weights. Everything that determines a
step is on disk, or follows from that state, before the step changes anything. All updates of a step use the same data.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from tropd_mcore import stopping
from tropd_mcore.config.derived import alpha
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import any_served, names_of
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.groups import mini_batches
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.data.supervision import IgnoredTokens
from tropd_mcore.data.verdicts import Verdicts, accuracy, verify_rollouts
from tropd_mcore.errors import ServerError, StopRequested
from tropd_mcore.mcore.average import WeightAverage
from tropd_mcore.mcore.checkpoint import TrainState, save
from tropd_mcore.mcore.collective import (
    asked_to_stop,
    gather_on_rank_zero,
    on_rank_zero,
    raise_on_all_ranks,
    stop_together,
)
from tropd_mcore.mcore.loss import LossResult, check_finite, make_distillation_loss
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.optimizer import (
    MegatronOptimizer,
    OptimizerParamScheduler,
    learning_rate,
    optimizer_step,
    skip_step,
)
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.monitor.record import StepRecord
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.progress import progress
from tropd_mcore.records.run_dir import Kept, RunDir
from tropd_mcore.records.token_file import save_token_sample
from tropd_mcore.records.token_table import NumpyColumns, local_columns, merge_columns
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.teacher.identity_check import TeacherCheck
from tropd_mcore.teacher.score_source import ScoreSource
from tropd_mcore.teacher.teacher_set import TeacherChecks
from tropd_mcore.train.batch_context import BatchContextSource
from tropd_mcore.train.gates import SamplerBounds, SamplerGate, check_teachers_are_others
from tropd_mcore.train.held_out import HeldOut
from tropd_mcore.train.phases import PhaseRun
from tropd_mcore.train.prefix_losses import PrefixLosses
from tropd_mcore.types import HeldOutDistance, OptimizerReport, Rollout, RowContext, TeacherScores, TokenTable

log = logging.getLogger(__name__)

RESUMES = "the same command resumes"


@dataclass(frozen=True)
class Components:
    """The parts that the loop uses, each built once."""

    config: Config
    layout: Layout
    run_dir: RunDir
    student: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    teacher_model: Model | None
    """The teacher in this process; None if a server, the student's average or several teachers score."""
    average: WeightAverage | None
    """The student's average if it is the teacher, else None."""
    ignored: IgnoredTokens
    rollouts: RolloutSource
    prefixes: PrefixLosses
    scores: ScoreSource
    context: BatchContextSource
    monitor: Monitor
    renderer: Renderer
    sampler_bounds: SamplerBounds
    teacher_check: TeacherCheck | TeacherChecks | None = None
    """Checks that served teachers do not change; None if there is no served teacher or the check is off."""
    held_out: HeldOut | None = None
    """Measures the student on held-out responses; None if nothing is held out."""
    clock: StepClock = field(default_factory=StepClock)
    """Measures the seconds of each phase. The rollout server's share is measured in the code that uses the server."""
    phases: PhaseRun | None = None
    """The phases of the run, which has these parts for the present one; None if the run has no phases."""


@dataclass(frozen=True)
class Batch:
    """A rollout batch with everything that its updates share. `scores` and `context` have one entry per micro-batch."""

    step: int
    rollouts: list[Rollout]
    verdicts: Verdicts
    """On rank 0 only; empty on the other ranks."""
    packed: PackedStep
    scores: list[TeacherScores | None]
    context: list[RowContext | None]
    held_out: HeldOutDistance | None = None
    """On rank 0, at steps with a measurement."""


@dataclass(frozen=True)
class Update:
    """One optimizer step on a part of a rollout batch."""

    number: int
    epoch: int
    part: slice
    """Its micro-batches."""


class Trainer:
    """Runs the steps [first_step, last_step) of a run."""

    def __init__(self, components: Components, *, first_step: int, last_step: int) -> None:
        self.phases = components.phases
        self.components = components if self.phases is None else self.phases.parts
        self.settings = LossSettings.from_config(components.config)
        self.first_step = first_step
        self.last_step = last_step
        self.sampler_gate = SamplerGate(components.config, components.sampler_bounds)
        self.compared = False
        """Whether sampler and trainer have been compared in this launch; the same on all ranks."""
        self.saved = first_step
        """Steps in the newest checkpoint, from which a resume would start."""
        self.done = first_step
        """Steps whose updates are in the weights and whose metrics are written."""

    def fit(self) -> None:
        """Train. A step that an earlier launch did not finish is repeated with its stored rollouts and scores.

        If any rank was asked to stop, saves the finished steps and raises StopRequested.
        """
        clock = self.components.clock
        clock.take()  # drop the seconds before the first step
        with stopping.safe_points():
            try:
                for step in range(self.first_step, self.last_step):
                    with progress(log, f"step {step} of {self.components.config.run.steps}"):
                        self.step(step, clock)
                    self.may_stop()
                self.tell_unfinished()
            except StopRequested as request:
                with stopping.held():
                    raise StopRequested(f"stopped by {request} {self.save_for_stop()}") from None
            except ServerError as error:
                # A scheduler may end the servers together with the job, while a stop is held back.
                reason = asked_to_stop(self.components.layout.groups.control)
                if reason is None:
                    raise
                raise StopRequested(f"stopped by {reason} {self.without_checkpoint(error)}") from None

    def step(self, step: int, clock: StepClock) -> None:
        """Run one step, from its prompts to its checkpoint."""
        with raise_on_all_ranks(self.components.layout.groups.control):
            self.components.run_dir.check_held()
        batch = self.prepare(step, clock)
        with stopping.held():  # the rest of the step is short, and a stop must not split it
            self.train(batch, clock)

    def train(self, batch: Batch, clock: StepClock) -> None:
        """Run the updates of a step, write its metrics, and write its checkpoint if one is due."""
        step = batch.step
        tokens: list[NumpyColumns] = []
        reports: list[OptimizerReport] = []
        for update in self.updates(batch):
            with clock.phase("forward_backward"):
                results = self.forward_backward(batch, update)
            with clock.phase("metrics"):
                tokens += self.gather_tokens(batch, update, results)
            with clock.phase("gates"):
                self.check_sampler(batch, update, tokens)
            with clock.phase("optimizer"):
                reports.append(self.update(step, results))
        with clock.phase("metrics"):
            table = merge_columns(tokens)
            metrics = self.log(step, self.record(batch, table, reports, clock))
            self.keep_tokens(batch, table)
        self.done = step + 1
        self.advance(metrics)
        with clock.phase("checkpoint"):
            self.keep(step)
            self.forget(step)

    def prepare(self, step: int, clock: StepClock) -> Batch:
        """Compute everything that uses the weights as they are at the start of the step."""
        components = self.components
        with clock.phase("rollout"):
            rollouts = components.rollouts.at_step(step)
        with clock.phase("pack"):
            packed = self.pack(rollouts)
        with clock.phase("verifier"):
            verdicts = self.verify(rollouts)
        self.may_stop()
        with clock.phase("teacher"):
            if components.teacher_check is not None:
                components.teacher_check.at_step(step)
            rollouts, packed = components.prefixes.settle(step, rollouts, packed, self.pack)
        self.may_stop()
        held_out = None
        if components.held_out is not None:
            with clock.phase("held_out"):
                held_out = components.held_out.at_step(step)
            self.may_stop()
        with clock.phase("student"):
            passes = components.context.student(packed)
        self.may_stop()
        with clock.phase("teacher"):
            scores = components.scores.at_step(step, rollouts, packed, passes, verdicts.right)
        with clock.phase("context"):
            context = components.context.complete(step, rollouts, packed, passes, scores, verdicts.right)
        self.may_stop()
        return Batch(step, rollouts, verdicts, packed, scores, context, held_out)

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Begin the next phase if the step that is done ends the present one. Collective.

        `metrics` are those of the step, on rank 0.
        """
        phases = self.phases
        if phases is None:
            return
        state, until, control = phases.state, phases.until, self.components.layout.groups.control
        after = on_rank_zero(lambda: state.after(self.done, metrics, until), control)
        ended, check = phases.name, self.components.teacher_check
        phases.state = after
        if after.index == state.index:
            return
        if check is not None:
            check.before_checkpoint(self.done)  # the scores of the phase, which later checks might not cover
        self.components = phases.parts
        self.settings = LossSettings.from_config(self.components.config)
        log.info("%s ends after %d steps of the run, %s begins", ended, self.done, phases.name)

    def tell_unfinished(self) -> None:
        """Warn if the run is over and its last phase has not begun."""
        steps = self.components.config.run.steps
        if self.phases is not None and self.done == steps and (message := self.phases.unfinished(steps)) is not None:
            log.warning("%s", message)

    def pack(self, rollouts: list[Rollout]) -> PackedStep:
        """Return this rank's micro-batches of the step, grouped by update."""
        config = self.components.config
        return pack_on(
            self.components.layout,
            rollouts,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            device=self.components.student.platform.device,
            aggregation=config.loss.aggregation,
            prefix_denominator=config.loss.prefix_denominator,
            mini_batches=mini_batches(rollouts, config.objective.policy.mini_batches),
            ignored=self.components.ignored,
        )

    def verify(self, rollouts: list[Rollout]) -> Verdicts:
        """Return the verifier's verdicts on rank 0, and empty ones on the other ranks."""
        layout = self.components.layout
        with raise_on_all_ranks(layout.groups.control):
            if layout.rank == 0:
                return verify_rollouts(rollouts, self.components.renderer, self.components.config)
        return Verdicts()

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yield each mini-batch in turn, once per epoch."""
        slices = batch.packed.mini_batches
        for number in range(len(slices) * self.components.config.objective.policy.epochs):
            epoch, part = divmod(number, len(slices))
            yield Update(number, epoch, slices[part])

    def forward_backward(self, batch: Batch, update: Update) -> list[LossResult | None]:
        """Compute the gradients of the update's loss, divided by its global token count.

        Raises TrainingError on all ranks if the loss is not finite.
        """
        components, part = self.components, update.part
        micro_batches = batch.packed.micro_batches[part]
        loss = make_distillation_loss(
            components.student,
            objective_of(components.config.objective, progress=batch.step / components.config.run.steps),
            batch.scores[part],
            batch.context[part],
            self.settings.at_step(components.config, batch.step),
            teacher=components.teacher_model,
        )
        results = run_pipeline(
            components.student, micro_batches, batch.packed.pack_length, loss=loss, forward_only=False
        )
        with raise_on_all_ranks(components.layout.groups.control):
            sample_ids = [rollout.sample_id for rollout in batch.rollouts]
            check_finite(results, micro_batches, step=batch.step, sample_ids=sample_ids)
        return results

    def gather_tokens(self, batch: Batch, update: Update, results: Sequence[LossResult | None]) -> list[NumpyColumns]:
        """Return the rows of the update from all ranks on rank 0, and nothing on the other ranks. Collective."""
        layout = self.components.layout
        mine: NumpyColumns = {}
        if layout.is_last_stage and layout.tp_rank == 0:
            columns = [result.columns for result in results if result is not None]
            micro_batches, context = batch.packed.micro_batches[update.part], batch.context[update.part]
            mine = local_columns(micro_batches, context, columns, epoch=update.epoch)
        return gather_on_rank_zero(mine, layout.groups.control)

    def check_sampler(self, batch: Batch, update: Update, tokens: list[NumpyColumns]) -> None:
        """Check that sampler and trainer agree on the step's rollouts, with log-probs from before its first update.

        The check runs before the first optimizer step of a launch, and once per step, when the first epoch has covered
        all rollouts. `tokens` are the rows of the step's updates up to this one. Collective.
        """
        components = self.components
        whole = update.number == len(batch.packed.mini_batches) - 1
        first = update.number == 0 and not self.compared
        if not components.config.gates.sampler_logprob or not (whole or first):
            return

        def check() -> bool:
            if first:
                teachers = [rollout.teacher for rollout in batch.rollouts]
                check_teachers_are_others(
                    tokens, components.config, components.sampler_bounds, batch.step, teachers=teachers
                )
            return self.sampler_gate.check(batch.step, tokens, first_update=not whole)

        self.compared = on_rank_zero(check, components.layout.groups.control)

    def update(self, step: int, results: list[LossResult | None]) -> OptimizerReport:
        """Run one optimizer step, or none if no token counts. Returns the report of the whole job on every rank."""
        components = self.components
        loss_sum, token_count = sum_over_job(results, components.layout)
        if token_count == 0:
            grad_norm = skip_step(components.optimizer)
            log.info("step %d: no token was scored and trained: no optimizer step", step)
        else:
            grad_norm, _ = optimizer_step(components.student, components.optimizer, components.scheduler, step=step)
            if components.average is not None:
                components.average.update()
        return OptimizerReport(
            grad_norm=grad_norm,
            learning_rate=learning_rate(components.optimizer),
            loss=loss_sum / max(token_count, 1),
            token_count=token_count,
        )

    def record(
        self, batch: Batch, table: TokenTable, reports: list[OptimizerReport], clock: StepClock
    ) -> StepRecord | None:
        """Return the input of the metrics on rank 0, and None on the other ranks."""
        config, layout = self.components.config, self.components.layout
        if layout.rank != 0:
            return None
        return StepRecord(
            table=table,
            rollouts=batch.rollouts,
            updates=reports,
            alpha=alpha(batch.step, config),
            timings=clock.take(),
            accuracy=accuracy(batch.verdicts.right),
            unfinished=batch.verdicts.unfinished,
            masked_rollouts=self.components.rollouts.left_out,
            held_out=batch.held_out,
            sampler_gate=self.sampler_gate.state if config.gates.sampler_logprob else None,
            special_ids=self.components.renderer.special_ids,
            policy_gradient=config.objective.policy,
            phase=self.phases.state.index if self.phases is not None else None,
            teachers=names_of(config),
        )

    def log(self, step: int, record: StepRecord | None) -> Mapping[str, float]:
        """Write the metrics of the step; returns them on rank 0. If that fails on rank 0, all ranks raise.
        Collective."""
        with raise_on_all_ranks(self.components.layout.groups.control):
            self.components.run_dir.check_held()
            return self.components.monitor.log(step, record)

    def keep_tokens(self, batch: Batch, table: TokenTable) -> None:
        """Store token values of a few samples, and the verdicts on all samples, for the report."""
        components = self.components
        with raise_on_all_ranks(components.layout.groups.control):
            if components.layout.rank == 0 and components.config.monitor.token_samples:
                components.run_dir.check_held()
                samples, verdicts = components.config.monitor.token_samples, batch.verdicts.right
                save_token_sample(components.run_dir.tokens(batch.step), table, samples, verdicts)

    def keep(self, step: int) -> None:
        """Write a checkpoint every `checkpoint_every` steps and at the end."""
        done = step + 1
        if done % self.components.config.run.checkpoint_every == 0 or done == self.last_step:
            self.save(done)

    def save(self, done: int) -> Path:
        """Write the checkpoint of `done` steps; returns its folder. Collective."""
        components, run = self.components, self.components.config.run
        if components.teacher_check is not None:
            components.teacher_check.before_checkpoint(done)
        with raise_on_all_ranks(components.layout.groups.control):
            components.run_dir.check_held()
        state = TrainState(components.student, components.optimizer, components.scheduler, components.average)
        folder = save(
            components.run_dir.checkpoints,
            done,
            state,
            extra=self.phases.extra() if self.phases is not None else {},
            keep=run.keep_checkpoints,
            hf_folder=components.config.student.path,
            run=components.run_dir.recorded_id(),
        )
        self.saved = done
        return folder

    def may_stop(self) -> None:
        """If any rank was asked to stop, raise StopRequested on every rank. Collective: one small all-gather."""
        stop_together(self.components.layout.groups.control)

    def save_for_stop(self) -> str:
        """Save the steps that no checkpoint has yet; returns the position of the run, for a message. Collective."""
        if self.done == self.saved:
            return f"{self.position}; {RESUMES}"
        try:
            folder = self.save(self.done)
        except ServerError as error:  # a scheduler may also end the teacher's server, before its last check
            return self.without_checkpoint(error)
        return f"{self.position}, saved {folder}; {RESUMES}"

    def without_checkpoint(self, error: ServerError) -> str:
        """Return the position of the run after a stop without a checkpoint, for a message."""
        return f"{self.position}, without a checkpoint of steps {self.saved} to {self.done}: {error}; {RESUMES}"

    @property
    def position(self) -> str:
        """How far the run is, for a message."""
        return f"after step {self.done} of {self.components.config.run.steps}"

    def forget(self, step: int) -> None:
        """Remove stored files of earlier steps that no resume needs and no key keeps. Collective."""
        components, run = self.components, self.components.config.run
        served = any_served(components.config)  # scores of a teacher in the job can be computed again
        kept = Kept(
            rollouts=run.keep_rollouts,
            scores=run.keep_scores,
            tokens=run.keep_tokens,
            rollouts_needed_from=self.saved,
            scores_needed_from=self.saved if served else step + 1,
        )
        with raise_on_all_ranks(components.layout.groups.control):
            if components.layout.rank == 0:
                components.run_dir.forget(step, kept)


def sum_over_job(results: Sequence[LossResult | None], layout: Layout) -> tuple[float, int]:
    """Return (sum of the surrogate loss, number of tokens that count) over all ranks, the same on each. Collective."""
    mine = (0.0, 0)
    if layout.tp_rank == 0:
        present = [result for result in results if result is not None]
        mine = (sum(float(result.loss_sum) for result in present), sum(int(result.token_count) for result in present))
    components = [mine] * layout.world_size
    dist.all_gather_object(components, mine, group=layout.groups.control)
    return sum(loss for loss, _ in components), sum(count for _, count in components)
