"""Code that the ranks of the checkpoint tests run: optimizer steps, saves, loads, digests. Not a test module."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import load_plain_tensors
from torch import Tensor

from tests.dist.conversion_ranks import open_layout
from tests.dist.packs import whole_sequence
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore import checkpoint, checkpoint_digests
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.checkpoint_info import latest
from tropd_mcore.mcore.conversion import Job
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer, optimizer_step
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.weights_io import iterate_hf, load_hf
from tropd_mcore.types import MicroBatch
from tropd_mcore.weights.architecture import read_architecture

STEPS = 6
"""Steps of the schedule. The tests run fewer."""


@dataclass(frozen=True)
class Setup:
    """One way to train the same model."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Dtype = "bfloat16"
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=3e-3, min_learning_rate=1e-4, schedule="cosine", warmup_steps=1, clip_grad_norm=0.5
        )
    )
    steps: int = STEPS


def build_student(folder: Path, job: Job, setup: Setup | None = None) -> Model:
    """A loaded trainable model."""
    setup = setup or Setup(dtype="float32")
    model = build_model(
        read_architecture(folder), job.parallel, job.layout, job.platform,
        dtype=setup.dtype, trainable=True, optimizer=setup.optimizer,
    )  # fmt: skip
    load_hf(model, folder, job.layout)
    return model


def train_state(folder: Path, job: Job, setup: Setup) -> TrainState:
    model = build_student(folder, job, setup)
    optimizer, scheduler = build_optimizer(model, setup.optimizer, setup.steps)
    return TrainState(model, optimizer, scheduler)


def train(state: TrainState, first: int, last: int) -> None:
    """Steps first+1 ... last, on tokens determined by step and data rank. The loss is the logits' sum of squares."""
    layout = state.model.layout
    assert state.optimizer is not None and state.scheduler is not None
    for step in range(first + 1, last + 1):
        generator = torch.Generator().manual_seed(1000 * step + layout.dp_rank)
        batches = [whole_sequence(torch.randint(300, (16,), generator=generator)) for _ in range(2)]
        run_pipeline(state.model, batches, 16, loss=partial(_squares, state.model), forward_only=False)
        optimizer_step(state.model, state.optimizer, state.scheduler, step=step)
        torch.rand(3)  # advances the host's random state, as dropout would


def _squares(model: Model, layer: OutputLayer, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, None]:
    assert model.head is not None
    logits_TW = model.head.given_logits(layer).logits_TW
    return logits_TW.float().square().sum(), torch.tensor(logits_TW.shape[0]), None


def digests(state: TrainState) -> dict[str, str]:
    """Digest of every part of this rank's training state, exactly as it is in memory."""
    found: dict[str, str] = {"random": _digest(torch.get_rng_state())}
    for index, module in enumerate(state.model.modules):
        for name, parameter in module.named_parameters():
            found[f"chunk {index} {name}"] = _digest(parameter)
    assert state.optimizer is not None and state.scheduler is not None
    for part_index, part in enumerate(state.optimizer.chained_optimizers):
        for group_index, group in enumerate(part.optimizer.param_groups):
            if not group["params"]:
                continue  # this data rank has no shard of the group: Megatron may or may not count its steps
            where = f"optimizer {part_index} group {group_index}"
            found[where] = repr([(key, group[key]) for key in ("step", "lr", "weight_decay") if key in group])
            for index, main in enumerate(group["params"]):
                found[f"{where} main {index}"] = _digest(main)
                for key, value in sorted(part.optimizer.state[main].items()):
                    found[f"{where} {key} {index}"] = _digest(value)
    found["schedule"] = repr((state.scheduler.num_steps, state.scheduler.get_lr(state.optimizer.param_groups[0])))
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def straight_and_resumed(folder: Path, directory: Path, setup: Setup) -> tuple[dict[str, str], dict[str, str]]:
    """Digests after 4 steps in one run, and after 2 steps, a save, a load into a fresh model and 2 more steps."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    train(state, 0, 2)
    checkpoint.save(directory, 2, state, {"note": "two"}, keep=2)
    train(state, 2, 4)
    straight = digests(state)
    torch.rand(11)
    state = train_state(folder, job, setup)
    info = checkpoint.load(directory / "step_000002", state)
    assert (info.step, info.extra) == (2, {"note": "two"})
    train(state, 2, 4)
    resumed = digests(state)
    destroy(job.layout)
    return straight, resumed


def train_and_save(
    folder: Path, directory: Path, setup: Setup, steps: list[int], keep: int = 9, run: str | None = None
) -> dict[str, Any]:
    """Train from the start and save at each of `steps`. Returns what is left running afterwards."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    done = 0
    for step in steps:
        train(state, done, step)
        checkpoint.save(directory, step, state, {}, keep=keep, hf_folder=folder, run=run)
        done = step
    destroy(job.layout)
    return {
        "children": [child.name() for child in psutil.Process().children(recursive=True)],
        "active": len(multiprocessing.active_children()),
    }


def exported_after_a_step(folder: Path, setups: list[Setup]) -> list[dict[str, str]]:
    """Digest by name of what `iterate_hf` yields right after one optimizer step, for each setup."""
    found = []
    for setup in setups:
        job = open_layout(setup.parallel)
        state = train_state(folder, job, setup)
        train(state, 0, 1)
        found.append({name: _digest(tensor) for name, tensor in iterate_hf(state.model, job.layout)})
        destroy(job.layout)
    return found


def load_and_save(folder: Path, source: Path, directory: Path, setup: Setup) -> None:
    """Load `source`, save it again at this layout, and take one more step."""
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    info = checkpoint.load(source, state)
    checkpoint.save(directory, info.step, state, info.extra, keep=9)
    train(state, info.step, info.step + 1)
    destroy(job.layout)


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    job = open_layout(ParallelConfig())
    loaded = load_plain_tensors(str(path))
    destroy(job.layout)
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def killed_while_saving(folder: Path, directory: Path, moment: str) -> None:
    """Save step 1, then die by SIGKILL in the middle of saving step 2."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    job = open_layout(ParallelConfig())
    state = train_state(folder, job, Setup())
    train(state, 0, 1)
    checkpoint.save(directory, 1, state, {}, keep=9)
    train(state, 1, 2)
    setattr(checkpoint, moment, die)
    checkpoint.save(directory, 2, state, {}, keep=9)


def save_fails(folder: Path, directory: Path) -> str:
    """The error of a save that cannot work, as seen by this rank."""
    job = open_layout(ParallelConfig())
    state = train_state(folder, job, Setup())
    try:
        checkpoint.save(directory, 1, state, {}, keep=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        dist.barrier()
        destroy(job.layout)
    return "saved"


def load_fails(folder: Path, path: Path, setup: Setup, run: str | None = None) -> None:
    """Load a checkpoint that cannot be loaded. The error is raised in the test."""
    job = open_layout(setup.parallel)
    try:
        checkpoint.load(path, train_state(folder, job, setup), run=run)
    finally:
        destroy(job.layout)


def loads_with_flips(folder: Path, path: Path, setup: Setup, flips: list[tuple[str, int]]) -> list[str]:
    """The error of `load` on this rank for each (file, bit) of the checkpoint that is flipped.

    Asserts that no failed load changed any tensor, and that the checkpoint loads once it is repaired.
    """
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    before = digests(state)
    said = []
    for file, bit in flips:
        _flip(path / file, bit, job)
        try:
            checkpoint.load(path, state)
            said.append("loaded")
        except ModelError as error:
            said.append(str(error))
        _flip(path / file, bit, job)
    assert digests(state) == before
    checkpoint.load(path, state)
    assert digests(state) != before
    destroy(job.layout)
    return said


def _flip(file: Path, bit: int, job: Job) -> None:
    """Flip one bit of a file. All ranks see it afterwards."""
    dist.barrier(group=job.layout.groups.control)
    if job.layout.rank == 0:
        content = bytearray(file.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    dist.barrier(group=job.layout.groups.control)


def resumes(folder: Path, directory: Path, setup: Setup) -> tuple[str, int]:
    """The newest checkpoint's name and the schedule's position after it was loaded."""
    newest = latest(directory)
    assert newest is not None
    job = open_layout(setup.parallel)
    state = train_state(folder, job, setup)
    checkpoint.load(newest, state)
    assert state.scheduler is not None
    done = state.scheduler.num_steps
    destroy(job.layout)
    return newest.name, done


def digests_of_a_slow_file_system(folder: Path) -> list[str]:
    """Names with a digest if each rank sees only its own files and those of lower ranks, as may happen on NFS."""
    rank, names = dist.get_rank(), checkpoint_digests._names
    checkpoint_digests._names = lambda folder: [
        name for name in names(folder) if checkpoint_digests._owner(name) <= rank
    ]
    try:
        return sorted(checkpoint_digests.make_digests(folder, dist.new_group()))
    finally:
        checkpoint_digests._names = names
