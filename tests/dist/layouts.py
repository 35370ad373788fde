"""Code that the ranks of a layout test run: build student and teacher, score, train, gather results on rank 0.

This is not a test module. The rank processes import it, so it does not import transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.objectives.trust_region import GuidanceConfig, OutlierConfig, TropdObjective
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.data.packing import PackedStep, pack
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.kernel.support_loss import WeightGradientMode
from tropd_mcore.mcore.loss import LossResult, make_distillation_loss
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, Recompute, build_model
from tropd_mcore.mcore.optimizer import build_optimizer, learning_rate, optimizer_step
from tropd_mcore.mcore.parallel import Layout, RankEnvironment, destroy, initialize
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.mcore.platform import PlatformKind, choose
from tropd_mcore.mcore.scoring import score_micro_batches, student_pass
from tropd_mcore.mcore.weights_io import iterate_hf, load_hf, named_parameters
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores
from tropd_mcore.weights.architecture import read_architecture

UNSHARDED_GRADIENTS = OptimizerConfig(distributed=False)
"""Every data rank holds all reduced gradients, not only its shard of them."""


@dataclass(frozen=True)
class Case:
    """One way to run the same step."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ("mlp",)
    recompute_layers: int | None = None
    dtype: Dtype = "float32"
    tokens_per_micro_batch: int = 48
    pack_multiple: int = 1
    """Factor on the granularity of the pack length: more of it is a longer padding tail."""
    optimizer: OptimizerConfig = field(default=UNSHARDED_GRADIENTS)
    form: Literal["fused", "logits"] = "fused"
    backend: Literal["eager", "triton"] = "eager"
    weight_gradient: WeightGradientMode = "deferred"
    overlap_chunks: bool = False
    chunk_tokens: int = 7

    def settings(self, temperature: float) -> LossSettings:
        return LossSettings(
            temperature=temperature,
            form=self.form,
            backend=self.backend,
            weight_gradient=self.weight_gradient,
            chunk_tokens=self.chunk_tokens,
            overlap_chunks=self.overlap_chunks,
            logit_softcap=None,
            topk_overlap=True,
            measure_force=True,
        )

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
            context=self.context,
            sequence_parallel=self.sequence_parallel,
        )


@dataclass(frozen=True)
class Constants:
    """The constants of the reference, which these processes do not import."""

    k: int
    temperature: float
    beta: float
    outlier_weight: float

    def objective(self) -> Any:
        return objective_of(
            TropdObjective(
                guidance=GuidanceConfig(beta=self.beta),
                outlier=OutlierConfig(topk=self.k, weight=self.outlier_weight),
            )
        )


@contextmanager
def layout_of(case: Case, kind: PlatformKind = "cpu") -> Iterator[tuple[Layout, Any]]:
    """The layout of a case and its platform, inside `run_on_ranks`; on cuda, one rank on the first GPU."""
    platform = choose(kind)
    environment = RankEnvironment(dist.get_rank(), dist.get_world_size(), local_rank=0)
    layout = initialize(case.parallel, platform, seed=1, environment=environment)
    try:
        yield layout, platform
    finally:
        destroy(layout)


def build(folder: Path, case: Case, layout: Layout, platform: Any, *, trainable: bool) -> Model:
    """A loaded model."""
    model = build_model(
        read_architecture(folder),
        case.parallel,
        layout,
        platform,
        dtype=case.dtype,
        trainable=trainable,
        recompute=case.recompute if trainable else "none",
        recompute_modules=case.recompute_modules,
        recompute_layers=case.recompute_layers,
        optimizer=case.optimizer if trainable else None,
    )
    load_hf(model, folder, layout)
    return model


def pack_for(rollouts: list[Rollout], case: Case, layout: Layout, device: torch.device | str = "cpu") -> PackedStep:
    return pack(
        rollouts,
        tokens_per_micro_batch=case.tokens_per_micro_batch,
        dp_size=layout.dp_size,
        dp_rank=layout.dp_rank,
        cp_size=layout.cp_size,
        cp_rank=layout.cp_rank,
        tp_size=layout.tp_size * case.pack_multiple,
        aggregation="token_mean",
        prefix_denominator="joint",
        device=device,
    )


def train_step(
    student: Model, teacher: Model, rollouts: list[Rollout], case: Case, constants: Constants
) -> tuple[PackedStep, list[LossResult | None], list[TeacherScores | None]]:
    """Score and train on one batch. Afterwards gradients are complete and no parameter has changed."""
    packed = pack_for(rollouts, case, student.layout, student.platform.device)
    settings = case.settings(constants.temperature)
    scores = score_micro_batches(teacher, packed.micro_batches, packed.pack_length, k=constants.k, settings=settings)
    loss = make_distillation_loss(student, constants.objective(), scores, [None] * len(scores), settings)
    results = run_pipeline(student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
    return packed, results, scores


def gather_results(layout: Layout, packed: PackedStep, results: Sequence[LossResult | None]) -> dict[str, Any]:
    """Loss, count and columns of all ranks, rows in the order of (sample, token)."""
    mine: Any = None
    if layout.is_last_stage and layout.tp_rank == 0:
        pairs = [(batch, result) for batch, result in zip(packed.micro_batches, results, strict=True) if result]
        assert len(pairs) == len(results), "a micro-batch has no result on the last stage"
        columns = {
            name: torch.cat([result.columns[name].double().cpu() for _, result in pairs])
            for name in pairs[0][1].columns
        }
        place = torch.cat([batch.sample_index_T * 10_000 + batch.token_index_T for batch, _ in pairs]).cpu()
        loss_sum = sum(float(result.loss_sum) for _, result in pairs)
        mine = (loss_sum, sum(int(result.token_count) for _, result in pairs), place, columns)
    assert layout.is_last_stage or all(result is None for result in results), "a result outside the last stage"
    everyone: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everyone, mine, group=layout.groups.control)
    parts = [part for part in everyone if part is not None]
    order = torch.argsort(torch.cat([place for _, _, place, _ in parts]))
    count = sum(count for _, count, _, _ in parts)
    return {
        "loss": sum(loss_sum for loss_sum, _, _, _ in parts) / count,
        "token_count": count,
        "columns": {name: torch.cat([part[3][name] for part in parts])[order] for name in parts[0][3]},
        "micro_batches": len(packed.micro_batches),
        "own_rows": sum(len(batch.rows_T) for batch in packed.micro_batches),
        "pack_length": packed.pack_length,
    }


@torch.no_grad()
def whole_gradients(model: Model, layout: Layout) -> dict[str, Tensor]:
    """{Hugging Face name: gradient} on rank 0. A gradient is split over ranks exactly like its parameter."""
    saved = {}
    for name, parameter in named_parameters(model).items():
        saved[name] = parameter.detach().clone()
        parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    gradients = dict(iterate_hf(model, layout))
    for name, parameter in named_parameters(model).items():
        parameter.copy_(saved[name])
    return gradients


def run_cases(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], cases: dict[str, Case], constants: Constants
) -> dict[str, dict[str, Any]]:
    """On the ranks: one step for each case. Results of rank 0; the other ranks return results without gradients."""
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            student = build(student_folder, case, layout, platform, trainable=True)
            teacher = build(teacher_folder, case, layout, platform, trainable=False)
            packed, results, _ = train_step(student, teacher, rollouts, case, constants)
            found[name] = gather_results(layout, packed, results)
            found[name]["gradients"] = whole_gradients(student, layout)
    return found


def logits_of_samples(folder: Path, rollouts: list[Rollout], case: Case) -> list[Tensor]:
    """On the ranks: logits [tokens, real vocabulary] of every position of each sample, from one pack."""
    with layout_of(case) as (layout, platform):
        model = build(folder, case, layout, platform, trainable=False)
        whole = replace(case, tokens_per_micro_batch=1024)
        packed = pack_for(rollouts, whole, layout)
        everywhere = torch.arange(packed.pack_length)
        micro_batch = replace(packed.micro_batches[0].without_rows(), rows_T=everywhere)

        def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> Tensor:
            logits_TW = layer.logits(slice(0, layer.tokens))
            shards = [torch.empty_like(logits_TW) for _ in range(layout.tp_size)]
            dist.all_gather(shards, logits_TW.contiguous(), group=layout.groups.tp)
            return torch.cat(shards, dim=1)[:, : model.arch.vocab_size]

        loss = only_measure(measure)
        (logits_PV,) = run_pipeline(model, [micro_batch], packed.pack_length, loss=loss, forward_only=True)
        assert logits_PV is not None
        borders = packed.micro_batches[0].cu_seqlens.tolist()
        return [logits_PV[start : start + len(r.token_ids)] for start, r in zip(borders, rollouts, strict=False)]


@dataclass(frozen=True)
class Trained:
    """The results of several steps on rank 0."""

    grad_norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


def train_cases(
    student_folder: Path,
    teacher_folder: Path,
    batches: list[list[Rollout]],
    cases: dict[str, Case],
    constants: Constants,
    steps: int,
) -> dict[str, Trained]:
    """On the ranks: one optimizer step per batch, for each case, preceded by a pass over the batch without gradients.

    That pass uses the weights after the last step, although no forward pass of training has used them yet.
    """
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            student = build(student_folder, case, layout, platform, trainable=True)
            teacher = build(teacher_folder, case, layout, platform, trainable=False)
            optimizer, scheduler = build_optimizer(student, case.optimizer, steps)
            norms, rates = [], []
            for step, rollouts in enumerate(batches, start=1):
                packed, settings = pack_for(rollouts, case, layout), case.settings(constants.temperature)
                looks = student_pass(
                    student, packed.micro_batches, packed.pack_length, student_topk=0, settings=settings
                )
                _, results, _ = train_step(student, teacher, rollouts, case, constants)
                for look, result in zip(looks, results, strict=True):
                    if look is not None and result is not None:
                        torch.testing.assert_close(look.logp_T, result.columns["student_logp"], rtol=0, atol=1e-5)
                norm, updated = optimizer_step(student, optimizer, scheduler, step=step)
                assert updated
                norms.append(norm)
                rates.append(learning_rate(optimizer))
            found[name] = Trained(norms, rates, dict(iterate_hf(student, layout)))
    return found
