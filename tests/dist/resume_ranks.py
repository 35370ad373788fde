"""Code that the ranks of the tests of changed schedules and of `run.init_from` run. Not a test module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.dist.checkpoint_ranks import Setup, build_student, digests, train, train_state
from tests.dist.conversion_ranks import open_layout
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.optimizer import build_optimizer, learning_rate
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.weights_io import export_hf


@dataclass(frozen=True)
class Settings:
    """The settings of a rank's optimizer after a number of steps."""

    rates: list[float]
    """Learning rate of each step after the load, the same for every parameter group"""
    betas: set[tuple[float, float]]
    eps: set[float]
    counts: set[int]
    """Adam's steps, in groups that have parameters"""
    position: int
    """Of the schedule"""


def rates_after(folder: Path, source: Path, setup: Setup, steps: int, begin: bool = False) -> Settings:
    """Load `source` into what `setup` builds and take `steps` optimizer steps."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    assert state.optimizer is not None and state.scheduler is not None
    info = checkpoint.load(source, state, begin=begin)
    rates = []
    for step in range(info.step, info.step + steps):
        train(state, step, step + 1)
        groups = [group for part in state.optimizer.chained_optimizers for group in part.optimizer.param_groups]
        assert {group["lr"] for group in groups} == {learning_rate(state.optimizer)}
        rates.append(learning_rate(state.optimizer))
    found = Settings(
        rates=rates,
        betas={tuple(group["betas"]) for group in groups},
        eps={group["eps"] for group in groups},
        counts={int(group["step"]) for group in groups if group["params"]},
        position=state.scheduler.num_steps,
    )
    destroy(job.layout)
    return found


def all_rates_after(
    folder: Path, source: Path, setups: dict[str, Setup], steps: int, begin: bool = False
) -> dict[str, Settings]:
    """`rates_after` for each of several setups."""
    return {name: rates_after(folder, source, setup, steps, begin) for name, setup in setups.items()}


def movement_after(folder: Path, source: Path, setup: Setup) -> dict[str, torch.Tensor]:
    """The change of the main weights in the next step after a load."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    info = checkpoint.load(source, state)
    before = {name: value.detach().clone() for name, value in state.model.modules[0].named_parameters()}
    train(state, info.step, info.step + 1)
    moved = {name: value.detach() - before[name] for name, value in state.model.modules[0].named_parameters()}
    destroy(job.layout)
    return moved


def export_checkpoint(folder: Path, source: Path, out: Path, setup: Setup) -> None:
    """The weights of a checkpoint as a model folder, in the checkpoint's dtype."""
    job = open_layout(setup.parallel)
    model = build_student(folder, job, setup)
    checkpoint.load(source, TrainState(model))
    export_hf(model, job.layout, out, source_folder=folder)
    destroy(job.layout)


def trained_from(folder: Path, setup: Setup, source: Path | None, seed: int = 5) -> dict[str, str]:
    """Digests after two steps of a new run: from `folder`, or from the weights of the checkpoint `source`."""
    job = open_layout(setup.parallel)
    model = build_student(folder, job, setup)
    torch.manual_seed(seed)
    if source is not None:
        checkpoint.load(source, TrainState(model), begin=True)
    optimizer, scheduler = build_optimizer(model, setup.optimizer, setup.steps)
    state = TrainState(model, optimizer, scheduler)
    train(state, 0, 2)
    found = digests(state)
    destroy(job.layout)
    return found


def begun_with_optimizer(folder: Path, source: Path, setup: Setup) -> tuple[dict[str, str], dict[str, str], bool]:
    """Digests of a run that resumes `source` and of a new run that loads its optimizer, and whether the random state of
    the second run is unchanged."""
    job = open_layout(setup.parallel)
    resumed = train_state(folder, job, setup)
    checkpoint.load(source, resumed)
    begun = train_state(folder, job, setup)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    checkpoint.load(source, begun, begin=True)
    untouched = torch.equal(random, torch.get_rng_state())
    found = digests(resumed), digests(begun), untouched
    destroy(job.layout)
    return found
