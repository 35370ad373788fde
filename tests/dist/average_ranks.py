"""Code that the ranks of the weight-average tests run: optimizer steps, the average, saves. Not a test module."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.dist.checkpoint_ranks import Setup, train, train_state
from tests.dist.conversion_ranks import open_layout
from tropd_mcore.config.fields import Dtype
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.average import WeightAverage
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.conversion import Job
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.weights_io import iterate_hf, synchronize_parameters

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Course:
    """One parameter per name on this rank, at the start and after each step. All are detached copies."""

    student: list[Weights]
    exact: list[Weights]
    rounded: list[Weights]


def averaged(folder: Path, job: Job, setup: Setup, rate: float, dtype: Dtype | None = None) -> TrainState:
    state = train_state(folder, job, setup)
    average = WeightAverage(state.model, setup.parallel, dtype=dtype or setup.dtype, rate=rate)
    return TrainState(state.model, state.optimizer, state.scheduler, average)


def follow(state: TrainState, first: int, last: int) -> None:
    """Steps first+1 ... last, the average after each."""
    assert state.average is not None
    for step in range(first, last):
        train(state, step, step + 1)
        state.average.update()


def course(folder: Path, setup: Setup, rate: float, dtype: Dtype | None, steps: int) -> Course:
    job = open_layout(setup.parallel)
    state = averaged(folder, job, setup, rate, dtype)
    found = Course([], [], [])
    for step in range(steps + 1):
        if step:
            follow(state, step - 1, step)
        synchronize_parameters(state.model)
        found.student.append(_copies(state.model))
        assert state.average is not None
        found.rounded.append(_copies(state.average.model))
        found.exact.append(_exact(state.average))
    destroy(job.layout)
    return found


def trained_alone(folder: Path, setup: Setup, steps: int) -> Weights:
    """The student's parameters on this rank after the same number of steps without an average."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    train(state, 0, steps)
    synchronize_parameters(state.model)
    found = _copies(state.model)
    destroy(job.layout)
    return found


def _copies(model: Model) -> Weights:
    return {
        f"{index} {name}": value.detach().clone()
        for index, module in enumerate(model.modules)
        for name, value in module.named_parameters()
    }


def _exact(average: WeightAverage) -> Weights:
    return {
        f"{index} {name}": value.clone() for index, chunk in enumerate(average._exact) for name, value in chunk.items()
    }


def digests(state: TrainState) -> dict[str, str]:
    assert state.average is not None
    values = _exact(state.average) | {f"rounded {k}": v for k, v in _copies(state.average.model).items()}
    values |= {f"student {k}": v for k, v in _copies(state.model).items()}
    return {
        name: hashlib.sha256(value.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in values.items()
    }


def straight_and_resumed(folder: Path, directory: Path, setup: Setup) -> tuple[dict[str, str], dict[str, str]]:
    """Digests after 4 steps in one run, and after 2 steps, a save, a load into a fresh model and 2 more steps."""
    job = open_layout(setup.parallel)
    state = averaged(folder, job, setup, 0.05)
    follow(state, 0, 2)
    checkpoint.save(directory, 2, state, {}, keep=2)
    follow(state, 2, 4)
    straight = digests(state)
    state = averaged(folder, job, setup, 0.05)
    info = checkpoint.load(directory / "step_000002", state)
    assert info.average
    follow(state, 2, 4)
    resumed = digests(state)
    destroy(job.layout)
    return straight, resumed


def exports_of_the_average(folder: Path, path: Path, setup: Setup) -> dict[str, Tensor]:
    """{Hugging Face name: tensor} of the average in a checkpoint, on rank 0."""
    job = open_layout(setup.parallel)
    state = averaged(folder, job, setup, 0.05)
    checkpoint.load(path, state)
    assert state.average is not None
    found = dict(iterate_hf(state.average.model, job.layout))
    destroy(job.layout)
    return found


def save_and_load(folder: Path, directory: Path, saved_with: bool, loaded_with: bool) -> None:
    """Save a checkpoint with or without an average, and load it into a state with or without one."""
    job = open_layout(Setup().parallel)

    def state(with_average: bool) -> TrainState:
        return averaged(folder, job, Setup(), 0.05) if with_average else train_state(folder, job, Setup())

    try:
        saved = state(saved_with)
        train(saved, 0, 1)
        checkpoint.save(directory, 1, saved, {}, keep=1)
        checkpoint.load(directory / "step_000001", state(loaded_with))
    finally:
        destroy(job.layout)
