"""The trainer's GPU parts: Transformer Engine layers on NCCL train as float64 autograd through transformers does.

World size 1. In float32 (without TF32) numbers are compared with float64; in bfloat16 the measure of an error is the
error of transformers, which runs the same bfloat16 weights on the same GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from tests.dist import reference
from tests.dist.layouts import Case, Constants
from tests.gpu.engine_ranks import exported, step_of_case, trained_and_resumed, weight_gradients
from tropd_mcore.config.schema import OptimizerConfig
from tropd_mcore.conformance.ranks import Pool
from tropd_mcore.types import Rollout

HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None
pytestmark = [
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_ENGINE), reason="needs a GPU, and Transformer Engine for PyTorch"
    ),
    pytest.mark.timeout(600),
]
SIZES: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
STUDENTS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=reference._LLAMA3_ROPE),
}
TEACHER = Qwen3Config(**{**SIZES, "vocab_size": 1040, "hidden_size": 192, "num_hidden_layers": 2}, head_dim=64)
LENGTHS = [(3, 4, 40), (5, 0, 57), (2, 6, 13), (7, 3, 70), (1, 0, 5), (4, 2, 1), (3, 1, 28)]
BATCHES = [LENGTHS[:4], LENGTHS[3:], LENGTHS[1:6]]
CONSTANTS = Constants(
    k=reference.TOPK,
    temperature=reference.TEMPERATURE,
    beta=reference.BETA,
    outlier_weight=reference.OUTLIER_WEIGHT,
)
STEPPED = OptimizerConfig(learning_rate=3e-3, eps=reference.EPS, clip_grad_norm=9.0, weight_decay=0.3)
OVERLAPPED = OptimizerConfig(overlap_grad_reduce=True, overlap_param_gather=True)
_SHARED: dict[str, Any] = {"tokens_per_micro_batch": 96, "chunk_tokens": 32, "optimizer": OptimizerConfig()}
EXACT: dict[str, Case] = {
    "eager": Case(**_SHARED),
    "triton": Case(**_SHARED, backend="triton"),
    "recompute-full": Case(**_SHARED, recompute="full"),
    "recompute-selective": Case(**_SHARED, recompute="selective"),
    "overlapped-folded": Case(**{**_SHARED, "optimizer": OVERLAPPED}, weight_gradient="folded", backend="triton"),
}
_HALF: dict[str, Any] = {**_SHARED, "dtype": "bfloat16", "backend": "triton"}
ROUNDED: dict[str, Case] = {
    "bf16": Case(**_HALF),
    "bf16-recompute-full": Case(**_HALF, recompute="full"),
    "bf16-recompute-selective": Case(**_HALF, recompute="selective"),
    "bf16-overlapped-folded": Case(**{**_HALF, "optimizer": OVERLAPPED}, weight_gradient="folded", overlap_chunks=True),
    "bf16-weight-recompute": Case(**_HALF, weight_gradient="recompute"),
    "bf16-logits": Case(**_HALF, form="logits"),
    "bf16-replicated": Case(**{**_HALF, "optimizer": OptimizerConfig(distributed=False)}),
}
EXACT_TOLERANCE = 1e-4
"""Relative to the largest gradient of a tensor, and nats: float32 products in another order."""
MARGIN = 0.4
"""nats between a trust uniform and where the decision changes, which bfloat16 must not cross."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One process with one GPU, whose float32 products are of float32 numbers."""
    with contextlib.closing(Pool({"NVIDIA_TF32_OVERRIDE": "0"})) as pool:
        yield pool


def write_rounded(config: PretrainedConfig, folder: Path, seed: int) -> Path:
    """A model with weights that bfloat16 holds exactly."""
    reference.write_model(config, folder, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def with_margin(rollouts: list[Rollout], columns: dict[str, Tensor]) -> list[Rollout]:
    """The same with trust uniforms that leave a margin; `columns` are those of a reference step."""
    ratios, first, found = (columns["teacher_logp"] - columns["student_logp"]).numpy(), 0, []
    coins = np.random.default_rng(1)
    for rollout in rollouts:
        first += len(rollout.prefix_ids) if rollout.carries_prefix_loss else 0
        ratio = ratios[first : first + len(rollout.response_ids)]
        first += len(ratio)
        distrusted = (ratio < -2 * MARGIN) & (coins.random(len(ratio)) < 0.5)
        u = np.exp(np.where(distrusted, ratio + MARGIN, np.minimum(ratio, 0.0) - MARGIN))
        found.append(dataclasses.replace(rollout, trust_u=u.astype(np.float32)))
    assert first == len(ratios)
    return found


def make_rollouts(lengths: list[tuple[int, int, int]], student: Path, teacher: Path, seed: int = 3) -> list[Rollout]:
    rollouts = reference.make_rollouts(lengths, seed)
    models = (reference.reference_model(folder) for folder in (student, teacher))
    return with_margin(rollouts, reference.reference_step(*models, rollouts).columns)


class Outcome:
    """One family: the float64 reference, transformers in bfloat16 on the GPU, and our cases, run when asked for."""

    def __init__(self, student: Path, teacher: Path, pool: Pool) -> None:
        rollouts = make_rollouts(LENGTHS, student, teacher)
        models = [reference.reference_model(folder) for folder in (student, teacher)]
        self.exact = reference.reference_step(models[0], models[1], rollouts)
        halves = [model.to("cuda", torch.bfloat16) for model in models]
        self.rounded = reference.reference_step(halves[0], halves[1], rollouts)
        self._known: dict[str, Any] = {}
        self._run = lambda case: pool.run(step_of_case, 1, student, teacher, rollouts, case, CONSTANTS)[0]

    def found(self, name: str) -> dict[str, Any]:
        if name not in self._known:
            self._known[name] = {}  # a failure is met once, not by every test again
            self._known[name] = self._run({**EXACT, **ROUNDED}[name])
        found: dict[str, Any] = self._known[name]
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    students = {name: write_rounded(config, root / name, seed=5) for name, config in STUDENTS.items()}
    return {**students, "teacher": write_rounded(TEACHER, root / "teacher", seed=11)}


@pytest.fixture(scope="module", params=list(STUDENTS))
def outcome(request: pytest.FixtureRequest, folders: dict[str, Path], pool: Pool) -> Outcome:
    return Outcome(folders[request.param], folders["teacher"], pool)


def largest_error(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-4)
    return float((found.double() - expected.double()).abs().max() / scale)


def error_of_norm(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


@pytest.mark.parametrize("name", EXACT)
def test_in_float32_loss_log_probs_and_all_gradients_are_those_of_float64(
    outcome: Outcome, name: str, record_property: Callable[[str, object], None]
) -> None:
    exact, found = outcome.exact, outcome.found(name)
    assert found["micro_batches"] > 2 and found["backend"] == "nccl"
    assert found["token_count"] == exact.token_count
    assert set(found["gradients"]) == set(exact.gradients)
    errors = {key: largest_error(found["gradients"][key], exact.gradients[key]) for key in exact.gradients}
    off = {key: float((found["columns"][key] - column).abs().max()) for key, column in exact.columns.items()}
    record_property("gradient", max(errors.values()))
    record_property("log-prob", max(off.values()))
    assert found["loss"] == pytest.approx(exact.loss, rel=EXACT_TOLERANCE)
    assert max(errors.values()) <= EXACT_TOLERANCE, errors
    assert max(off.values()) <= EXACT_TOLERANCE, off


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bfloat16_no_gradient_is_further_from_float64_than_that_of_transformers(
    outcome: Outcome, name: str, record_property: Callable[[str, object], None]
) -> None:
    """Twice its error and one percent are allowed: both round, in another order."""
    exact, rounded, found = outcome.exact, outcome.rounded, outcome.found(name)
    ours = {key: error_of_norm(found["gradients"][key], exact.gradients[key]) for key in exact.gradients}
    theirs = {key: error_of_norm(rounded.gradients[key], exact.gradients[key]) for key in exact.gradients}
    record_property("gradient", max(ours.values()))
    record_property("gradient of transformers", max(theirs.values()))
    assert found["main_grad_dtypes"] == {torch.float32}
    too_far = {key: (ours[key], theirs[key]) for key in ours if ours[key] > 2.0 * theirs[key] + 0.01}
    assert not too_far


@pytest.mark.parametrize("name", ROUNDED)
def test_in_bfloat16_log_probs_and_entropies_are_as_near_as_those_of_transformers(
    outcome: Outcome, name: str, record_property: Callable[[str, object], None]
) -> None:
    exact, rounded, found = outcome.exact, outcome.rounded, outcome.found(name)
    assert torch.equal(found["columns"]["trusted"], exact.columns["trusted"]), "the margin was crossed"
    for key in ("student_logp", "teacher_logp", "student_entropy", "teacher_entropy"):
        ours = float((found["columns"][key] - exact.columns[key]).abs().max())
        theirs = float((rounded.columns[key].cpu() - exact.columns[key]).abs().max())
        record_property(key, f"{ours:.4f} against {theirs:.4f}")
        assert ours <= 2.0 * theirs + 0.01, f"{key}: {ours:.4f}, transformers {theirs:.4f}"
    assert found["loss"] == pytest.approx(exact.loss, rel=0.02)


def test_recomputed_activations_give_the_same_loss(outcome: Outcome) -> None:
    for first, others in (
        ("eager", ("recompute-full", "recompute-selective")),
        ("bf16", ("bf16-recompute-full", "bf16-recompute-selective")),
    ):
        for other in others:
            assert outcome.found(other)["loss"] == outcome.found(first)["loss"], other
            for key, gradient in outcome.found(first)["gradients"].items():
                assert error_of_norm(outcome.found(other)["gradients"][key], gradient) <= 1e-3, f"{other}: {key}"


def test_layers_of_the_student_fuse_their_weight_gradients_and_those_of_the_teacher_do_not(outcome: Outcome) -> None:
    for name in (*EXACT, *ROUNDED):
        found = outcome.found(name)
        assert len(found["fused"]) == 4 * SIZES["num_hidden_layers"] and all(found["fused"])
        assert found["teacher_fused"] and not any(found["teacher_fused"])


@pytest.fixture(scope="module")
def accumulated(folders: dict[str, Path], pool: Pool) -> dict[bool, dict[str, dict[str, Tensor]]]:
    """With the fusion and without."""
    rollouts, case = reference.make_rollouts(LENGTHS), ROUNDED["bf16"]
    return {fused: pool.run(weight_gradients, 1, folders["qwen3"], rollouts, case, fused)[0] for fused in (True, False)}


def share_that_bfloat16_holds(gradient: Tensor) -> float:
    return float((gradient == gradient.bfloat16().float()).float().mean())


def test_fused_weight_gradients_keep_more_than_bfloat16_holds(
    accumulated: dict[bool, dict[str, dict[str, Tensor]]], record_property: Callable[[str, object], None]
) -> None:
    """Without the fusion each gradient is rounded before it is added, which `prepare_training` is there for."""
    fused, separate = accumulated[True]["first"], accumulated[False]["first"]
    assert len(fused) == 4 * SIZES["num_hidden_layers"]
    for key, gradient in fused.items():
        assert gradient.dtype == torch.float32 and float(gradient.abs().max()) > 0.0
        assert share_that_bfloat16_holds(gradient) < 0.1, key
        assert share_that_bfloat16_holds(separate[key]) == 1.0, key
    record_property("share", max(map(share_that_bfloat16_holds, fused.values())))


def test_the_gradient_of_several_micro_batches_is_the_sum_of_theirs(
    accumulated: dict[bool, dict[str, dict[str, Tensor]]], record_property: Callable[[str, object], None]
) -> None:
    found = accumulated[True]
    errors = {
        key: largest_error(gradient, found["first"][key] + found["others"][key])
        for key, gradient in found["all"].items()
    }
    record_property("largest error", max(errors.values()))
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("family", STUDENTS)
def test_a_loaded_model_is_exported_bit_for_bit(
    folders: dict[str, Path], pool: Pool, tmp_path: Path, family: str
) -> None:
    pool.run(exported, 1, folders[family], tmp_path / "out", ROUNDED["bf16"])
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[family], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_clipped_steps_are_those_of_adamw_and_a_checkpoint_resumes_them(
    folders: dict[str, Path], pool: Pool, tmp_path: Path, dtype: str, record_property: Callable[[str, object], None]
) -> None:
    student, teacher = folders["qwen3"], folders["teacher"]
    batches = [make_rollouts(lengths, student, teacher, seed) for seed, lengths in enumerate(BATCHES)]
    case = dataclasses.replace(EXACT["eager"] if dtype == "float32" else ROUNDED["bf16"], optimizer=STEPPED)
    found = pool.run(trained_and_resumed, 1, student, teacher, batches, case, CONSTANTS, tmp_path)[0]
    models = (reference.reference_model(folder) for folder in (student, teacher))
    norms, weights = reference.reference_training(*models, batches, STEPPED)
    start = reference.reference_model(student).state_dict()
    moved = {name: found.weights[name].double() - start[name] for name in weights}
    errors = {name: error_of_norm(moved[name], weight - start[name]) for name, weight in weights.items()}
    for name in ("norms", "allocated", "peak", "restored"):
        record_property(name, str(getattr(found, name)))
    record_property("expected norms", str(norms))
    record_property("largest error of a movement", max(errors.values()))
    again = [torch.equal(found.weights[name], found.resumed[name]) for name in found.weights]
    record_property("resumed bit for bit", f"{sum(again)} of {len(again)}")

    assert max(norms) > STEPPED.clip_grad_norm > min(norms), "one step is clipped and one is not"
    assert found.norms == pytest.approx(norms, rel=1e-4 if dtype == "float32" else 0.03)
    if dtype == "float32":  # bfloat16 weights hide a part of an update of 3e-3
        assert max(errors.values()) <= 1e-3
        assert all(again)
    assert found.restored
    assert all(weight.isfinite().all() for weight in found.weights.values())
    assert found.allocated[2] <= found.allocated[1] + (1 << 20), "memory grows from step to step"
