"""Code that the ranks of the empty-step tests run: optimizer steps, one without a counted token. Not a test module."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.dist import average_ranks, checkpoint_ranks
from tests.dist.average_ranks import averaged
from tests.dist.checkpoint_ranks import Setup
from tests.dist.conversion_ranks import open_layout
from tests.dist.packs import whole_sequence
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.loss import LossResult
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.weights_io import synchronize_parameters
from tropd_mcore.train.trainer import Trainer
from tropd_mcore.types import MicroBatch, OptimizerReport


@dataclass(frozen=True)
class Course:
    """The state of this rank after each step, what was reported and what was logged."""

    digests: list[dict[str, str]]
    reports: list[OptimizerReport]
    lines: list[str]
    gradients_are_zero: bool


def course(folder: Path, setup: Setup, counting_ranks: list[list[int]]) -> Course:
    """One step per entry, which lists the data ranks whose tokens count in it."""
    job = open_layout(setup.parallel)
    state = averaged(folder, job, setup, 0.05)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tropd_mcore.train.trainer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    trainer = _trainer(state)
    digests, reports = [_digests(state)], []
    try:
        for step, ranks in enumerate(counting_ranks):
            batch_number = sum(bool(earlier) for earlier in counting_ranks[:step])
            results = _forward_backward(state.model, batch_number, job.layout.dp_rank in ranks)
            reports.append(trainer.update(step, results))
            digests.append(_digests(state))
        zero = all(not parameter.main_grad.any() for module in state.model.modules for parameter in module.parameters())
    finally:
        logger.removeHandler(handler)
        destroy(job.layout)
    return Course(digests, reports, lines, zero)


def resumed(folder: Path, directory: Path, setup: Setup) -> dict[str, str]:
    """A first step without a token, a save, a load into fresh parts, and a step; this rank's state after it."""
    job = open_layout(setup.parallel)
    state = averaged(folder, job, setup, 0.05)
    _trainer(state).update(0, _forward_backward(state.model, 0, counts=False))
    checkpoint.save(directory, 1, state, {}, keep=1)
    state = averaged(folder, job, setup, 0.05)
    checkpoint.load(directory / "step_000001", state)
    _trainer(state).update(1, _forward_backward(state.model, 0, counts=True))
    found = _digests(state)
    destroy(job.layout)
    return found


def _trainer(state: TrainState) -> Trainer:
    """An objective that can update, and nothing else."""
    trainer = Trainer.__new__(Trainer)
    trainer.components = SimpleNamespace(  # type: ignore[assignment]
        student=state.model, optimizer=state.optimizer, scheduler=state.scheduler,
        average=state.average, layout=state.model.layout,
    )  # fmt: skip
    return trainer


def _digests(state: TrainState) -> dict[str, str]:
    """Weights, optimizer, schedule, average: everything that a step may change."""
    synchronize_parameters(state.model)
    return checkpoint_ranks.digests(state) | {f"average {k}": v for k, v in average_ranks.digests(state).items()}


def _forward_backward(model: Model, number: int, counts: bool) -> list[LossResult | None]:
    generator = torch.Generator().manual_seed(1000 * number + model.layout.dp_rank)
    batches = [whole_sequence(torch.randint(300, (16,), generator=generator)) for _ in range(2)]
    loss = partial(_loss, model, counts)
    return run_pipeline(model, batches, 16, loss=loss, forward_only=False)


def _loss(
    model: Model, counts: bool, layer: OutputLayer, micro_batch: MicroBatch, index: int
) -> tuple[Tensor, Tensor, LossResult]:
    """The logits' sum of squares, or nothing."""
    assert model.head is not None
    logits_TW: Any = model.head.given_logits(layer).logits_TW
    loss_sum = logits_TW.float().square().sum() * float(counts)
    count = torch.tensor(len(logits_TW) * int(counts))
    return loss_sum, count, LossResult(loss_sum.detach(), count, ~loss_sum.isfinite(), {})
