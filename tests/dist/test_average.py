"""The moving average of the student's weights: its arithmetic in every layout, and a resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import average_ranks
from tests.dist.average_ranks import Course
from tests.dist.checkpoint_ranks import Setup
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ModelError

OVERLAPPED = OptimizerConfig(learning_rate=3e-3, overlap_grad_reduce=True, overlap_param_gather=True)
STEPS = 3


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hf") / "m", tied=True)


def courses(hf: Path, ranks: int, setup: Setup, rate: float, dtype: str | None = None) -> list[Course]:
    return run_on_ranks(average_ranks.course, ranks, hf, setup, rate, dtype, STEPS)


@pytest.mark.parametrize(
    ("setup", "ranks", "dtype"),
    [
        pytest.param(Setup(optimizer=OVERLAPPED), 2, None, id="dp2 bf16, gather pending"),
        pytest.param(Setup(ParallelConfig(tensor=2), dtype="float32"), 2, None, id="tp2 fp32"),
        pytest.param(
            Setup(ParallelConfig(tensor=2)), 2, "float32", id="tp2 bf16, fp32 teacher", marks=pytest.mark.slow
        ),
        pytest.param(
            Setup(ParallelConfig(pipeline=2, virtual_pipeline=2)), 2, None, id="pp2 vpp2", marks=pytest.mark.slow
        ),
    ],
)
def test_the_average_equals_the_oracle_after_every_step(hf: Path, setup: Setup, ranks: int, dtype: str | None) -> None:
    rate = 0.05
    for found in courses(hf, ranks, setup, rate, dtype):
        names = found.student[0].keys()
        assert len(names) > 10 and found.exact[0].keys() == found.rounded[0].keys() == names
        for name in names:
            expected = found.student[0][name].double()
            for step in range(STEPS + 1):
                if step:
                    expected = expected + rate * (found.student[step][name].double() - expected)
                exact, rounded = found.exact[step][name], found.rounded[step][name]
                torch.testing.assert_close(exact.double(), expected, rtol=3e-7, atol=1e-9, msg=f"{name} {step}")
                assert exact.dtype is torch.float32 and torch.equal(rounded, exact.to(rounded.dtype)), name
        assert any(not torch.equal(found.exact[0][name], found.exact[-1][name]) for name in names)


def test_the_average_keeps_updates_that_bfloat16_arithmetic_would_lose(hf: Path) -> None:
    found = courses(hf, 1, Setup(), 1e-3)[0]
    moved = lost = 0
    for name, start in found.student[0].items():
        inexact = start.clone()
        for step in range(1, STEPS + 1):
            inexact += 1e-3 * (found.student[step][name] - inexact)
        changed = found.exact[-1][name] != found.exact[0][name]
        moved += int(changed.sum())
        lost += int((changed & (inexact == start)).sum())
    assert lost > 0.9 * moved > 1000


@pytest.mark.slow
def test_an_average_does_not_change_how_the_student_trains(hf: Path) -> None:
    setup = Setup(optimizer=OVERLAPPED)
    alone = run_on_ranks(average_ranks.trained_alone, 2, hf, setup, STEPS)
    for found, expected in zip(courses(hf, 2, setup, 0.05), alone, strict=True):
        assert all(torch.equal(found.student[-1][name], expected[name]) for name in expected)


def test_an_average_of_rate_one_is_the_last_student_and_of_rate_zero_the_first(hf: Path) -> None:
    for found in courses(hf, 2, Setup(), 1.0):
        for student, rounded in zip(found.student, found.rounded, strict=True):
            assert all(torch.equal(student[name], rounded[name]) for name in student)
    for found in courses(hf, 2, Setup(), 0.0):
        for rounded in found.rounded:
            assert all(torch.equal(found.student[0][name], rounded[name]) for name in rounded)
        assert any(not torch.equal(found.student[0][name], found.student[-1][name]) for name in found.student[0])


@pytest.mark.parametrize(
    ("setup", "ranks"),
    [
        pytest.param(Setup(ParallelConfig(tensor=2)), 2, id="tp2 bf16"),
        pytest.param(Setup(optimizer=OVERLAPPED), 2, id="dp2 bf16 overlapped", marks=pytest.mark.slow),
        pytest.param(Setup(dtype="float32"), 2, id="dp2 fp32", marks=pytest.mark.slow),
        pytest.param(
            Setup(ParallelConfig(pipeline=2, virtual_pipeline=2)), 2, id="pp2 vpp2 bf16", marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_average_is_bit_for_bit_that_of_an_uninterrupted_run(
    hf: Path, setup: Setup, ranks: int, tmp_path: Path
) -> None:
    for straight, resumed in run_on_ranks(average_ranks.straight_and_resumed, ranks, hf, tmp_path, setup):
        assert len(straight) > 30
        assert {name for name in straight if straight[name] != resumed[name]} == set()


@pytest.mark.slow
def test_another_layout_reads_the_same_average(hf: Path, tmp_path: Path) -> None:
    two = Setup(ParallelConfig(tensor=2))
    run_on_ranks(average_ranks.straight_and_resumed, 2, hf, tmp_path, two)
    path = tmp_path / "step_000002"
    expected = run_on_ranks(average_ranks.exports_of_the_average, 2, hf, path, two)[0]
    for setup, ranks in ((Setup(), 1), (Setup(ParallelConfig(pipeline=2, virtual_pipeline=2)), 2)):
        found = run_on_ranks(average_ranks.exports_of_the_average, ranks, hf, path, setup)[0]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_average_in_a_checkpoint_may_be_ignored_but_a_missing_one_is_refused_in_one_line(
    hf: Path, tmp_path: Path
) -> None:
    run_on_ranks(average_ranks.save_and_load, 1, hf, tmp_path / "with", True, False)
    with pytest.raises(ModelError, match="holds no average of the weights") as caught:
        run_on_ranks(average_ranks.save_and_load, 1, hf, tmp_path / "without", False, True)
    assert "\n" not in str(caught.value)
