"""Converts a Hugging Face folder to a Megatron checkpoint and back, at any layout of ranks or in one process.

This module does not convert training state: a converted checkpoint holds weights only. Invariant: hf -> mcore -> hf
gives the same bytes whatever layouts are used. Nothing is rounded, because the model has the dtype of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.checkpoint_info import HF_FOLDER, read_info
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.parallel import Layout, RankEnvironment, destroy, initialize
from tropd_mcore.mcore.platform import Platform, PlatformKind, choose
from tropd_mcore.mcore.weights_io import export_hf, load_hf
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.hf_folder import MAX_SHARD_BYTES, HfReader
from tropd_mcore.weights.publish import check_new_folder

_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Job:
    """The layout and platform of the ranks that run one conversion."""

    parallel: ParallelConfig
    layout: Layout
    platform: Platform

    def build(self, arch: Architecture, dtype: Dtype) -> Model:
        """Build a frozen model for this layout. Its weights are not loaded yet."""
        return build_model(arch, self.parallel, self.layout, self.platform, dtype=dtype, trainable=False)


@contextmanager
def open_job(parallel: ParallelConfig, kind: PlatformKind, environ: Mapping[str, str]) -> Iterator[Job]:
    """Join the job that torchrun started. If `environ` names no job, this process is a job of one rank.

    Raises ConfigError if the sizes in `parallel` do not fit the number of ranks.
    """
    alone = "RANK" not in environ and not dist.is_initialized()
    environment = RankEnvironment(0, 1, 0) if alone else RankEnvironment.from_environ(environ)
    platform = choose(kind, environment.local_rank)
    if alone:
        dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        layout = initialize(parallel, platform, seed=0, environment=environment)
        yield Job(parallel, layout, platform)
        destroy(layout)
    finally:
        if alone:
            dist.destroy_process_group()


def hf_to_mcore(hf: Path, out: Path, job: Job, *, dtype: Dtype | None = None) -> None:
    """Write the weights of the folder `hf` as a `torch_dist` checkpoint that loads at any other layout.

    config.json and tokenizer are copied too. `dtype` rounds the weights to that dtype; None keeps the folder's.
    Collective. Raises ModelError if the folder is damaged or `out` is not new.
    """
    check_new_folder(out)
    with HfReader(hf) as reader:
        model = job.build(reader.arch, dtype or stored_dtype(reader))
    load_hf(model, hf, job.layout)
    checkpoint.write(out, checkpoint.TrainState(model), step=0, extra={"source": "hf_to_mcore"}, hf_folder=hf)


def mcore_to_hf(
    source: Path, out: Path, job: Job, *, hf_folder: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder. A conversion or a training run may have written it.

    config.json and tokenizer come from `hf_folder` if it is given, otherwise from the checkpoint. Collective. Raises
    ModelError if the checkpoint is damaged or `out` is not new.
    """
    check_new_folder(out)
    model = load_checkpoint(source, job)
    export_hf(
        model,
        job.layout,
        out,
        source_folder=companion_folder(source, hf_folder),
        max_shard_bytes=max_shard_bytes,
    )


def load_checkpoint(source: Path, job: Job, *, dtype: Dtype | None = None) -> Model:
    """Return a frozen model with the weights of a checkpoint, in `dtype` or else in the checkpoint's dtype.

    Raises ModelError as `checkpoint.load` does.
    """
    info = read_info(source)
    model = job.build(info.architecture, dtype or _DTYPES[info.param_dtype])
    checkpoint.load(source, checkpoint.TrainState(model))
    return model


def companion_folder(source: Path, hf_folder: Path | None) -> Path:
    """Return the folder with config.json and tokenizer of a checkpoint. Raises ModelError if config.json is missing."""
    folder = hf_folder or source / HF_FOLDER
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json not found; name the model folder that training started from")
    return folder


def stored_dtype(reader: HfReader) -> Dtype:
    """Return the dtype that all tensors of a folder share. Raises ModelError if they differ or it is not supported."""
    found = reader.dtypes()
    if len(found) != 1 or not found <= set(_DTYPES):
        raise ModelError(
            f"model folder {reader.folder}: tensors are {', '.join(sorted(found))}; expected all {' or '.join(_DTYPES)}"
            "; set --dtype to round them to one dtype"
        )
    return _DTYPES[found.pop()]
