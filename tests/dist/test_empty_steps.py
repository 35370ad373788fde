"""A step without a counted token changes nothing: no weight decay, no momentum, no schedule, no average."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import reference
from tests.dist.checkpoint_ranks import Setup
from tests.dist.empty_step_ranks import Course, course, resumed
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig

DECAYING = OptimizerConfig(
    learning_rate=3e-3, schedule="linear", warmup_steps=1, weight_decay=0.3, overlap_grad_reduce=True,
    overlap_param_gather=True,
)  # fmt: skip
SETUPS = {
    "one": (1, Setup(dtype="float32")),
    "dp2-overlapped": (2, Setup(dtype="bfloat16", optimizer=DECAYING)),
    "dp2-unsharded": (2, Setup(dtype="float32", optimizer=OptimizerConfig(distributed=False, weight_decay=0.3))),
    "tp2": (2, Setup(ParallelConfig(tensor=2), dtype="float32")),
    "pp2": (2, Setup(ParallelConfig(pipeline=2), dtype="float32")),
}
EVERYWHERE, SOMEWHERE, NOWHERE = [0, 1], [0], []


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = reference.small_vocabulary(300)
    return reference.write_model(config, tmp_path_factory.mktemp("models") / "student", seed=5)


@pytest.fixture(scope="module", params=SETUPS)
def courses(request: pytest.FixtureRequest, student: Path) -> tuple[list[Course], list[Course]]:
    """By rank: two steps, one without a token and a third, and the same without the empty one."""
    world_size, setup = SETUPS[request.param]
    with_empty = run_on_ranks(course, world_size, student, setup, [EVERYWHERE, EVERYWHERE, NOWHERE, EVERYWHERE])
    return with_empty, run_on_ranks(course, world_size, student, setup, [EVERYWHERE] * 3)


def test_a_step_without_a_token_changes_no_bit_on_any_rank(courses: tuple[list[Course], list[Course]]) -> None:
    for rank in courses[0]:
        start, _, before, after, last = rank.digests
        assert before == after | {"random": before["random"]}
        assert before["schedule"] != start["schedule"] and last["schedule"] != after["schedule"]
        moved = [name for name in before if name.startswith("chunk") and before[name] != start[name]]
        assert moved and any(last[name] != after[name] for name in moved), "the steps around it do move the weights"


def test_steps_after_an_empty_step_equal_those_of_a_run_without_it(courses: tuple[list[Course], list[Course]]) -> None:
    for with_empty, without in zip(*courses, strict=True):
        assert with_empty.digests[-1] == without.digests[-1]
        assert with_empty.reports[3] == without.reports[2]


def test_an_empty_step_is_reported_and_logged_in_one_line(courses: tuple[list[Course], list[Course]]) -> None:
    for rank in courses[0]:
        first, second, empty, last = rank.reports
        assert (empty.token_count, empty.loss, empty.grad_norm, empty.made) == (0, 0.0, 0.0, False)
        assert empty.learning_rate == second.learning_rate
        assert all(report.made and report.grad_norm > 0 for report in (first, second, last))
        assert rank.lines == ["step 2: no token was scored and trained: no optimizer step"]
        assert rank.reports == courses[0][0].reports, "every rank knows what the job did"


@pytest.mark.parametrize("name", SETUPS)
def test_a_run_whose_first_step_had_no_token_can_be_saved_and_resumed(student: Path, tmp_path: Path, name: str) -> None:
    """It then continues like a run that starts there. Megatron cannot save an optimizer that has no moments."""
    world_size, setup = SETUPS[name]
    straight = run_on_ranks(course, world_size, student, setup, [EVERYWHERE])
    for found, expected in zip(run_on_ranks(resumed, world_size, student, tmp_path, setup), straight, strict=True):
        assert found == expected.digests[-1]


def test_gradients_are_zero_after_an_empty_step(student: Path) -> None:
    assert run_on_ranks(course, 1, student, Setup(dtype="float32"), [EVERYWHERE, NOWHERE])[0].gradients_are_zero


def test_tokens_on_only_one_rank_update_the_weights_of_all_ranks(student: Path) -> None:
    ranks = run_on_ranks(course, 2, student, Setup(dtype="float32"), [SOMEWHERE])
    assert ranks[0].reports == ranks[1].reports and ranks[0].reports[0].made
    for rank in ranks:
        assert any(rank.digests[0][name] != rank.digests[1][name] for name in rank.digests[0] if "chunk" in name)
        assert rank.lines == []
