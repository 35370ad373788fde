"""Code that the ranks of `test_guards` run. Not a test module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist.layouts import Case, Constants, build, gather_results, layout_of, pack_for, whole_gradients
from tropd_mcore.errors import TrainingError
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore.loss import check_finite, make_distillation_loss
from tropd_mcore.mcore.memory_probe import probe_memory
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer, optimizer_step
from tropd_mcore.mcore.pipeline import only_measure, run_pipeline
from tropd_mcore.mcore.scoring import sampled_log_probs, score_micro_batches
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores
from tropd_mcore.weights.architecture import read_architecture

BROKEN_SAMPLE, BROKEN_TOKEN = 2, 10


def parameters(model: Model) -> list[Tensor]:
    return [parameter.detach().clone() for module in model.modules for parameter in module.parameters()]


def non_finite_step(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, k: int, topk_too: bool
) -> tuple[str, str, bool]:
    """One step in which the teacher returns NaN for one token, and optionally for its top-k.

    Returns (loss error, optimizer error, nothing moved).
    """
    constants = Constants(k=k, temperature=1.0, beta=0.1, outlier_weight=1.0)
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed = pack_for(rollouts, case, layout)
        scores = score_micro_batches(
            teacher, packed.micro_batches, packed.pack_length, k=k, settings=case.settings(temperature=1.0)
        )
        pairs = zip(packed.micro_batches, scores, strict=True)
        broken = [_break(micro_batch, score, topk_too) if score else None for micro_batch, score in pairs]
        settings = case.settings(constants.temperature)
        loss = make_distillation_loss(student, constants.objective(), broken, [None] * len(broken), settings)
        results = run_pipeline(student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
        optimizer, scheduler = build_optimizer(student, case.optimizer, steps=3)
        before = parameters(student)
        loss_error = optimizer_error = ""
        try:
            check_finite(results, packed.micro_batches, step=7, sample_ids=[r.sample_id for r in rollouts])
        except TrainingError as error:
            loss_error = str(error)
        try:
            optimizer_step(student, optimizer, scheduler, step=7)
        except TrainingError as error:
            optimizer_error = str(error)
        untouched = all(map(torch.equal, before, parameters(student))) and scheduler.num_steps == 0
        return loss_error, optimizer_error, untouched


def _break(micro_batch: MicroBatch, scores: TeacherScores, topk_too: bool) -> TeacherScores:
    at = (micro_batch.sample_index_T == BROKEN_SAMPLE) & (micro_batch.token_index_T == BROKEN_TOKEN)
    return replace(
        scores,
        logp_T=torch.where(at, torch.nan, scores.logp_T),
        topk_logp_TK=torch.where(at[:, None] & topk_too, torch.nan, scores.topk_logp_TK),
    )


def logits_of_a_model_without_weights(folder: Path, rollouts: list[Rollout]) -> bool:
    """Whether every logit is NaN."""
    with layout_of(Case()) as (layout, platform):
        arch = read_architecture(folder)
        model = build_model(arch, Case().parallel, layout, platform, dtype="float32", trainable=False)
        packed = pack_for(rollouts, Case(), layout)

        def measure(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> bool:
            return bool(layer.logits(slice(0, layer.tokens)).isnan().all())

        loss = only_measure(measure)
        found = run_pipeline(model, packed.micro_batches, packed.pack_length, loss=loss, forward_only=True)
        return all(found)


def dry_run_and_look(
    folder: Path, cases: dict[str, Case], tokens: int, k: int, student_topk: int
) -> dict[str, tuple[bool, bool, bool]]:
    """(gradients existed during the run, are zero after, parameters untouched) of this rank."""
    constants = Constants(k=k, temperature=1.0, beta=0.1, outlier_weight=1.0)
    found = {}
    for name, case in cases.items():
        with layout_of(case) as (layout, platform):
            model = build(folder, case, layout, platform, trainable=True)
            before = parameters(model)
            seen: list[bool] = []
            finalize = model.config.finalize_model_grads_func

            def spy(*args: Any, seen: list[bool] = seen, finalize: Any = finalize, **keywords: Any) -> None:
                finalize(*args, **keywords)
                seen.append(all(float(p.main_grad.abs().max()) > 0 for p in args[0][0].parameters() if p.ndim == 1))

            model.config.finalize_model_grads_func = spy
            probe_memory(
                model,
                constants.objective(),
                case.settings(constants.temperature),
                tokens_per_micro_batch=tokens,
                k=k,
                student_topk=student_topk,
            )
            zero = all(not p.main_grad.any() for module in model.modules for p in module.parameters())
            found[name] = (all(seen) and len(seen) == 1, zero, all(map(torch.equal, before, parameters(model))))
    return found


def log_probs_without_gradients(folder: Path, rollouts: list[Rollout], case: Case) -> list[Tensor | None]:
    with layout_of(case) as (layout, platform):
        model = build(folder, case, layout, platform, trainable=True)
        packed = pack_for(rollouts, case, layout)
        assert not torch.is_inference_mode_enabled()
        settings = case.settings(temperature=1.0)
        return sampled_log_probs(model, packed.micro_batches, packed.pack_length, settings=settings)


def step_with_unscored_samples(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, k: int, unscored: list[int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(gathered results, gradients on rank 0) of a step in which the teacher failed on some samples."""
    constants = Constants(k=k, temperature=1.0, beta=0.1, outlier_weight=1.0)
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed = pack_for(rollouts, case, layout)
        scores = score_micro_batches(
            teacher, packed.micro_batches, packed.pack_length, k=k, settings=case.settings(temperature=1.0)
        )
        failed = torch.tensor(unscored, dtype=torch.int64)
        masked = [
            replace(score, scored_T=~torch.isin(micro_batch.sample_index_T, failed)) if score else None
            for micro_batch, score in zip(packed.micro_batches, scores, strict=True)
        ]
        settings = case.settings(constants.temperature)
        loss = make_distillation_loss(student, constants.objective(), masked, [None] * len(masked), settings)
        results = run_pipeline(student, packed.micro_batches, packed.pack_length, loss=loss, forward_only=False)
        return gather_results(layout, packed, results), whole_gradients(student, layout)


def teacher_of_smaller_vocabulary(
    folder: Path, rollouts: list[Rollout], k: int, candidates: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(predicted ids, scored, log q of the candidates [T, L]) of each micro-batch."""
    with layout_of(Case()) as (layout, platform):
        teacher = build(folder, Case(), layout, platform, trainable=False)
        packed, settings = pack_for(rollouts, Case(), layout), Case().settings(temperature=1.0)
        batches, length = packed.micro_batches, packed.pack_length
        extra = [torch.tensor(candidates).expand(len(batch.rows_T), -1) for batch in batches]
        scores = score_micro_batches(teacher, batches, length, k=k, settings=settings, extra_ids=extra)
        assert all(score is not None and score.logp_T.isfinite().all() for score in scores)
        pairs = zip(batches, scores, strict=True)
        return [
            (batch.target_ids_T, score.scored_T, score.logp_of_student_topk_TL)
            for batch, score in pairs
            if score is not None
        ]
