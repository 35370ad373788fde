"""Checks that a converted model is the same model: tensors byte by byte, and log-probs in float32.

This module does not check the numerics of bfloat16 or of GPU kernels. Invariant: transformers alone computes the
Hugging Face side, and the training code computes the Megatron side.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tropd_mcore.data.packing import one_sample
from tropd_mcore.data.tokenizer import load_tokenizer
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore.conversion import Job, load_checkpoint
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.mcore.weights_io import iterate_hf
from tropd_mcore.progress import counted, progress
from tropd_mcore.types import MicroBatch
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import HfReader
from tropd_mcore.weights.independent import independent_model

log = logging.getLogger(__name__)

LIMIT_NATS = 1e-4
"""Largest allowed difference of a float32 log-prob between two implementations of one model."""
RANDOM_SEQUENCES = 3
RANDOM_TOKENS = 64
"""Length of the random sequences; even, like every pack."""
TEXTS = (
    "A train leaves at 9:40 and arrives at 12:05. How many minutes does the trip take? The trip takes 145 minutes.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Die Fläche eines Kreises ist πr². 圆的面积等于圆周率乘以半径的平方。",
)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    compared: str
    found: str
    limit: str
    passed: bool


def compare_tensors(name: str, expected: HfReader, found: Iterable[tuple[str, Tensor]]) -> list[Check]:
    """Compare names, dtypes and bytes of all tensors with those of a folder. Holds one tensor at a time."""
    plan = [tensor_name for tensor_name, _ in hf_weight_plan(expected.arch)]
    seen: list[str] = []
    different: list[str] = []
    with progress(log, f"{name}: comparing", total=len(plan), unit="tensors") as state:
        for tensor_name, tensor in counted(found, state):
            seen.append(tensor_name)
            if tensor_name not in plan:
                continue
            original = expected.tensor(tensor_name)
            if original.dtype != tensor.dtype or not torch.equal(_bytes(original), _bytes(tensor)):
                different.append(tensor_name)
    odd = sorted(set(plan) ^ set(seen))
    return [
        Check(f"{name}: names", f"{len(plan)} tensors", _summary(odd, "the same"), "the same", not odd),
        Check(f"{name}: bytes", f"{len(seen)} tensors", _summary(different, "equal"), "equal", not different),
    ]


def compare_log_probs(name: str, expected: list[Tensor], found: list[Tensor], labels: list[str]) -> list[Check]:
    """Check the largest difference of the log-probs [T, V] of each sequence, in nats."""
    checks = []
    for label, left, right in zip(labels, expected, found, strict=True):
        difference = float((left - right).abs().max())
        checks.append(
            Check(
                f"{name}: log-probs, {label}",
                f"{left.shape[0]} x {left.shape[1]}",
                f"{difference:.1e} nats",
                f"{LIMIT_NATS:.0e} nats",
                difference <= LIMIT_NATS,  # False for NaN
            )
        )
    return checks


def verify(hf: Path, job: Job, *, mcore: Path | None, other_hf: Path | None, seed: int = 0) -> list[Check]:
    """Compare the folder `hf` with a checkpoint, with another folder, or with both. Needs a job of one process.

    Raises ModelError if one of them cannot be read, and ConfigError if there are several ranks.
    """
    if job.layout.world_size != 1:
        raise ConfigError(
            [f"verification runs in one process, found {job.layout.world_size} ranks; leave out torchrun"]
        )
    with HfReader(hf) as reader:
        reader.check()
        sequences = sample_sequences(hf, reader.arch.vocab_size, seed)
        labels, ids = [label for label, _ in sequences], [tokens for _, tokens in sequences]
        with progress(log, f"log-probs of {hf} with transformers"):
            expected = hf_log_probs(hf, ids)
        checks = []
        if mcore is not None:
            stored = load_checkpoint(mcore, job)
            checks += compare_tensors("mcore", reader, iterate_hf(stored, job.layout))
            del stored
            model = load_checkpoint(mcore, job, dtype="float32")
            checks += compare_log_probs("mcore", expected, mcore_log_probs(model, ids), labels)
            del model
        if other_hf is not None:
            with HfReader(other_hf) as other:
                other.check()
                checks += compare_tensors("other-hf", reader, _all_tensors(other))
            checks += compare_log_probs("other-hf", expected, hf_log_probs(other_hf, ids), labels)
    return checks


def sample_sequences(hf: Path, vocab_size: int, seed: int) -> list[tuple[str, Tensor]]:
    """Return (label, token ids [P]) of random ids and, if the folder has a tokenizer, of a few real texts."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        (f"random ids {index + 1}", torch.randint(vocab_size, (RANDOM_TOKENS,), generator=generator))
        for index in range(RANDOM_SEQUENCES)
    ]
    if (hf / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(hf)
        for index, text in enumerate(TEXTS):
            ids = tokenizer(text)["input_ids"]
            sequences.append((f"text {index + 1}", torch.tensor(ids[: len(ids) // 2 * 2])))
    return sequences


@torch.no_grad()
def hf_log_probs(folder: Path, sequences: list[Tensor]) -> list[Tensor]:
    """Return log-probs [T, V], nats, of transformers' model in float32 with its eager attention."""
    model = independent_model(folder)
    return [model(tokens[None]).logits[0].log_softmax(-1) for tokens in sequences]


def mcore_log_probs(model: Model, sequences: list[Tensor]) -> list[Tensor]:
    """Return log-probs [T, V], nats, of every position of each sequence, on the CPU. The vocabulary is not sharded."""
    assert model.shard.start == 0 and model.shard.stop == model.padded_vocab_size, "one tensor rank"

    def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> Tensor:
        logits_TW = layer.logits(slice(0, layer.tokens))
        return logits_TW[:, : model.arch.vocab_size].log_softmax(-1).cpu()

    results = []
    for tokens in sequences:
        # Every position is a row. The last one needs some target id, which is never read.
        batch = one_sample(np.append(tokens.numpy(), 0), len(tokens), model.platform.device)
        results += run_pipeline(model, [batch], len(tokens), loss=only_measure(measure), forward_only=True)
    return [result for result in results if result is not None]


def table(checks: list[Check]) -> str:
    """Return the report as aligned text: one line per check, then a verdict."""
    rows = [("check", "compared", "found", "limit", "")]
    rows += [(c.name, c.compared, c.found, c.limit, "ok" if c.passed else "MISS") for c in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    misses = sum(not check.passed for check in checks)
    verdict = f"{len(checks)} checks, all passed" if not misses else f"{misses} of {len(checks)} checks missed"
    return "\n".join([*lines, verdict])


def _all_tensors(reader: HfReader) -> Iterator[tuple[str, Tensor]]:
    for name, _ in hf_weight_plan(reader.arch):
        yield name, reader.tensor(name)


def _bytes(tensor: Tensor) -> Tensor:
    """View a tensor as bytes, so -0.0 differs from 0.0, and NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def _summary(names: list[str], good: str) -> str:
    if not names:
        return good
    return f"{len(names)} differ: {names[0]}" + (", ..." if len(names) > 1 else "")
