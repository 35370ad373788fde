"""Saves and loads the checkpoints of a run, in Megatron's `torch_dist` format.

A checkpoint holds weights, optimizer, schedule, random states and a small JSON file. This module does not handle
Hugging Face folders (`weights_io`). All ranks must see the same file system, and every function here is collective.

Invariants: a folder without the suffix `.partial` is complete. Nothing is loaded from a checkpoint unless it is bit for
bit the one that was written. On the same layout a resumed run continues bit for bit. On another tensor, pipeline or
data layout weights, main weights and moments are the same numbers, sharded again.

A checkpoint from a stranger is safe to read: see `torch_dist`. The files that this project adds are JSON and
safetensors only.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.average import KEY as AVERAGE
from tropd_mcore.mcore.average import WeightAverage
from tropd_mcore.mcore.checkpoint_digests import check_digests, make_digests, way_on
from tropd_mcore.mcore.checkpoint_info import (
    HF_FOLDER,
    INFO_FILE,
    PARTIAL_SUFFIX,
    CheckpointInfo,
    DamagedCheckpoint,
    complete_checkpoints,
    partial_checkpoints,
    read_info,
    step_folder,
)
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.rng_state import load_rng, save_rng
from tropd_mcore.mcore.torch_dist import InProcessSave, RestrictedLoad
from tropd_mcore.mcore.weights_io import synchronize_parameters
from tropd_mcore.progress import progress
from tropd_mcore.weights.architecture import check_same_architecture
from tropd_mcore.weights.hf_folder import copy_companions
from tropd_mcore.weights.host_memory import release_freed_memory
from tropd_mcore.weights.publish import fsync_tree, replace_folder

logger = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"
FULL_BYTES = 16 << 20
"""A disk with fewer free bytes than this counts as full, because a writer asks for a whole buffer at once."""
_MEGATRON_FILES = ("metadata.json", "common.pt", ".metadata")
_READ_ERRORS = (
    CheckpointException, CheckpointingException, OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError,
)  # fmt: skip
"""Errors that Megatron, torch and pickle raise for a missing, damaged or unacceptable file."""


@dataclass(frozen=True)
class TrainState:
    """Objects that a checkpoint saves or fills. A model alone (teacher, conversion) has no optimizer or scheduler."""

    model: Model
    optimizer: MegatronOptimizer | None = None
    scheduler: OptimizerParamScheduler | None = None
    average: WeightAverage | None = None
    """Moving average of the model's weights; None if there is none, and then the checkpoint has no tensors of it."""


def save(
    directory: Path,
    step: int,
    state: TrainState,
    extra: dict[str, Any],
    *,
    keep: int,
    hf_folder: Path | None = None,
    run: str | None = None,
) -> Path:
    """Write <directory>/step_<step> and remove all but the newest `keep` checkpoints; returns the folder.

    `extra` is plain JSON, and `run` is the identity of the run. config.json and tokenizer are copied from `hf_folder`.
    The JSON records the digest of every file. Until the last rename the folder has the suffix `.partial`, and the older
    checkpoints stay. If writing fails on one rank, raises ModelError on all ranks.
    """
    final = step_folder(directory, step)
    write(final, state, step=step, extra=extra, hf_folder=hf_folder, run=run)
    _on_first_rank(state.model.layout, lambda: _prune(directory, keep), f"checkpoints in {directory}: removing failed")
    return final


def write(
    final: Path,
    state: TrainState,
    *,
    step: int,
    extra: dict[str, Any],
    hf_folder: Path | None,
    run: str | None = None,
) -> None:
    """Write one checkpoint to `final`, replacing it if it exists. Raises ModelError as `save` does."""
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    try:
        _write(partial, final, state, step=step, extra=extra, hf_folder=hf_folder, run=run)
    except ModelError as error:
        if state.model.layout.rank == 0:  # every rank has failed; the unfinished folder may be filling the disk
            shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(f"{error}; choose a place with room and rights (run.dir), or make room there") from error
    release_freed_memory()  # otherwise the buffers of each checkpoint leave holes in the heap of every rank


def _write(
    partial: Path,
    final: Path,
    state: TrainState,
    *,
    step: int,
    extra: dict[str, Any],
    hf_folder: Path | None,
    run: str | None,
) -> None:
    """Fill the folder `partial`, then rename it to `final`."""
    model, layout = state.model, state.model.layout
    failed = f"checkpoint {final}: writing failed"
    _on_first_rank(layout, lambda: _make_empty(partial), failed)
    synchronize_parameters(model)
    try:
        with progress(logger, f"writing checkpoint {final}"):  # phase 1: tensors into the partial folder
            dist_checkpointing.save(
                _sharded_state(state, is_loading=False),
                str(partial),
                sharded_strategy=InProcessSave(layout.groups.control),
            )
    except (CheckpointException, OSError, RuntimeError) as error:
        raise ModelError(f"{failed} ({_reason(error, partial)})") from error
    # Phase 2: random states of each rank, and the tokenizer files.
    if state.optimizer is not None:
        _on_every_rank(layout, lambda: save_rng(partial, layout.rank), failed)
    if hf_folder is not None:
        _on_first_rank(layout, lambda: _copy_hf(hf_folder, partial / HF_FOLDER), failed)
    info = CheckpointInfo(
        step=step,
        architecture=model.arch,
        param_dtype=_dtype_name(model),
        layout=_layout_json(layout),
        optimizer=_optimizer_kind(state),
        scheduler=state.scheduler.state_dict() if state.scheduler is not None else None,
        average=state.average is not None,
        extra=extra,
        run=run,
        files=make_digests(partial, layout.groups.control),
    )
    # Phase 3: the JSON with all digests, then the flush and the rename that make the checkpoint complete.
    with progress(logger, f"flushing checkpoint {final} to disk"):
        _on_first_rank(layout, lambda: _publish(partial, final, info), failed)


def load(path: Path, state: TrainState, *, begin: bool = False, run: str | None = None) -> CheckpointInfo:
    """Fill model, optimizer, scheduler, average and random states from one checkpoint; returns its JSON.

    The model must have been built for the present layout, and the optimizer on top of it. Their contents are replaced.
    Without an optimizer only the weights are read, in the model's dtype. An average is read if `state` has one. Random
    states are restored if there is an optimizer and the layout is the one that wrote them. `begin` starts another run
    from the checkpoint: the schedule stands at step 0 and the random states stay as that run's seed set them. Rates,
    schedule and Adam's constants come from the given optimizer and scheduler, never from the checkpoint (see
    `train.resume_rules`). `run` is the identity of the run that resumes.

    Both errors come before anything is filled. Raises DamagedCheckpoint if a file is not the one that was written; the
    message names the newest whole checkpoint before it. Raises ModelError if the checkpoint belongs to another run,
    architecture or dtype, lacks the requested average, or has optimizer state of another form.
    """
    model, layout = state.model, state.model.layout
    info = _accept(path, state, run)
    sharded = _sharded_state(state, is_loading=True)
    try:
        # Copies into views of leaf parameters, which autograd refuses.
        with torch.no_grad(), progress(logger, f"reading checkpoint {path}"):
            loaded = dist_checkpointing.load(sharded, str(path), sharded_strategy=RestrictedLoad(layout.groups.control))
    except _READ_ERRORS as error:
        raise ModelError(f"checkpoint {path}: cannot be read ({_first_failure(error)})") from error
    with torch.no_grad():
        _load_modules(path, model, loaded)
        if state.optimizer is not None:
            state.optimizer.load_state_dict(loaded["optimizer"])
            _restore_settings(state)
        if state.average is not None:
            state.average.load_state(loaded[AVERAGE])
    if state.scheduler is not None:
        assert info.scheduler is not None, "a checkpoint with optimizer state has a schedule"
        state.scheduler.num_steps = 0 if begin else info.scheduler["num_steps"]
        state.scheduler.step(increment=0)
    if begin:
        return info
    if state.optimizer is not None and info.layout == _layout_json(layout):
        _on_every_rank(layout, lambda: load_rng(path, layout.rank), f"checkpoint {path}: reading failed")
    elif state.optimizer is not None:
        logger.info("checkpoint %s: written at layout %s; random states stay as seeded", path, info.layout)
    return info


def _accept(path: Path, state: TrainState, run: str | None) -> CheckpointInfo:
    """Check that the checkpoint fits `state` and is as it was written; returns its JSON and fills nothing."""
    control = state.model.layout.groups.control
    try:
        info = on_rank_zero(lambda: read_info(path), control)
        _check_fits(path, info, state, run)
        check_digests(path, info, control)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}{way_on(path, control)}") from error
    missing = [name for name in _MEGATRON_FILES if not (path / name).is_file()]
    if missing:  # only possible if the checkpoint has no digests, which list every file
        raise ModelError(f"checkpoint {path}: {', '.join(missing)} not found; it is damaged")
    return info


def _check_fits(path: Path, info: CheckpointInfo, state: TrainState, run: str | None) -> None:
    """Raise ModelError if the checkpoint of `info` does not fit `state`; the same error on all ranks."""
    if run is not None and info.run is not None and info.run != run:
        raise ModelError(
            f"checkpoint {path}: written by another run ({info.run}, this one is {run}); move it away and start from "
            "its weights with run.init_from, or resume in the run directory whose run.id file names the other run"
        )
    check_same_architecture(info.architecture, state.model.arch, source=f"checkpoint {path}")
    _check_optimizer(path, info, state)
    if state.average is not None and not info.average:
        raise ModelError(
            f"checkpoint {path}: holds no average of the weights, which a self-teaching objective needs to resume; "
            "restore the objective that wrote it, or start a new run.dir"
        )


def _sharded_state(state: TrainState, *, is_loading: bool) -> dict[str, Any]:
    """Return Megatron's sharding description of the tensors, which holds views of them.

    It is built anew on each call, because Megatron changes it in place.
    """
    chunks = _sharded_chunks(state.model)
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    sharded: dict[str, Any] = dict(zip(names, chunks, strict=True))
    if state.optimizer is not None:
        sharded["optimizer"] = state.optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=_metadata())
    if state.average is not None:
        sharded[AVERAGE] = state.average.sharded_state(_sharded_chunks(state.average.model))
    return sharded


def _sharded_chunks(model: Model) -> list[dict[str, Any]]:
    """Return Megatron's sharding description of the parameters of each chunk.

    Object shards are left out. The only ones are Transformer Engine's fp8 states, which bf16 and fp32 do not use.
    """
    found = []
    for module in model.modules:
        values = module.sharded_state_dict(metadata=_metadata())
        found.append({key: value for key, value in values.items() if not _is_extra_state(key, value)})
    return found


def _metadata() -> dict[str, Any]:
    """Settings of the format. Megatron stores process groups in this dict, so it must not be used twice.

    The memory-efficient exchange gathers the sharded optimizer state on the CPU of the first replica. The other
    exchange needs several times that much memory on every GPU.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }


def _is_extra_state(key: str, value: Any) -> bool:
    return key.endswith(_EXTRA_STATE) and isinstance(value, ShardedObject)


def _load_modules(path: Path, model: Model, loaded: dict[str, Any]) -> None:
    for index, module in enumerate(model.modules):
        name = "model" if len(model.modules) == 1 else f"model{index}"
        result = module.load_state_dict(loaded[name], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(_EXTRA_STATE)]
        if missing or result.unexpected_keys:
            raise ModelError(f"checkpoint {path}: lacks {missing} and has unknown {result.unexpected_keys}")


def _check_optimizer(path: Path, info: CheckpointInfo, state: TrainState) -> None:
    """Raise ModelError for optimizer state that would load without an error and then train differently."""
    if state.optimizer is None:
        return
    kind = _optimizer_kind(state)
    if info.optimizer is None:
        raise ModelError(f"checkpoint {path}: holds weights only, no optimizer state to resume from")
    if info.optimizer != kind:
        raise ModelError(
            f"checkpoint {path}: written with a {info.optimizer} optimizer, found a {kind} one; "
            f"set optimizer.distributed={str(info.optimizer == 'distributed').lower()}"
        )
    if info.param_dtype != _dtype_name(state.model):
        raise ModelError(
            f"checkpoint {path}: written with student.dtype={info.param_dtype}, found {_dtype_name(state.model)}"
        )


def _restore_settings(state: TrainState) -> None:
    """Set rates, betas and eps of each parameter group to this run's; loading has put the checkpoint's there."""
    assert state.optimizer is not None and state.scheduler is not None
    for part in state.optimizer.chained_optimizers:
        if part.is_stub_optimizer:  # this rank has no parameter of the part
            continue
        settings = part.config
        for group in part.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = state.scheduler.max_lr, state.scheduler.min_lr
            group["betas"], group["eps"] = (settings.adam_beta1, settings.adam_beta2), settings.adam_eps


def _optimizer_kind(state: TrainState) -> str | None:
    if state.optimizer is None:
        return None
    return "distributed" if state.optimizer.config.use_distributed_optimizer else "replicated"


def _dtype_name(model: Model) -> str:
    return str(model.config.params_dtype).removeprefix("torch.")


def _layout_json(layout: Layout) -> dict[str, int]:
    sizes = ("world_size", "tp_size", "pp_size", "vpp_size", "dp_size", "cp_size")
    return {name: getattr(layout, name) for name in sizes}


def _make_empty(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _copy_hf(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    copy_companions(source, target)


def _publish(partial: Path, final: Path, info: CheckpointInfo) -> None:
    (partial / INFO_FILE).write_text(info.to_json(), encoding="utf-8")
    fsync_tree(partial)
    replace_folder(partial, final)


def _prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the folders of interrupted saves."""
    for path in [*complete_checkpoints(directory)[:-keep], *partial_checkpoints(directory)]:
        shutil.rmtree(path)


def _on_first_rank(layout: Layout, action: Callable[[], None], failed: str) -> None:
    """Run `action` on rank 0; raise its failure as ModelError on all ranks."""
    _on_every_rank(layout, action if layout.rank == 0 else lambda: None, failed)


def _on_every_rank(layout: Layout, action: Callable[[], None], failed: str) -> None:
    """Run `action`; if it failed on any rank, raise ModelError on all ranks. Also a barrier."""
    problem: str | None = None
    try:
        action()
    except (OSError, SafetensorError, ModelError) as error:
        problem = f"rank {layout.rank}: {error}"
    problems: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(problems, problem, group=layout.groups.control)
    first = next((found for found in problems if found is not None), None)
    if first is not None:
        raise ModelError(f"{failed} ({first})")


def _reason(error: BaseException, partial: Path) -> str:
    """Return why writing failed. torch's stream errors do not mention a full disk, so that is checked here."""
    text = _first_failure(error)
    try:
        full = shutil.disk_usage(partial.parent).free < FULL_BYTES
    except OSError:
        full = False
    return f"No space left on device: {text}" if full and "No space" not in text else text


def _first_failure(error: BaseException) -> str:
    """Return one line of an error. torch's CheckpointException holds a traceback per rank; the first cause is used."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {_one_line(cause)}"
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    """Return the first sentence. torch's own errors continue with the advice to unpickle without restrictions."""
    return " ".join(str(error).split()).split(". ")[0][:300]
