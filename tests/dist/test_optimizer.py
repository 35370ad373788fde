"""Several optimizer steps equal plain torch: AdamW, clipping, no decay of norms and biases, on a float64 model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.dist import reference
from tests.dist.layouts import Case, Trained, train_cases
from tests.dist.test_layouts import CONSTANTS
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import OptimizerConfig

CONSTANT = OptimizerConfig(learning_rate=3e-3, eps=reference.EPS, clip_grad_norm=8.0, weight_decay=0.3)
OVERLAPPED = CONSTANT.model_copy(update={"overlap_grad_reduce": True, "overlap_param_gather": True})
UNSHARDED = CONSTANT.model_copy(update={"distributed": False})
BATCHES = [[(3, 4, 9), (5, 0, 12), (2, 6, 3)], [(7, 3, 17), (1, 0, 5), (4, 2, 1), (3, 1, 8)], [(2, 2, 6)]]
"""The last batch has a single sample: with two data ranks, one of them has none."""
CASES = {
    1: {"one": Case(optimizer=CONSTANT), "one-unsharded-logits": Case(optimizer=UNSHARDED, form="logits")},
    2: {
        "dp2-folded": Case(optimizer=CONSTANT, weight_gradient="folded"),
        "dp2-unsharded": Case(optimizer=UNSHARDED),
        "dp2-overlapped": Case(optimizer=OVERLAPPED),
        "tp2-sp-folded": Case(tensor=2, sequence_parallel=True, optimizer=CONSTANT, weight_gradient="folded"),
        "pp2-tied-recompute": Case(pipeline=2, optimizer=CONSTANT, weight_gradient="recompute"),
        "cp2": Case(context=2, optimizer=CONSTANT),
    },
    4: {
        "dp2-pp2-tied": Case(pipeline=2, optimizer=CONSTANT),
        "dp2-pp2-vpp2-overlapped-folded": Case(
            pipeline=2, virtual_pipeline=2, optimizer=OVERLAPPED, weight_gradient="folded"
        ),
        "tp2-dp2-sp-logits": Case(tensor=2, sequence_parallel=True, optimizer=CONSTANT, form="logits"),
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = reference.write_model(reference.TEACHER, folder / "teacher", seed=11)
    return reference.write_model(reference.STUDENTS["qwen3"], folder / "student", seed=5), teacher


@pytest.fixture(scope="module")
def trained(folders: tuple[Path, Path]) -> dict[str, Trained]:
    batches = [reference.make_rollouts(lengths, seed) for seed, lengths in enumerate(BATCHES)]
    found: dict[str, Trained] = {}
    for world_size, cases in CASES.items():
        found |= run_on_ranks(train_cases, world_size, *folders, batches, cases, CONSTANTS, len(batches))[0]
    return found


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path]) -> tuple[list[float], dict[str, torch.Tensor]]:
    student, teacher = (reference.reference_model(folder) for folder in folders)
    batches = [reference.make_rollouts(lengths, seed) for seed, lengths in enumerate(BATCHES)]
    return reference.reference_training(student, teacher, batches, CONSTANT)


@pytest.mark.parametrize("name", [name for cases in CASES.values() for name in cases])
def test_weights_after_three_steps_equal_plain_adamw(
    trained: dict[str, Trained], expected: tuple[list[float], dict[str, torch.Tensor]], folders: tuple[Path, Path],
    name: str,
) -> None:  # fmt: skip
    """Compares the change and not the weight, which would hide an error in an update of 1e-3."""
    norms, weights = expected
    start = reference.reference_model(folders[0]).state_dict()
    assert max(norms) > CONSTANT.clip_grad_norm > min(norms), "one step is clipped and one is not"
    assert trained[name].grad_norms == pytest.approx(norms, rel=1e-5)
    assert set(trained[name].weights) == set(weights)
    for key, weight in weights.items():
        moved, should_move = trained[name].weights[key].double() - start[key], weight - start[key]
        error = float((moved - should_move).abs().max() / should_move.abs().max())
        assert error <= 1e-4, f"{key}: {error:.2e}"


@pytest.mark.parametrize(
    ("schedule", "expected_rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 + 0.5 * math.cos(3 * math.pi / 4)]),
    ],
)
def test_rate_warms_up_from_the_first_step_and_follows_the_schedule(
    folders: tuple[Path, Path], schedule: str, expected_rates: list[float]
) -> None:
    """6 steps with 2 steps of warm-up. The first 5 are run."""
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule=schedule, warmup_steps=2)  # type: ignore[arg-type]
    batches = [reference.make_rollouts([(2, 0, 3)])] * len(expected_rates)
    cases = {"one": Case(optimizer=optimizer)}
    found = run_on_ranks(train_cases, 1, *folders, batches, cases, CONSTANTS, 6)[0]["one"]
    assert found.rates == pytest.approx([1e-3 * rate for rate in expected_rates], rel=1e-9)
