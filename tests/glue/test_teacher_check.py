"""A served teacher during a run: what is checked when, and the cost of a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.glue.faults import on_ranks
from tests.glue.served_model import URL, Served, config_of
from tests.glue.stubs import make_layout, one_rank
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError, ServerDied, TropdError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher import identity_check as module
from tropd_mcore.teacher.identity_check import TeacherCheck


@pytest.fixture(autouse=True)
def readings(model_scores: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders read by transformers once for all tests."""
    monkeypatch.setattr(module, "independent_log_probs", lambda folder, ids: model_scores[folder.name])


def run(server: Served, config: Config, steps: list[int], *, change: Callable[[int], None] = lambda step: None) -> str:
    """The steps of one launch, each after `change`. Returns the error that ends it."""
    with one_rank() as layout:
        check = TeacherCheck(server, config, layout.groups.control)  # type: ignore[arg-type]
        for step in steps:
            change(step)
            try:
                check.at_step(step)
                if (step + 1) % 4 == 0:
                    check.before_checkpoint(step + 1)
            except GateError as error:
                return f"{step}: {error}"
    return ""


def test_between_two_checks_only_the_label_is_requested(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    server = Served(model_scores["teacher"])
    asked: list[str] = []

    def note(step: int) -> None:
        asked.append("all" if "score" in server.asked else "label")
        server.asked.clear()

    config = config_of(model_folders, tmp_path, teacher={"check_every": 3})
    with one_rank() as layout:
        check = TeacherCheck(server, config, layout.groups.control)  # type: ignore[arg-type]
        note(-1)
        for step in range(7, 18):
            check.at_step(step)
            note(step)
            if step + 1 == 12:
                check.before_checkpoint(12)
                note(step)
    before, after = ["label", "label", "label", "all", "label", "all"], ["label"] * 3 + ["all"] + ["label"] * 2
    assert asked == ["all", *before, *after], "at the start, at step 10, before the checkpoint, at 12 + 3"


@pytest.mark.parametrize(
    ("change", "said", "noticed"),
    [
        ({"label": "v7"}, "weight_version default -> v7", 2),
        ({"model_path": "other"}, "model_path somewhere -> other", 2),
        ({"checksum": "bbbbbbbbbbbbbbbb"}, "checksum aaaaaaaaaaaa -> bbbbbbbbbbbb", 3),
        ({"checksum": None}, "checksum aaaaaaaaaaaa -> none", 3),
        ({"logp": None}, "scores of a text by ", 3),
    ],
)
def test_a_teacher_that_changes_in_mid_run_stops_the_run_with_old_and_new_value(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
    noticed: int,
) -> None:
    server = Served(model_scores["teacher"])
    if "logp" in change:
        change = {"logp": model_scores["third"]}

    def at_step_two(step: int) -> None:
        if step == 2:
            vars(server).update(change)

    message = run(server, config_of(model_folders, tmp_path), list(range(9)), change=at_step_two)
    assert message.startswith(f"{noticed}: gates.teacher_identity: teacher.server ({URL}) serves another model than at")
    assert said in message and f"the scores of steps 0 to {noticed}" in message


def test_no_checkpoint_is_written_from_steps_that_another_teacher_scored(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    server = Served(model_scores["teacher"])

    def change(step: int) -> None:
        server.checksum = "b" * 16 if step == 7 else server.checksum

    config = config_of(model_folders, tmp_path, teacher={"check_every": 1000})
    message = run(server, config, list(range(12)), change=change)
    assert (
        message.startswith("7: ") and "It was last as it should be before step 4: the scores of steps 4 to 7" in message
    )


def test_scores_that_may_be_from_another_teacher_are_removed_so_that_a_resume_repeats_them(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    run_dir, server = RunDir(tmp_path), Served(model_scores["teacher"])

    def store(step: int) -> None:
        store_scores(run_dir, step)
        server.checksum = "b" * 16 if step == 5 else server.checksum

    message = run(server, config_of(model_folders, tmp_path), list(range(9)), change=store)
    # verified before the checkpoint of 4 steps; found at step 7
    assert message.startswith("7: ") and "the same command repeats these steps" in message
    assert stored(tmp_path, "scores") == [0, 1, 2, 3] and stored(tmp_path, "rollouts") == [0, 1, 2, 3, 4]


def store_scores(run_dir: RunDir, *steps: int) -> None:
    for step in steps:
        for path in (run_dir.rollouts(step), run_dir.scores(step, 0, 0), run_dir.scores(step, 1, 0)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def stored(root: Path, folder: str) -> list[int]:
    return sorted({int(path.name[5:11]) for path in (root / folder).iterdir()})


def test_scores_of_a_killed_launch_are_used_by_the_next_unless_the_teacher_changed(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Kept scores repeat the step bit for bit. The last full check of the first launch was before step 3."""
    config, run_dir = config_of(model_folders, tmp_path, teacher={"check_every": 3}), RunDir(tmp_path)

    def launch(model: str, *steps: int) -> None:
        """Steps that store their scores after the check, and then a kill."""
        with one_rank() as layout:
            check = TeacherCheck(Served(model_scores[model]), config, layout.groups.control)  # type: ignore[arg-type]
            for step in steps:
                check.at_step(step)
                store_scores(run_dir, step)

    launch("teacher", 0, 1, 2, 3, 4)
    with pytest.raises(GateError, match=r"The scores of steps 3 to 4, which it may have made .* are removed"):
        launch("third")
    assert stored(tmp_path, "scores") == [0, 1, 2] and stored(tmp_path, "rollouts") == [0, 1, 2, 3, 4]
    launch("teacher", 3, 4)
    launch("teacher")
    assert stored(tmp_path, "scores") == [0, 1, 2, 3, 4]


def test_scores_made_before_a_teacher_restarts_as_another_model_are_dropped(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The scoring call restarts the server, too."""
    run_dir, server = RunDir(tmp_path), Served(model_scores["teacher"], restarted=lambda: None)
    with one_rank() as layout:
        check = TeacherCheck(server, config_of(model_folders, tmp_path), layout.groups.control)  # type: ignore[arg-type]
        for step in range(5):
            check.at_step(step)
            store_scores(run_dir, step)
        server.recover(ServerDied("gone"))
        server.restarted = lambda: vars(server).update(logp=model_scores["third"])
        with pytest.raises(GateError, match=r"scores of a text by .*: the scores of steps 3 to 4 and the rollouts"):
            server.recover(ServerDied("gone"))
    assert stored(tmp_path, "scores") == [0, 1, 2] and stored(tmp_path, "rollouts") == [0, 1, 2, 3]


def test_a_dead_teacher_is_restarted_and_checked_before_it_is_used(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    server = Served(model_scores["teacher"], restarted=lambda: None)

    def die(step: int) -> None:
        if step == 2:
            server.asked.clear()
            server.faults = [ServerDied("gone")]

    assert run(server, config_of(model_folders, tmp_path), [0, 1, 2], change=die) == ""
    assert server.asked == ["info", "recover", "info", "checksum", "score"]

    def come_back_as_another() -> None:
        server.logp = model_scores["third"]

    server.restarted = come_back_as_another
    message = run(server, config_of(model_folders, tmp_path), [0, 1, 2], change=die)
    assert message.startswith("2: ") and "scores of a text by " in message


def test_a_dead_teacher_at_a_url_ends_the_run(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    server = Served(model_scores["teacher"])
    config = config_of(model_folders, tmp_path)
    with one_rank() as layout:
        check = TeacherCheck(server, config, layout.groups.control)  # type: ignore[arg-type]
        server.faults = [ServerDied("gone")]
        with pytest.raises(ServerDied, match="gone"):
            check.at_step(0)


def on_this_rank(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], served: str, run_dir: Path, changed: bool
) -> tuple[str, str]:
    """(name, error) of a job of two ranks; the second has no server."""
    layout = make_layout("data")
    server = Served(model_scores[served]) if layout.rank == 0 else None
    reading = mock.patch.object(module, "independent_log_probs", lambda folder, ids: model_scores[folder.name])
    name = ""
    try:
        with reading:
            check = TeacherCheck(server, config_of(model_folders, run_dir), layout.groups.control)  # type: ignore[arg-type]
            name = check.name
        check.at_step(0)
        if server is not None and changed:
            server.label = "v7"
        check.at_step(1)
        check.before_checkpoint(2)
    except TropdError as error:
        return name, f"{type(error).__name__}: {error}"
    return name, ""


def test_only_rank_zero_asks_the_teacher_and_every_rank_raises_the_error(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    one, two = on_ranks(on_this_rank, 2, model_folders, model_scores, "teacher", tmp_path / "a", False)
    assert one == two and one[0] and one[1] == ""
    one, two = on_ranks(on_this_rank, 2, model_folders, model_scores, "teacher", tmp_path / "b", True)
    assert one == two and "GateError" in one[1] and "default -> v7" in one[1]
    one, two = on_ranks(on_this_rank, 2, model_folders, model_scores, "student", tmp_path / "c", False)
    assert one == two and one[1].startswith("GateError: gates.teacher_identity: ") and "serves the student" in one[1]
