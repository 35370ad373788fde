"""Code that the ranks of the conversion and checkpoint tests run. Imports no transformers. Not a test module."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.packs import whole_sequence
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore.conversion import Job, hf_to_mcore, load_checkpoint, mcore_to_hf
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import RankEnvironment, destroy, initialize
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.mcore.platform import choose
from tropd_mcore.mcore.weights_io import export_hf, iterate_hf, load_hf
from tropd_mcore.types import MicroBatch
from tropd_mcore.weights.architecture import read_architecture


def open_layout(parallel: ParallelConfig) -> Job:
    """Our layout over the world that `run_on_ranks` has made."""
    platform = choose("cpu")
    environment = RankEnvironment(dist.get_rank(), dist.get_world_size(), local_rank=0)
    return Job(parallel, initialize(parallel, platform, seed=1, environment=environment), platform)


def to_mcore(parallel: ParallelConfig, pairs: list[tuple[Path, Path]]) -> None:
    """Convert each (Hugging Face folder, checkpoint)."""
    job = open_layout(parallel)
    for hf, out in pairs:
        hf_to_mcore(hf, out, job)
    destroy(job.layout)


def to_hf(parallel: ParallelConfig, pairs: list[tuple[Path, Path]]) -> None:
    """Convert each (checkpoint, Hugging Face folder)."""
    job = open_layout(parallel)
    for checkpoint, out in pairs:
        mcore_to_hf(checkpoint, out, job)
    destroy(job.layout)


def log_probs_of(parallel: ParallelConfig, folders: list[Path], tokens: Tensor) -> list[Tensor | None]:
    """Log-probs [T, V] of each folder's model in float32, on one rank of the last stage; None elsewhere."""
    job = open_layout(parallel)
    found = []
    for folder in folders:
        model = job.build(read_architecture(folder), "float32")
        load_hf(model, folder, job.layout)
        found.append(_log_probs(model, tokens))
    destroy(job.layout)
    return found


def names_and_digests(parallel: ParallelConfig, folder: Path, trainable_vpp: bool) -> list[tuple[str, str]]:
    """(name, digest) of what `iterate_hf` yields on this rank, in order."""
    from tests.dist.checkpoint_ranks import build_student

    job = open_layout(parallel)
    if trainable_vpp:
        model = build_student(folder, job)
    else:
        model = job.build(read_architecture(folder), "float32")
        load_hf(model, folder, job.layout)

    def digests(*, on_device: bool) -> list[tuple[str, str]]:
        stream = iterate_hf(model, job.layout, on_device=on_device)
        return [(name, hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()) for name, tensor in stream]

    with torch.no_grad():
        found = digests(on_device=False)
        assert digests(on_device=True) == found
    destroy(job.layout)
    return found


def export_refused(parallel: ParallelConfig, folder: Path, out: Path) -> str:
    """The error raised on this rank if rank 0 cannot write to `out`."""
    job = open_layout(parallel)
    model = job.build(read_architecture(folder), "float32")
    load_hf(model, folder, job.layout)
    try:
        export_hf(model, job.layout, out, source_folder=folder)
    except ModelError as error:
        return str(error)
    finally:
        destroy(job.layout)
    return "no error"


def read_refused(parallel: ParallelConfig, checkpoint: Path) -> None:
    """Load a checkpoint that cannot be loaded."""
    job = open_layout(parallel)
    try:
        load_checkpoint(checkpoint, job)
    finally:
        destroy(job.layout)


def _log_probs(model: Model, tokens: Tensor) -> Tensor | None:
    def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> Tensor:
        logits_TW = layer.logits(slice(0, layer.tokens))
        shards = [torch.empty_like(logits_TW) for _ in range(model.layout.tp_size)]
        dist.all_gather(shards, logits_TW.contiguous(), group=model.layout.groups.tp)
        return torch.cat(shards, dim=-1)[:, : model.arch.vocab_size].log_softmax(-1)

    result = run_pipeline(model, [whole_sequence(tokens)], len(tokens), loss=only_measure(measure), forward_only=True)[
        0
    ]
    return result if model.layout.tp_rank == 0 else None
