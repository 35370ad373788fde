"""One training step of the trainer on one GPU at the sizes of real models: seconds, memory, operations.

    python -m benchmarks.gpu_step
    CUDA_VISIBLE_DEVICES= python -m benchmarks.gpu_step --small      # the same code on a CPU; its times mean nothing

The student is as large as Qwen3-1.7B and the teacher as Qwen3-8B, both with random bfloat16 weights, in the layers of
the platform (Transformer Engine, NCCL). A step scores every token with the teacher, trains on it with TrOPD and 64
candidates, and updates. `separate` is `none` with weight gradients that are rounded to bfloat16 before they are added.
Samples are random tokens: what is measured does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Spread, table, write_result
from tropd_mcore import logs
from tropd_mcore.config.objectives.trust_region import GuidanceConfig, OutlierConfig, TropdObjective
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.data.packing import PackedStep, pack
from tropd_mcore.mcore.loss import make_distillation_loss
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, Recompute, build_model
from tropd_mcore.mcore.optimizer import build_optimizer, optimizer_step
from tropd_mcore.mcore.parallel import Layout, RankEnvironment, destroy, initialize
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.platform import Platform, choose
from tropd_mcore.mcore.scoring import score_micro_batches
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.types import Rollout
from tropd_mcore.weights.architecture import Architecture

STUDENT = Architecture(
    family="qwen3", num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_heads=16, num_kv_heads=8, head_dim=128,
    vocab_size=151936, rope_theta=1e6, rope_scaling=None, rms_norm_eps=1e-6, tied_embeddings=True, qk_norm=True,
    qkv_bias=False, max_position_embeddings=40960, dtype="bfloat16",
)  # fmt: skip
TEACHER = replace(STUDENT, num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_heads=32, tied_embeddings=False)
TOPK, REPEATS = 64, 3
METHODS: dict[str, Recompute] = {"none": "none", "separate": "none", "selective": "selective", "full": "full"}


@dataclass(frozen=True)
class Row:
    """One way to train. Bytes are of PyTorch's allocator."""

    method: str
    tokens: int
    micro_batches: int
    score_s: Spread
    train_s: Spread
    """forward and backward of the student, with the loss"""
    update_s: Spread
    train_tflops: float
    """6 operations a parameter of the layers and the output layer, and token, attention and recomputation left out"""
    peak_bytes: int
    """of a step, both models included"""
    resting_bytes: int
    """between steps"""


@dataclass(frozen=True)
class Size:
    """What a step has."""

    student: Architecture
    teacher: Architecture
    samples: int
    sample_tokens: int
    tokens_per_micro_batch: int


FULL = Size(STUDENT, TEACHER, samples=10, sample_tokens=4096, tokens_per_micro_batch=20480)
_TINY = replace(STUDENT, num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
                vocab_size=512)  # fmt: skip
SMALL = Size(_TINY, _TINY, samples=4, sample_tokens=96, tokens_per_micro_batch=192)


def packed_step(size: Size, device: torch.device) -> PackedStep:
    """A quarter of each sample is prompt."""
    random, prompt = np.random.default_rng(0), size.sample_tokens // 4
    count = size.sample_tokens - prompt
    rollouts = [
        Rollout(
            sample_id=f"s{index}", prompt_id=f"p{index}", policy_version="0", finish_reason="length",
            prompt_ids=random.integers(0, size.student.vocab_size, prompt, dtype=np.int32),
            prefix_ids=np.zeros(0, dtype=np.int32),
            response_ids=random.integers(0, size.student.vocab_size, count, dtype=np.int32),
            rollout_logp=random.normal(-4.0, 1.0, count).astype(np.float32),
            trust_u=random.random(count, dtype=np.float32),
            carries_prefix_loss=False, answer=None,
        )
        for index in range(size.samples)
    ]  # fmt: skip
    return pack(
        rollouts, tokens_per_micro_batch=size.tokens_per_micro_batch, dp_size=1, dp_rank=0, cp_size=1, cp_rank=0,
        tp_size=1, aggregation="token_mean", prefix_denominator="joint", device=device,
    )  # fmt: skip


@torch.no_grad()
def with_random_weights(model: Model) -> Model:
    """Norms of one, everything else small."""
    for module in model.modules:
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    return model


def separate_weight_gradients(model: Model) -> None:
    """Undo what the platform has done for a trainable model."""
    for module in model.modules:
        for part in module.modules():
            if hasattr(part, "fuse_wgrad_accumulation"):
                part.fuse_wgrad_accumulation = False


def operations(arch: Architecture, tokens: int, rows: int) -> float:
    """Of the matrix products with weights, forward and backward."""
    heads = (2 * arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    layer = arch.hidden_size * (heads + 3 * arch.ffn_hidden_size)
    return 6.0 * (arch.num_layers * layer * tokens + arch.vocab_size * arch.hidden_size * rows)


def measured(size: Size, layout: Layout, platform: Platform, repeats: int) -> Iterator[Row]:
    """A row a method, each with a student of its own."""
    parallel, optimizer_config = ParallelConfig(), OptimizerConfig()
    settings = LossSettings(
        temperature=1.0, form="fused", backend="auto", weight_gradient="deferred", chunk_tokens=2048,
        overlap_chunks=False, logit_softcap=None, topk_overlap=False,
    )  # fmt: skip
    section: Any = TropdObjective(outlier=OutlierConfig(topk=TOPK), guidance=GuidanceConfig(enabled=False))
    objective = objective_of(section)
    packed = packed_step(size, platform.device)
    teacher = with_random_weights(
        build_model(size.teacher, parallel, layout, platform, dtype="bfloat16", trainable=False)
    )
    for name, recompute in METHODS.items():
        student = with_random_weights(
            build_model(
                size.student, parallel, layout, platform, dtype="bfloat16", trainable=True, recompute=recompute,
                optimizer=optimizer_config,
            )
        )  # fmt: skip
        if name == "separate":
            separate_weight_gradients(student)
        optimizer, scheduler = build_optimizer(student, optimizer_config, repeats + 1)
        times: list[tuple[float, float, float]] = []
        peak = resting = 0
        for repeat in range(repeats + 1):
            clock = Clock(platform.device)
            scores = score_micro_batches(teacher, packed.micro_batches, packed.pack_length, k=TOPK, settings=settings)
            score_s = clock.lap()
            loss = make_distillation_loss(student, objective, scores, [None] * len(scores), settings)
            run_pipeline(student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
            train_s = clock.lap()
            optimizer_step(student, optimizer, scheduler, step=repeat)
            update_s = clock.lap()
            del scores, loss
            peak, resting = clock.bytes()
            if repeat:
                times.append((score_s, train_s, update_s))
        score, train, update = (Spread.of(values) for values in zip(*times, strict=True))
        rows = sum(len(batch.rows_T) for batch in packed.micro_batches)
        tokens = packed.pack_length * len(packed.micro_batches)
        tflops = operations(size.student, tokens, rows) / train.median / 1e12
        yield Row(name, tokens, len(packed.micro_batches), score, train, update, tflops, peak, resting)
        del student, optimizer, scheduler
        gc.collect()
        if platform.device.type == "cuda":
            torch.cuda.empty_cache()


class Clock:
    """Seconds between laps, the device waited for, and bytes since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._at = time.perf_counter()

    def lap(self) -> float:
        """Since the last one."""
        if self._cuda:
            torch.cuda.synchronize()
        before, self._at = self._at, time.perf_counter()
        return self._at - before

    def bytes(self) -> tuple[int, int]:
        """(peak, now)"""
        return (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if self._cuda else (0, 0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--name", default="gpu_step", help="results/<name>.json")
    args = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    platform = choose("auto")
    layout = initialize(ParallelConfig(), platform, seed=1, environment=RankEnvironment(0, 1, 0))
    try:
        rows = list(measured(SMALL if args.small else FULL, layout, platform, args.repeats))
    finally:
        destroy(layout)
    cells = [
        [row.method, str(row.score_s), str(row.train_s), str(row.update_s), f"{row.train_tflops:.0f}",
         f"{row.peak_bytes / 2**30:.1f}", f"{row.resting_bytes / 2**30:.1f}"]
        for row in rows
    ]  # fmt: skip
    print(table(["recompute", "score s", "train s", "update s", "TF train", "peak GiB", "resting GiB"], cells))
    print(write_result(args.name, rows, command="python -m benchmarks.gpu_step"))


if __name__ == "__main__":
    logs.configure()
    main()
