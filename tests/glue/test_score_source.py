"""Teacher scores of a step: stored ones are used by all ranks or by none, and only for the same inputs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.glue.faults import on_ranks
from tests.glue.stubs import Axis, by_place, make_layout, make_rollouts, make_scores, one_rank, pack_for, row_values
from tropd_mcore.data.packing import PackedStep
from tropd_mcore.errors import DataError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.score_source import ScoreSource
from tropd_mcore.types import MicroBatch, Rollout, StudentPass, TeacherScores

STEP = 5
Values = dict[tuple[int, int], float] | None
Found = tuple[int, Values]
"""(times that the teacher was asked on this rank, log-prob of each of its rows; None outside the last stage)"""


@dataclass
class CountingTeacher:
    """A teacher whose log-probs identify the launch that asked it."""

    layout: Layout
    launch: int
    asked: list[Sequence[Tensor | None]] = field(default_factory=list)

    def score(
        self, rollouts: list[Rollout], packed: PackedStep, own_ids: Sequence[Tensor | None], verdicts: Sequence[Any]
    ) -> list[TeacherScores | None]:
        self.asked.append(own_ids)
        if not self.layout.is_last_stage:
            return [None] * len(packed.micro_batches)
        return [make_scores(batch, row_values(batch, self.logp)) for batch in packed.micro_batches]

    def logp(self, sample: int, token: int) -> float:
        return -10.0 * self.launch - 0.1 * sample - 0.001 * token


@dataclass(frozen=True)
class Ask:
    """One launch that wants the scores of a step."""

    run_dir: Path
    launch: int
    axis: Axis = "data"
    replay: Path | None = None
    name: str = "teacher"
    on_disk: bool = True
    rollouts_of: int = STEP
    candidates: int | None = None

    def answer(self, layout: Layout) -> Found:
        """The scores of this rank. Collective."""
        teacher = CountingTeacher(layout, self.launch)
        source = ScoreSource(
            teacher, RunDir(self.run_dir), layout, replay=self.replay, name=self.name, on_disk=self.on_disk
        )
        rollouts = make_rollouts(self.rollouts_of)
        packed = pack_for(rollouts, layout)
        passes = [self._student_pass(batch) for batch in packed.micro_batches]
        scores = source.at_step(STEP, rollouts, packed, passes, [])
        assert len(scores) == len(packed.micro_batches)
        if not layout.is_last_stage:
            assert scores == [None] * len(scores)
            return len(teacher.asked), None
        present = [score for score in scores if score is not None]
        assert len(present) == len(scores), "a micro-batch of the last stage has no scores"
        return len(teacher.asked), by_place(packed.micro_batches, [score.logp_T for score in present])

    def _student_pass(self, batch: MicroBatch) -> StudentPass | None:
        if self.candidates is None:
            return None
        nothing_T = torch.zeros(len(batch.rows_T))
        ids_TL = torch.full((len(batch.rows_T), 2), self.candidates)
        return StudentPass(nothing_T, nothing_T, ids_TL, torch.zeros(len(batch.rows_T), 2))

    def on_two(self) -> tuple[list[int], list[Values]]:
        """(times asked, values) by rank."""
        found = on_ranks(_answer, 2, self)
        return [asked for asked, _ in found], [values for _, values in found]

    def on_one(self) -> Found:
        """The same for a single rank."""
        with one_rank() as layout:
            return self.answer(layout)


def _answer(ask: Ask) -> Found:
    return ask.answer(make_layout(ask.axis))


def made_by(launch: int, values: Values) -> bool:
    assert values
    expected = {place: -10.0 * launch - 0.1 * place[0] - 0.001 * place[1] for place in values}
    return all(values[place] == pytest.approx(expected[place], abs=1e-5) for place in values)


def test_scores_of_a_repeated_step_come_from_the_disk_on_every_rank(tmp_path: Path) -> None:
    asked, first = Ask(tmp_path, 1).on_two()
    assert asked == [1, 1] and first[0] and first[1] and not first[0].keys() & first[1].keys()
    asked, second = Ask(tmp_path, 2).on_two()
    assert asked == [0, 0] and second == first


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_score_again_if_one_rank_has_no_scores(tmp_path: Path, rank: int) -> None:
    Ask(tmp_path, 1).on_two()
    RunDir(tmp_path).scores(STEP, rank, 0).unlink()
    asked, values = Ask(tmp_path, 2).on_two()
    assert asked == [1, 1] and all(made_by(2, found) for found in values)
    asked, values = Ask(tmp_path, 3).on_two()
    assert asked == [0, 0] and all(made_by(2, found) for found in values)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_score_again_if_one_rank_has_scores_of_other_rows(tmp_path: Path, rank: int) -> None:
    Ask(tmp_path, 1).on_two()
    shutil.copy(RunDir(tmp_path).scores(STEP, 1 - rank, 0), RunDir(tmp_path).scores(STEP, rank, 0))
    asked, values = Ask(tmp_path, 2).on_two()
    assert asked == [1, 1] and all(made_by(2, found) for found in values)


def test_all_ranks_stop_with_one_error_if_one_rank_cannot_read_its_scores(tmp_path: Path) -> None:
    Ask(tmp_path, 1).on_two()
    RunDir(tmp_path).scores(STEP, 1, 0).write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cannot read .*step_000005.dp1.cp0.npz"):
        Ask(tmp_path, 2).on_two()


@pytest.mark.parametrize("change", [{"name": "another teacher"}, {"rollouts_of": STEP + 1}, {"candidates": 7}], ids=str)
def test_stored_scores_are_used_only_for_the_same_teacher_rows_and_candidates(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    assert Ask(tmp_path, 1).on_one()[0] == 1
    asked, values = Ask(tmp_path, 2, **change).on_one()
    assert asked == 1 and made_by(2, values)
    asked, values = Ask(tmp_path, 3, **change).on_one()
    assert asked == 0 and made_by(2, values)
    asked, values = Ask(tmp_path, 4).on_one()
    assert asked == 1 and made_by(4, values)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log lines since the last call about why the teacher scores again."""
    found = [message for message in caplog.messages if "the teacher scores again" in message]
    caplog.clear()
    return found


def test_the_reason_for_not_using_stored_scores_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Ask(tmp_path, 1).on_one()
    Ask(tmp_path, 2).on_one()
    assert told(caplog) == [], "a first scoring and a repeated step are no surprise"
    Ask(tmp_path, 3, name="another").on_one()
    (line,) = told(caplog)
    assert line.startswith(f"step {STEP}: ") and "of another teacher (teacher, here another)" in line
    Ask(tmp_path, 4, name="another", rollouts_of=STEP + 1).on_one()
    assert "of other rows" in told(caplog)[0]


def test_unused_scores_of_another_teacher_in_a_replayed_run_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Ask(tmp_path / "other", 1).on_one()
    asked, values = Ask(tmp_path / "mine", 2, replay=tmp_path / "other", name="replaced").on_one()
    assert asked == 1 and made_by(2, values)
    (line,) = told(caplog)
    assert "of another teacher (teacher, here replaced)" in line and str(tmp_path / "other" / "scores") in line


def test_stored_scores_are_not_used_for_other_student_candidates(tmp_path: Path) -> None:
    assert Ask(tmp_path, 1, candidates=7).on_one()[0] == 1
    assert Ask(tmp_path, 2, candidates=7).on_one()[0] == 0
    asked, values = Ask(tmp_path, 3, candidates=8).on_one()
    assert asked == 1 and made_by(3, values)


def test_scores_of_a_source_without_storage_are_neither_written_nor_read(tmp_path: Path) -> None:
    assert Ask(tmp_path / "run", 1, on_disk=False).on_one()[0] == 1
    assert not (tmp_path / "run").exists()
    Ask(tmp_path / "run", 2).on_one()
    for replay in (None, tmp_path / "run"):
        asked, values = Ask(tmp_path / "run", 3, on_disk=False, replay=replay).on_one()
        assert asked == 1 and made_by(3, values)
    assert made_by(2, Ask(tmp_path / "run", 4).on_one()[1])


def test_the_scores_of_a_replayed_run_are_read_on_every_rank_or_on_none(tmp_path: Path) -> None:
    other, mine = tmp_path / "other", tmp_path / "mine"
    Ask(other, 1).on_two()
    asked, values = Ask(mine, 2, replay=other).on_two()
    assert asked == [0, 0] and all(made_by(1, found) for found in values)
    RunDir(other).scores(STEP, 0, 0).unlink()
    asked, values = Ask(mine, 3, replay=other).on_two()
    assert asked == [1, 1] and all(made_by(3, found) for found in values)


def test_scores_of_the_run_itself_take_precedence_over_those_of_the_replayed_run(tmp_path: Path) -> None:
    Ask(tmp_path / "other", 1).on_one()
    Ask(tmp_path / "mine", 2).on_one()
    asked, values = Ask(tmp_path / "mine", 3, replay=tmp_path / "other").on_one()
    assert asked == 0 and made_by(2, values)
    asked, values = Ask(tmp_path / "mine", 4, replay=tmp_path / "other", rollouts_of=STEP + 1).on_one()
    assert asked == 1 and made_by(4, values)


def test_only_the_last_pipeline_stage_stores_scores_and_decides_whether_they_exist(tmp_path: Path) -> None:
    for launch, expected in ((1, 1), (2, 0)):
        asked, (first, last) = Ask(tmp_path, launch, axis="pipeline").on_two()
        assert asked == [expected] * 2 and first is None and made_by(1, last)
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["step_000005.dp0.cp0.npz"]


def test_tensor_ranks_share_one_file_of_scores(tmp_path: Path) -> None:
    for launch, expected in ((1, 1), (2, 0)):
        asked, values = Ask(tmp_path, launch, axis="tensor").on_two()
        assert asked == [expected] * 2 and values[0] == values[1] and made_by(1, values[0])
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["step_000005.dp0.cp0.npz"]
