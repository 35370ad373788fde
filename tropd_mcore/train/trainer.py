"""The training loop: sample, score, pack, one optimizer step, log, maybe checkpoint.

Not for how any of it is done; every part was made once from the configuration (`train.job`). Invariants: the state at
the start of step t is the checkpointed state, the rollouts of t come from exactly these weights, and what decided a
step is on disk before the step changes anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tropd_mcore.config.derived import alpha
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.packing import PackedStep, pack
from tropd_mcore.data.verify import judge
from tropd_mcore.losses.method_table import Objective
from tropd_mcore.mcore.checkpoint import TrainState, save
from tropd_mcore.mcore.loss import LossResult, LossSettings, check_finite, make_distillation_loss
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.optimizer import MegatronOptimizer, OptimizerParamScheduler, learning_rate, optimizer_step
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.monitor.record import StepRecord
from tropd_mcore.train.clock import StepClock
from tropd_mcore.train.collective import gather_on_rank_zero, on_rank_zero, shared_fate
from tropd_mcore.train.gates import check_sampler_logprobs
from tropd_mcore.train.rollout_source import RolloutSource
from tropd_mcore.train.run_dir import RunDir
from tropd_mcore.train.score_source import ScoreSource
from tropd_mcore.train.tokens import local_columns, merge_columns, save_token_sample
from tropd_mcore.types import OptimizerReport, Rollout, TeacherScores, TokenTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the loop needs, each made once."""

    config: Config
    layout: Layout
    run_dir: RunDir
    student: Model
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective: Objective
    rollouts: RolloutSource
    scores: ScoreSource
    monitor: Monitor
    renderer: Renderer


class Trainer:
    """Runs the steps [first_step, last_step) of a run."""

    def __init__(self, parts: Parts, *, first_step: int, last_step: int) -> None:
        self.parts = parts
        self.first_step = first_step
        self.last_step = last_step

    def fit(self) -> None:
        """Train; a step that was interrupted before is repeated with the rollouts and scores it had."""
        parts = self.parts
        for step in range(self.first_step, self.last_step):
            clock = StepClock()
            with clock.phase("rollout"):
                rollouts = parts.rollouts.at_step(step)
            with clock.phase("pack"):
                packed = self.pack(rollouts)
            with clock.phase("teacher"):
                scores = parts.scores.at_step(step, rollouts, packed)
            with clock.phase("forward_backward"):
                results = self.forward_backward(step, rollouts, packed, scores)
                tokens = gather_tokens(packed, results, parts.layout)
            self.check_first_rollouts(step, tokens)
            with clock.phase("optimizer"):
                report = self.update(step, results)
            parts.monitor.log(step, self.record(step, rollouts, tokens, report, clock))
            self.keep(step, tokens)

    def pack(self, rollouts: list[Rollout]) -> PackedStep:
        """This rank's micro-batches of the step."""
        config, layout = self.parts.config, self.parts.layout
        return pack(
            rollouts,
            tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
            dp_size=layout.dp_size,
            dp_rank=layout.dp_rank,
            cp_size=layout.cp_size,
            cp_rank=layout.cp_rank,
            tp_size=layout.tp_size,
            aggregation=config.loss.aggregation,
            prefix_denominator=config.loss.prefix_denominator,
            device=self.parts.student.platform.device,
            micro_batch_multiple=layout.pp_size if layout.vpp_size > 1 else 1,
        )

    def forward_backward(
        self, step: int, rollouts: list[Rollout], packed: PackedStep, scores: list[TeacherScores | None]
    ) -> list[LossResult | None]:
        """Gradients of the step's loss, divided by its global token count; refuses a loss that is not finite."""
        parts = self.parts
        loss = make_distillation_loss(parts.student, parts.objective, scores, loss_settings(parts.config))
        results = run_pipeline(parts.student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
        with shared_fate(parts.layout.groups.control):
            sample_ids = [rollout.sample_id for rollout in rollouts]
            check_finite(results, packed.micro_batches, step=step, sample_ids=sample_ids)
        return results

    def check_first_rollouts(self, step: int, tokens: TokenTable | None) -> None:
        """At the first step of a launch: do sampler and trainer agree on the tokens that were sampled?"""
        parts = self.parts
        if step != self.first_step or not parts.config.gates.sampler_logprob:
            return

        def check() -> None:
            assert tokens is not None
            p99 = check_sampler_logprobs(tokens, parts.config)
            log.info("gates.sampler_logprob: sampler and trainer agree to %.1e nats (99th percentile)", p99)

        on_rank_zero(check, parts.layout.groups.control)

    def update(self, step: int, results: list[LossResult | None]) -> OptimizerReport:
        """One optimizer step; the loss and the token count of the report are of the whole job, on rank 0."""
        parts = self.parts
        loss_sum, token_count = sum_over_job(results, parts.layout)
        grad_norm, _ = optimizer_step(parts.student, parts.optimizer, parts.scheduler, step=step)
        return OptimizerReport(
            grad_norm=grad_norm,
            learning_rate=learning_rate(parts.optimizer),
            loss=loss_sum / max(token_count, 1),
            token_count=token_count,
        )

    def record(
        self,
        step: int,
        rollouts: list[Rollout],
        tokens: TokenTable | None,
        report: OptimizerReport,
        clock: StepClock,
    ) -> StepRecord | None:
        """Everything the metrics are made from, on rank 0; None elsewhere."""
        if tokens is None:
            return None
        config, renderer = self.parts.config, self.parts.renderer
        answered = [rollout for rollout in rollouts if rollout.answer is not None and config.verifier.kind != "none"]
        judged = [self.is_right(rollout) for rollout in answered]
        return StepRecord(
            table=tokens,
            rollouts=rollouts,
            optimizer=report,
            alpha=alpha(step, config),
            timings=clock.seconds,
            masked_samples=len(rollouts) - len(np.unique(tokens["sample_index"][tokens["on"].astype(bool)])),
            accuracy=sum(judged) / len(judged) if judged else None,
            special_ids=renderer.special_ids,
            policy_gradient=config.objective.policy_gradient,
        )

    def is_right(self, rollout: Rollout) -> bool:
        """Whether prefix and response together end in the prompt's answer."""
        assert rollout.answer is not None
        text = self.parts.renderer.decode(np.concatenate([rollout.prefix_ids, rollout.response_ids]))
        return judge(self.parts.config.verifier, text, rollout.answer)

    def keep(self, step: int, tokens: TokenTable | None) -> None:
        """Token values for the report; every `checkpoint_every` steps and at the end, a checkpoint."""
        parts, run = self.parts, self.parts.config.run
        with shared_fate(parts.layout.groups.control):
            if tokens is not None and parts.config.monitor.token_samples:
                save_token_sample(parts.run_dir.tokens(step), tokens, parts.config.monitor.token_samples)
        done = step + 1
        if done % run.checkpoint_every and done != self.last_step:
            return
        state = TrainState(parts.student, parts.optimizer, parts.scheduler)
        save(
            parts.run_dir.checkpoints,
            done,
            state,
            extra={},
            keep=run.keep_checkpoints,
            hf_folder=parts.config.student.path,
        )
        if tokens is not None:
            parts.run_dir.forget(
                scores_before=done, rollouts_before=done - run.keep_rollouts if run.keep_rollouts is not None else 0
            )


def loss_settings(config: Config) -> LossSettings:
    """How the student's log-probs are computed."""
    return LossSettings(
        temperature=config.rollout.temperature,
        chunk_tokens=config.loss.chunk_tokens,
        topk_overlap=config.monitor.topk_overlap,
    )


def gather_tokens(packed: PackedStep, results: Sequence[LossResult | None], layout: Layout) -> TokenTable | None:
    """The rows of all ranks on rank 0, None elsewhere. Collective."""
    mine: dict[str, np.ndarray] = {}
    if layout.is_last_stage and layout.tp_rank == 0:
        mine = local_columns(packed.micro_batches, [result.columns for result in results if result is not None])
    parts = gather_on_rank_zero(mine, layout.groups.control)
    return merge_columns(parts) if layout.rank == 0 else None


def sum_over_job(results: Sequence[LossResult | None], layout: Layout) -> tuple[float, int]:
    """(sum of the surrogate loss, number of tokens that count) over all ranks, on rank 0; 0 elsewhere. Collective."""
    mine = (0.0, 0)
    if layout.tp_rank == 0:
        present = [result for result in results if result is not None]
        mine = (sum(float(result.loss_sum) for result in present), sum(int(result.token_count) for result in present))
    parts = gather_on_rank_zero(mine, layout.groups.control)
    return sum(loss for loss, _ in parts), sum(count for _, count in parts)
