"""After a resume the learning rate follows the new configuration. A new run starts from weights or full state."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import checkpoint_ranks, resume_ranks
from tests.dist.checkpoint_ranks import Setup
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ModelError

DONE = 2
"""Optimizer steps of the checkpoint."""
AHEAD = 4
"""Steps after it that are checked."""
FIRST = OptimizerConfig(
    learning_rate=3e-3, min_learning_rate=1e-4, schedule="cosine", warmup_steps=1, clip_grad_norm=0.5
)


def expected_rate(position: int, optimizer: OptimizerConfig, steps: int) -> float:
    """The learning rate of optimizer step `position` (from 1), written from the schedule's definition."""
    top, floor, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if warmup and position <= warmup:
        return top * position / warmup
    if optimizer.schedule == "constant":
        return top
    if position > steps:
        return floor
    progress = (position - warmup) / (steps - warmup)
    share = 1 - progress if optimizer.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + share * (top - floor)


def setup_of(kind: str, steps: int = 6, **changes: Any) -> Setup:
    """`kind` is a dtype and a form of optimizer state."""
    dtype, form = kind.split()
    optimizer = FIRST.model_copy(update={"distributed": form == "distributed", **changes})
    return Setup(dtype=dtype, optimizer=optimizer, steps=steps)  # type: ignore[arg-type]


KINDS = ("bfloat16 distributed", "bfloat16 replicated", "float32 distributed", "float32 replicated")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hf") / "m", num_hidden_layers=2)


@pytest.fixture(scope="module")
def saved(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{kind: checkpoint of two data ranks after two steps}."""
    found = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp("saved")
        run_on_ranks(checkpoint_ranks.train_and_save, 2, hf, directory, setup_of(kind), [DONE])
        found[kind] = directory / "step_000002"
    return found


CHANGES: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (6, {}),
    "learning rate": (6, {"learning_rate": 7e-4}),
    "floor": (6, {"min_learning_rate": 9e-4}),
    "schedule": (6, {"schedule": "linear"}),
    "constant": (6, {"schedule": "constant", "learning_rate": 2e-5, "min_learning_rate": 0.0}),
    "warm-up": (6, {"warmup_steps": 5}),
    "more steps": (11, {}),
    "fewer steps": (4, {}),
}
"""Steps of the run and optimizer settings of the launch that resumes."""


@pytest.fixture(scope="module", params=KINDS)
def rates(request: pytest.FixtureRequest, hf: Path, saved: dict[str, Path]) -> list[dict[str, resume_ranks.Settings]]:
    """The settings of each rank after each change, for one kind."""
    setups = {name: setup_of(request.param, steps, **changes) for name, (steps, changes) in CHANGES.items()}
    return run_on_ranks(resume_ranks.all_rates_after, 2, hf, saved[request.param], setups, AHEAD)


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_resume_the_learning_rate_follows_the_new_configuration(
    rates: list[dict[str, resume_ranks.Settings]], name: str
) -> None:
    steps, changes = CHANGES[name]
    optimizer = FIRST.model_copy(update=changes)
    expected = [expected_rate(DONE + step, optimizer, steps) for step in range(1, AHEAD + 1)]
    for found in rates:
        assert found[name].rates == pytest.approx(expected, rel=1e-9)
        assert found[name].counts <= {DONE + AHEAD} and found[name].position == DONE + AHEAD


@pytest.mark.parametrize("kind", ["float32 distributed", "float32 replicated"])
def test_after_a_resume_the_weight_update_is_proportional_to_the_new_rate(
    hf: Path, saved: dict[str, Path], kind: str
) -> None:
    """Without decay an Adam step is proportional to the rate."""
    once, twice = (
        run_on_ranks(
            resume_ranks.movement_after, 1, hf, saved[kind],
            setup_of(kind, schedule="constant", learning_rate=rate, weight_decay=0.0, min_learning_rate=0.0),
        )[0]
        for rate in (1e-3, 2e-3)
    )  # fmt: skip
    assert max(float(moved.abs().max()) for moved in once.values()) > 1e-4
    for name, moved in once.items():
        torch.testing.assert_close(twice[name], 2 * moved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_run_with_loaded_optimizer_state_uses_its_own_schedule_and_constants(
    hf: Path, saved: dict[str, Path], kind: str
) -> None:
    setup = setup_of(kind, 8, beta1=0.8, beta2=0.9, eps=1e-6, learning_rate=1e-3)
    expected = [expected_rate(step, setup.optimizer, 8) for step in range(1, AHEAD + 1)]
    for found in run_on_ranks(resume_ranks.rates_after, 2, hf, saved[kind], setup, AHEAD, True):
        assert found.rates == pytest.approx(expected, rel=1e-9)
        assert (found.betas, found.eps, found.position) == ({(0.8, 0.9)}, {1e-6}, AHEAD)
        assert found.counts <= {DONE + AHEAD}, "moments and their number of steps belong together"


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_run_with_loaded_optimizer_state_has_every_weight_and_moment_of_the_checkpoint(
    hf: Path, saved: dict[str, Path], kind: str
) -> None:
    for resumed, begun, untouched in run_on_ranks(
        resume_ranks.begun_with_optimizer, 2, hf, saved[kind], setup_of(kind)
    ):
        of_run = {name for name in resumed if name in ("random", "schedule") or name.split()[-2] == "group"}
        assert len(resumed) - len(of_run) > 20
        assert {name for name in resumed if resumed[name] != begun[name]} <= of_run
        assert untouched and resumed["schedule"] != begun["schedule"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("parallel", "ranks"), [(ParallelConfig(), 2), (ParallelConfig(tensor=2), 2)], ids=["dp2", "tp2"]
)
def test_a_new_run_from_checkpoint_weights_equals_a_run_from_its_export(
    hf: Path, saved: dict[str, Path], kind: str, parallel: ParallelConfig, ranks: int, tmp_path: Path
) -> None:
    setup = replace(setup_of(kind), parallel=parallel)
    run_on_ranks(resume_ranks.export_checkpoint, 1, hf, saved[kind], tmp_path / "export", setup_of(kind))
    expected = run_on_ranks(resume_ranks.trained_from, ranks, tmp_path / "export", setup, None)
    found = run_on_ranks(resume_ranks.trained_from, ranks, hf, setup, saved[kind])
    plain = run_on_ranks(resume_ranks.trained_from, ranks, hf, setup, None)
    assert found == expected != plain


def test_replicated_optimizer_state_is_refused_by_a_distributed_optimizer(hf: Path, saved: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="written with a replicated optimizer, found a distributed one"):
        run_on_ranks(
            resume_ranks.rates_after, 1, hf, saved["float32 replicated"], setup_of("float32 distributed"), 1, True
        )
