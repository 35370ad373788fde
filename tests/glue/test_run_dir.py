"""The run directory: what `forget` removes, who may hold the lock, what is recorded, when a run has begun."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.train.run_dir import RunDir

STEPS = range(8)


def filled(root: Path) -> RunDir:
    """Rollouts and scores of two ranks of every step, and files that are neither."""
    run_dir = RunDir(root)
    for step in STEPS:
        for path in (run_dir.rollouts(step), run_dir.scores(step, 0, 0), run_dir.scores(step, 1, 2)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        run_dir.tokens(step).parent.mkdir(exist_ok=True)
        run_dir.tokens(step).touch()
    for other in ("rollouts/notes.txt", "scores/.step_000001.npz.1.partial"):
        (root / other).touch()
    return run_dir


def steps_in(run_dir: RunDir, folder: str) -> list[int]:
    return sorted(int(path.name.split(".")[0].split("_")[1]) for path in (run_dir.root / folder).glob("step_*.npz"))


@pytest.mark.parametrize(("rollouts_before", "scores_before"), [(0, 0), (3, 5), (5, 3), (0, 8), (8, 0), (-2, 1)])
def test_forget_removes_rollouts_and_scores_below_their_own_bounds_alone(
    tmp_path: Path, rollouts_before: int, scores_before: int
) -> None:
    run_dir = filled(tmp_path)
    run_dir.forget(rollouts_before=rollouts_before, scores_before=scores_before)
    assert steps_in(run_dir, "rollouts") == [step for step in STEPS if step >= rollouts_before]
    assert steps_in(run_dir, "scores") == [step for step in STEPS if step >= scores_before for _ in range(2)]
    assert steps_in(run_dir, "tokens") == list(STEPS)
    assert (tmp_path / "rollouts/notes.txt").exists() and (tmp_path / "scores/.step_000001.npz.1.partial").exists()


def test_forget_removes_steps_by_number_and_not_by_name(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.rollouts(0).parent.mkdir()
    for step in (9, 10, 99, 100, 999_999, 1_000_000):
        run_dir.rollouts(step).touch()
    run_dir.forget(rollouts_before=100, scores_before=0)
    assert steps_in(run_dir, "rollouts") == [100, 999_999, 1_000_000]
    run_dir.forget(rollouts_before=1_000_000, scores_before=0)
    assert steps_in(run_dir, "rollouts") == [1_000_000]


def test_a_file_that_cannot_be_removed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = filled(tmp_path)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match=r"cannot remove .*step_000000\S*npz: Permission denied; .* run\.dir"):
        run_dir.forget(rollouts_before=1, scores_before=0)


def test_forget_in_an_empty_directory_does_nothing(tmp_path: Path) -> None:
    RunDir(tmp_path / "absent").forget(rollouts_before=3, scores_before=3)
    assert not (tmp_path / "absent").exists()


def test_the_directory_is_held_by_one_job_at_a_time(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "new" / "run")
    lock = run_dir.lock()
    with pytest.raises(ConfigError, match=r"run.dir: .* is in use by another job; stop it or set another run.dir"):
        RunDir(run_dir.root).lock()
    os.close(lock)
    os.close(RunDir(run_dir.root).lock())


def test_a_directory_that_cannot_be_made_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run.dir: cannot write .*; choose another run.dir"):
        RunDir(tmp_path / "file" / "run").lock()


def test_the_record_is_the_last_one_that_was_written_and_none_before_the_first(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.recorded_config() is None
    for text in ("run:\n  steps: 10  # default\n", "run:\n  steps: 20  # file\n"):
        run_dir.record_config(text)
        assert run_dir.recorded_config() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.resolved.yaml"]


def test_a_record_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.config.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"resolved\.yaml: .* cannot be read: not UTF-8 text; restore or remove"):
        run_dir.recorded_config()


@pytest.mark.parametrize(
    ("left", "begun"),
    [
        ([], False),
        (["config.resolved.yaml", "inputs.json", "metrics.jsonl", "logs/rollout.log"], False),
        (["rollouts/.step_000000.npz.1.partial"], False),
        (["rollouts/step_000000.npz"], True),
        (["checkpoints/step_000002/tropd.json"], True),
    ],
    ids=str,
)
def test_a_run_has_begun_where_rollouts_or_checkpoints_are_there(tmp_path: Path, left: list[str], begun: bool) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert RunDir(tmp_path).has_begun() is begun


def test_an_export_counts_only_with_the_step_that_it_was_made_at(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.exported_at() is None
    run_dir.export_step.write_text("12\n")
    assert run_dir.exported_at() is None
    run_dir.export.mkdir()
    assert run_dir.exported_at() == 12
    run_dir.export_step.unlink()
    assert run_dir.exported_at() is None
