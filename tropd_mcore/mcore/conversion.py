"""Hugging Face folder <-> Megatron checkpoint, at any layout of ranks, also in one plain process.

Not for training state: a converted checkpoint holds weights only. Invariant: hf -> mcore -> hf gives the same bytes,
whatever the layouts on the way, because nothing is rounded: the model is built in the dtype of the files.
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
    """The ranks that work on one conversion."""

    parallel: ParallelConfig
    layout: Layout
    platform: Platform

    def build(self, arch: Architecture, dtype: Dtype) -> Model:
        """A frozen model of this layout, not yet loaded."""
        return build_model(arch, self.parallel, self.layout, self.platform, dtype=dtype, trainable=False)


@contextmanager
def open_job(parallel: ParallelConfig, kind: PlatformKind, environ: Mapping[str, str]) -> Iterator[Job]:
    """Join the job that torchrun started, or be a job of one process where `environ` names none.

    Raises ConfigError where the sizes in `parallel` do not fit the number of ranks.
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

    config.json and tokenizer go along. `dtype` rounds to that dtype; None keeps the folder's. Collective. Raises
    ModelError where the folder is damaged or `out` is not new.
    """
    check_new_folder(out)
    with HfReader(hf) as reader:
        model = job.build(reader.arch, dtype or stored_dtype(reader))
    load_hf(model, hf, job.layout)
    checkpoint.write(out, checkpoint.TrainState(model), step=0, extra={"source": "hf_to_mcore"}, hf_folder=hf)


def mcore_to_hf(
    source: Path, out: Path, job: Job, *, hf_folder: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the weights of a checkpoint, converted or of a training run, as a Hugging Face folder.

    config.json and tokenizer come from the checkpoint, or from `hf_folder`. Collective. Raises ModelError where the
    checkpoint is damaged or `out` is not new.
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
    """A frozen model with the weights of a checkpoint, in its dtype or in `dtype`. Raises ModelError as `load` does."""
    info = read_info(source)
    model = job.build(info.architecture, dtype or _DTYPES[info.param_dtype])
    checkpoint.load(source, checkpoint.TrainState(model))
    return model


def companion_folder(source: Path, hf_folder: Path | None) -> Path:
    """Where config.json and tokenizer of a checkpoint are. Raises ModelError where there are none."""
    folder = hf_folder or source / HF_FOLDER
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: config.json not found; name the folder that the training started from")
    return folder


def stored_dtype(reader: HfReader) -> Dtype:
    """The one dtype of a folder's tensors. Raises ModelError where there are several, or one that is not supported."""
    found = reader.dtypes()
    if len(found) != 1 or not found <= set(_DTYPES):
        raise ModelError(
            f"model folder {reader.folder}: tensors are {', '.join(sorted(found))}; expected all {' or '.join(_DTYPES)}"
            ", or choose one to round to (--dtype)"
        )
    return _DTYPES[found.pop()]
