"""Code that the ranks of `test_fused_head` run. Not a test module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.collectives import counted_collectives
from tests.dist.layouts import Case, Constants, build, gather_results, layout_of, pack_for, train_step, whole_gradients
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.mcore.loss import make_distillation_loss
from tropd_mcore.mcore.memory_probe import probe_memory
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.scoring import score_micro_batches, student_pass
from tropd_mcore.objectives.catalogue import Objective, WholeVocabulary, custom
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.registry import function_of
from tropd_mcore.types import MicroBatch, Rollout, RowContext, TeacherScores


class MostRows(TorchDispatchMode):
    """The most rows of any matrix with `width` columns (or rows) that an operation makes, in forward and backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.ndim > 1 and self.width in leaf.shape:
                self.rows = max(self.rows, leaf.numel() // self.width)
        return result


def most_rows_of_logits(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants
) -> dict[str, int]:
    """The most rows of a matrix as wide as a vocabulary shard, by phase, and the sizes to compare them with."""
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed, settings = pack_for(rollouts, case, layout), case.settings(constants.temperature)
        batches, length = packed.micro_batches, packed.pack_length
        assert len(batches) == 1 and length not in (student.shard.width, teacher.shard.width)
        with MostRows(teacher.shard.width) as scoring:
            scores = score_micro_batches(teacher, batches, length, k=constants.k, settings=settings)
        with MostRows(student.shard.width) as sampled:
            student_pass(student, batches, length, student_topk=0, settings=settings)
        with MostRows(student.shard.width) as own:
            student_pass(student, batches, length, student_topk=5, settings=settings)
        loss = make_distillation_loss(student, constants.objective(), scores, [None], settings)
        with MostRows(student.shard.width) as training:
            run_pipeline(student, batches, length, loss=loss, forward_only=False)
        return {
            "scoring": scoring.rows,
            "sampled": sampled.rows,
            "own": own.rows,
            "training": training.rows,
            "rows": len(batches[0].rows_T),
            "hidden": max(student.config.hidden_size, teacher.config.hidden_size),
        }


def collectives_of_a_step(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants
) -> dict[str, Any]:
    """Collectives that scoring and training run through torch.distributed, and the rows of each micro-batch."""
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed = pack_for(rollouts, case, layout)
        settings = replace(case.settings(constants.temperature), topk_overlap=False)
        batches, length = packed.micro_batches, packed.pack_length
        with counted_collectives() as scoring:
            scores = score_micro_batches(teacher, batches, length, k=constants.k, settings=settings)
        loss = make_distillation_loss(student, constants.objective(), scores, [None] * len(scores), settings)
        with counted_collectives() as training:
            run_pipeline(student, batches, length, loss=loss, forward_only=False)
        rows = [len(batch.rows_T) for batch in batches]
        return {"scoring": dict(scoring), "training": dict(training), "rows": rows}


def passes_and_a_step(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants, own: int
) -> list[dict[str, Tensor]]:
    """For each micro-batch: the results of the passes before the update, and the inputs of the update's objective."""
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed, settings = pack_for(rollouts, case, layout), case.settings(constants.temperature)
        batches, length = [_weighted(batch) for batch in packed.micro_batches], packed.pack_length
        passes = student_pass(student, batches, length, student_topk=own, settings=settings)
        sampled_only = student_pass(student, batches, length, student_topk=0, settings=settings)
        own_ids = [found.own_ids_TL if found is not None else None for found in passes]
        scores = score_micro_batches(teacher, batches, length, k=constants.k, settings=settings, extra_ids=own_ids)
        context = [_context(found, scored) for found, scored in zip(passes, scores, strict=True)]
        seen: list[list[TokenInputs]] = [[] for _ in batches]
        results = []
        for index in range(len(batches)):
            loss = make_distillation_loss(
                student, _recording(constants, seen[index]), [scores[index]], [context[index]], settings
            )
            results += run_pipeline(student, [batches[index]], length, loss=loss, forward_only=False)
        return [
            {
                "pass_logp": found.logp_T,
                "pass_entropy": found.entropy_T,
                "pass_logp_alone": alone.logp_T,
                "pass_entropy_alone": alone.entropy_T,
                "own_ids": found.own_ids_TL,
                "own_logp": found.own_logp_TL,
                "teacher_topk_ids": scored.topk_ids_TK,
                "teacher_topk_logp": scored.topk_logp_TK,
                "teacher_own_logp": scored.logp_of_student_topk_TL,
                "statistic": given.statistic_T,
                "weight": batch.weight_T,
                "rollout_logp": batch.rollout_logp_T,
                "trust_u": batch.trust_u_T,
                "student_logp": result.columns["student_logp"],
                "topk_overlap": result.columns["topk_overlap"],
                **{name: torch.cat([getattr(part, name).detach() for part in parts]) for name in _SEEN},
            }
            for batch, found, alone, scored, given, result, parts in zip(
                batches, passes, sampled_only, scores, context, results, seen, strict=True
            )
            if found is not None and alone is not None and scored is not None and given is not None and result
        ]


_SEEN = (
    "student_own_logp_TL",
    "old_logp_T",
    "old_own_logp_TL",
    "reference_logp_T",
    "advantage_T",
    "own_ids_TL",
    "teacher_own_logp_TL",
    "weight_T",
    "rollout_logp_T",
    "trust_u_T",
)


def _weighted(batch: MicroBatch) -> MicroBatch:
    """The same rows with row weights that no aggregation produces."""
    return replace(batch, weight_T=torch.arange(len(batch.rows_T)) + 0.25)


def _context(found: Any, scored: TeacherScores | None) -> RowContext | None:
    """Old log-probs with artificial values, so that they cannot be mistaken for computed ones."""
    if found is None or scored is None:
        return None
    return RowContext(
        old_logp_T=found.logp_T - 0.25,
        reference_logp_T=found.logp_T - 7.0,
        statistic_T=torch.arange(len(found.logp_T)) + 0.5,
        own_ids_TL=found.own_ids_TL,
        old_own_logp_TL=found.own_logp_TL - 0.5,
        teacher_own_logp_TL=scored.logp_of_student_topk_TL,
    )


def _recording(constants: Constants, seen: list[TokenInputs]) -> Objective:
    """The objective, which also records its inputs."""
    objective = constants.objective()

    def record(inputs: TokenInputs) -> TokenLosses:
        seen.append(inputs)
        return function_of(objective)(inputs)

    return custom(record, needs=("advantage_T",))


def full_vocabulary_step(
    student_folder: Path,
    teacher_folder: Path,
    rollouts: list[Rollout],
    cases: dict[str, tuple[Case, str, float]],
    temperature: float,
) -> dict[str, dict[str, Any]]:
    """One step on a divergence over the whole vocabulary, (case, divergence, beta) by name."""
    found = {}
    for name, (case, divergence, beta) in cases.items():
        with layout_of(case) as (layout, platform):
            student = build(student_folder, case, layout, platform, trainable=True)
            teacher = build(teacher_folder, case, layout, platform, trainable=False)
            packed = pack_for(rollouts, case, layout)
            settings = replace(case.settings(temperature), divergence=divergence, divergence_beta=beta)
            batches, length = packed.micro_batches, packed.pack_length
            scores = score_micro_batches(teacher, batches, length, k=3, settings=settings, keep_hidden=True)
            context = [None] * len(scores)
            loss = make_distillation_loss(student, whole(divergence, beta), scores, context, settings, teacher=teacher)
            results = run_pipeline(student, batches, length, loss=loss, forward_only=False)
            found[name] = gather_results(layout, packed, results)
            found[name]["gradients"] = whole_gradients(student, layout)
    return found


def whole(divergence: str, beta: float) -> Objective:
    """The divergence over the whole vocabulary, by a custom function that also trains prefixes."""
    return replace(custom(divergence_alone), whole=WholeVocabulary(divergence, beta))


def divergence_alone(inputs: TokenInputs) -> TokenLosses:
    """The divergence over the whole vocabulary of every supervised token."""
    assert inputs.divergence_T is not None
    counted_T = inputs.student_mask_T | inputs.prefix_mask_T
    value_T = torch.where(counted_T, inputs.divergence_T, 0.0)
    return TokenLosses(value_T, counted_T, {"loss": value_T.detach()})


def steps_with_one_sample(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants
) -> tuple[int, list[dict[str, Tensor]]]:
    """Rows of this rank in the last step, and the gradients of each step: all samples, then the first one twice."""
    gradients = []
    with layout_of(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        for batch in (rollouts, rollouts[:1], rollouts[:1]):
            packed, _, _ = train_step(student, teacher, batch, case, constants)
            gradients.append(whole_gradients(student, layout))
        return sum(len(micro_batch.rows_T) for micro_batch in packed.micro_batches), gradients


def refusals(student_folder: Path, cases: dict[str, tuple[Case, dict[str, Any]]], constants: Constants) -> list[str]:
    """The error of each case, with its changed settings, in the dry run."""
    found = []
    for case, changed in cases.values():
        with layout_of(case) as (layout, platform):
            student = build(student_folder, case, layout, platform, trainable=True)
            if changed.pop("scaled", False):
                student.config.grad_scale_func = lambda loss: 2.0 * loss
            settings = replace(case.settings(constants.temperature), **changed)
            try:
                probe_memory(student, constants.objective(), settings, tokens_per_micro_batch=32, k=constants.k)
            except ConfigError as error:
                found.append(str(error))
            else:
                found.append("")
    return found
