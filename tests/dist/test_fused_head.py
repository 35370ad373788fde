"""The output layer inside the loss: no matrix of all logits, one all-reduce per chunk, values before an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import fused_head_ranks, reference
from tests.dist.layouts import Case, run_cases
from tests.dist.test_layouts import CONSTANTS, LENGTHS, relative_error
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import OptimizerConfig
from tropd_mcore.types import Rollout

TOLERANCE = 1e-5
"""Tolerance of a gradient relative to its largest entry, float32 against float64."""
OVERLAPPED = OptimizerConfig(distributed=False, overlap_grad_reduce=True)
OWN = reference.TOPK + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = reference.write_model(reference.TEACHER, folder / "teacher", seed=11)
    return reference.write_model(reference.STUDENTS["qwen3"], folder / "student", seed=5), teacher


@pytest.mark.parametrize("weight_gradient", ["deferred", "folded", "recompute"])
def test_the_fused_form_never_makes_the_logits_of_all_rows(folders: tuple[Path, Path], weight_gradient: str) -> None:
    """Neither in scoring (forward only) nor in training, including the backward pass."""
    rollouts = reference.make_rollouts(LENGTHS)
    case = Case(tokens_per_micro_batch=256, weight_gradient=weight_gradient)  # type: ignore[arg-type]
    found = run_on_ranks(fused_head_ranks.most_rows_of_logits, 1, *folders, rollouts, case, CONSTANTS)[0]
    widest = max(case.chunk_tokens, found["hidden"])  # rows of a chunk, or columns of the weight
    assert widest < found["rows"], "else a matrix of all logits would not be noticed"
    for phase in ("scoring", "sampled", "own", "training"):
        assert case.chunk_tokens <= found[phase] <= widest, phase


def test_the_logits_form_makes_the_logits_of_all_rows(folders: tuple[Path, Path]) -> None:
    """Shows that the test above would detect such a matrix."""
    rollouts = reference.make_rollouts(LENGTHS)
    case = Case(tokens_per_micro_batch=256, form="logits")
    found = run_on_ranks(fused_head_ranks.most_rows_of_logits, 1, *folders, rollouts, case, CONSTANTS)[0]
    assert all(found[phase] == found["rows"] for phase in ("scoring", "sampled", "own", "training"))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_each_further_chunk_adds_one_all_reduce_and_one_all_gather_in_scoring(
    folders: tuple[Path, Path], sequence_parallel: bool
) -> None:
    rollouts = reference.make_rollouts(LENGTHS[:4])
    sizes = (5, 100)
    fine, coarse = (
        run_on_ranks(
            fused_head_ranks.collectives_of_a_step, 2, *folders, rollouts,
            Case(tensor=2, sequence_parallel=sequence_parallel, chunk_tokens=size), CONSTANTS,
        )[0]
        for size in sizes
    )  # fmt: skip
    more = sum(math.ceil(rows / sizes[0]) - math.ceil(rows / sizes[1]) for rows in fine["rows"])
    assert fine["rows"] == coarse["rows"] and more > 5
    assert _difference(fine["training"], coarse["training"]) == {"all_reduce": more}
    assert _difference(fine["scoring"], coarse["scoring"]) == {"all_gather": more}


def _difference(more: dict[str, int], less: dict[str, int]) -> dict[str, int]:
    counts = {name: more.get(name, 0) - less.get(name, 0) for name in more | less}
    return {name: count for name, count in counts.items() if count}


@pytest.fixture(scope="module")
def seen(folders: tuple[Path, Path]) -> list[dict[str, Tensor]]:
    arguments = (*folders, reference.make_rollouts(LENGTHS), Case(tensor=2), CONSTANTS, OWN)
    answers: list[list[dict[str, Tensor]]] = run_on_ranks(fused_head_ranks.passes_and_a_step, 2, *arguments)
    assert len(answers[0]) > 1
    return answers[0]


def test_log_probs_of_the_pass_before_the_update_equal_those_of_the_first_update(seen: list[dict[str, Tensor]]) -> None:
    for batch in seen:
        torch.testing.assert_close(batch["pass_logp"], batch["student_logp"], rtol=0, atol=1e-5)
        torch.testing.assert_close(batch["own_logp"], batch["student_own_logp_TL"], rtol=0, atol=1e-5)
        torch.testing.assert_close(batch["pass_logp"], batch["pass_logp_alone"], rtol=0, atol=1e-5)
        torch.testing.assert_close(batch["pass_entropy"], batch["pass_entropy_alone"], rtol=0, atol=1e-5)


def test_student_candidates_are_sorted_and_their_teacher_log_probs_agree_with_the_teachers_top_k(
    seen: list[dict[str, Tensor]],
) -> None:
    for batch in seen:
        assert (batch["own_logp"].diff(dim=1) <= 0).all()
        assert batch["own_ids"].shape[1] == OWN
        same_TLK = batch["own_ids"][:, :, None] == batch["teacher_topk_ids"][:, None, :]
        assert same_TLK.any()
        own_TLK = batch["teacher_own_logp"][:, :, None].expand(same_TLK.shape)
        top_TLK = batch["teacher_topk_logp"][:, None, :].expand(same_TLK.shape)
        torch.testing.assert_close(own_TLK[same_TLK], top_TLK[same_TLK], rtol=0, atol=1e-6)


def test_values_from_before_the_update_reach_the_objective_row_by_row(seen: list[dict[str, Tensor]]) -> None:
    for batch in seen:
        assert torch.equal(batch["old_logp_T"], batch["pass_logp"] - 0.25)
        assert torch.equal(batch["old_own_logp_TL"], batch["own_logp"] - 0.5)
        assert torch.equal(batch["reference_logp_T"], batch["pass_logp"] - 7.0)
        assert torch.equal(batch["advantage_T"], batch["statistic"])
        assert torch.equal(batch["own_ids_TL"], batch["own_ids"])
        assert torch.equal(batch["teacher_own_logp_TL"], batch["teacher_own_logp"])
        assert torch.equal(batch["weight_T"], batch["weight"])
        assert torch.equal(batch["rollout_logp_T"], batch["rollout_logp"])
        assert torch.equal(batch["trust_u_T"], batch["trust_u"])


def test_top_k_overlap_from_the_students_candidates_equals_that_of_a_separate_pass(
    folders: tuple[Path, Path], seen: list[dict[str, Tensor]]
) -> None:
    rollouts = reference.make_rollouts(LENGTHS)
    expected = run_on_ranks(run_cases, 1, *folders, rollouts, {"one": Case()}, CONSTANTS)[0]["one"]
    found = torch.cat([batch["topk_overlap"] for batch in seen]).double()
    assert torch.equal(found.sort().values, expected["columns"]["topk_overlap"].sort().values)


FULL_VOCABULARY = {
    1: {"one-fkl": (Case(), "fkl", 0.5)},
    2: {
        "tp2-sp-rkl": (
            Case(tensor=2, sequence_parallel=True, weight_gradient="folded", overlap_chunks=True), "rkl", 0.5,
        ),
        "pp2-jsd": (Case(pipeline=2), "jsd", 0.3),
        "tp2-logits-jsd": (Case(tensor=2, form="logits"), "jsd", 0.3),
    },
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_divergence_over_the_whole_vocabulary_trains_like_the_reference(
    folders: tuple[Path, Path], world_size: int
) -> None:
    """Through the teacher's hidden states and output layer. The teacher has 30 ids that the student lacks."""
    rollouts, cases = reference.make_rollouts(LENGTHS[:4]), FULL_VOCABULARY[world_size]
    run = fused_head_ranks.full_vocabulary_step
    found = run_on_ranks(run, world_size, *folders, rollouts, cases, reference.TEMPERATURE)[0]
    student, teacher = (reference.reference_model(folder) for folder in folders)
    for name, (_, divergence, beta) in cases.items():
        loss, gradients = _full_vocabulary_reference(student, teacher, rollouts, divergence, beta)
        assert found[name]["loss"] == pytest.approx(loss, rel=TOLERANCE), name
        for key, gradient in gradients.items():
            assert relative_error(found[name]["gradients"][key], gradient) <= TOLERANCE, (name, key)


def _full_vocabulary_reference(
    student: torch.nn.Module, teacher: torch.nn.Module, rollouts: Sequence[Rollout], divergence: str, beta: float
) -> tuple[float, dict[str, Tensor]]:
    student.zero_grad()
    losses = []
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.token_ids).long()[None]
        log_p = torch.log_softmax(student(ids).logits[0] / reference.TEMPERATURE, dim=-1)
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(ids).logits[0, :, : reference.VOCABULARY], dim=-1)
        start = len(rollout.prompt_ids) + (0 if rollout.carries_prefix_loss else len(rollout.prefix_ids))
        for token in range(start, ids.shape[1]):
            lp, lq = log_p[token - 1], log_q[token - 1]
            mix = (beta * lq.exp() + (1 - beta) * lp.exp()).log()
            kl = {"fkl": (lq, lp), "rkl": (lp, lq)}
            if divergence == "jsd":
                q_part, p_part = lq.exp() * (lq - mix), lp.exp() * (lp - mix)
                losses.append(beta * q_part.sum() + (1 - beta) * p_part.sum())
            else:
                a, b = kl[divergence]
                losses.append((a.exp() * (a - b)).sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        pytest.param(2, Case(optimizer=OVERLAPPED), id="dp2-deferred"),
        pytest.param(2, Case(optimizer=OVERLAPPED, weight_gradient="folded"), id="dp2-folded"),
        pytest.param(2, Case(optimizer=OVERLAPPED, form="logits"), id="dp2-logits", marks=pytest.mark.slow),
        pytest.param(
            4,
            Case(pipeline=2, virtual_pipeline=2, optimizer=OVERLAPPED, weight_gradient="recompute"),
            id="dp2-pp2-vpp2-recompute",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            Case(tensor=2, sequence_parallel=True, optimizer=OVERLAPPED),
            id="dp2-tp2-sp",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_empty_data_rank_keeps_overlapped_reductions_in_step(
    folders: tuple[Path, Path], world_size: int, case: Case
) -> None:
    """Every parameter, including the output embedding, must report its gradient although no token was supervised."""
    rollouts = reference.make_rollouts(LENGTHS[:3])
    run = fused_head_ranks.steps_with_one_sample
    expected = run_on_ranks(run, 1, *folders, rollouts, Case(), CONSTANTS)[0][1]
    answers = run_on_ranks(run, world_size, *folders, rollouts, case, CONSTANTS)
    assert min(rows for rows, _ in answers) == 0
    for found, step in zip(answers[0][1], expected, strict=True):
        for key, gradient in step.items():
            assert relative_error(found[key], gradient) <= TOLERANCE, key


def test_settings_that_cannot_produce_the_gradient_are_refused(folders: tuple[Path, Path]) -> None:
    cases: dict[str, tuple[Case, dict[str, Any]]] = {
        "scaled": (Case(weight_gradient="folded"), {"scaled": True}),
        "recompute": (Case(weight_gradient="recompute"), {"divergence": "fkl"}),
        "right": (Case(weight_gradient="folded"), {}),
    }
    scaled, recompute, right = run_on_ranks(fused_head_ranks.refusals, 1, folders[0], cases, CONSTANTS)[0]
    assert "loss.weight_gradient = folded needs an unscaled loss" in scaled
    assert "loss.weight_gradient = recompute does not support a divergence over the whole vocabulary" in recompute
    assert right == ""
