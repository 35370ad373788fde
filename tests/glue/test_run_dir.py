"""The run directory: files removed by `forget`, the lock, the records, and when a run counts as started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.files import partial_name
from tropd_mcore.records.run_dir import Kept, RunDir

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


KEPT = [
    (Kept(None, None, None), (0, 0, 0)),
    (Kept(rollouts=None, scores=0, tokens=None, scores_needed_from=8), (0, 8, 0)),
    (Kept(rollouts=3, scores=0, tokens=2, rollouts_needed_from=8, scores_needed_from=8), (5, 8, 6)),
    (Kept(rollouts=3, scores=0, tokens=2, rollouts_needed_from=4, scores_needed_from=4), (4, 4, 6)),
    (Kept(rollouts=1, scores=2, tokens=1, rollouts_needed_from=0, scores_needed_from=8), (0, 6, 7)),
    (Kept(rollouts=100, scores=100, tokens=100, rollouts_needed_from=8, scores_needed_from=8), (0, 0, 0)),
]
"""The limits after step 7, and the first step whose rollouts, scores and tokens then exist."""


@pytest.mark.parametrize(("kept", "first"), KEPT, ids=str)
def test_stored_steps_that_are_newest_or_needed_by_a_resume_are_kept(
    tmp_path: Path, kept: Kept, first: tuple[int, int, int]
) -> None:
    run_dir = filled(tmp_path)
    run_dir.forget(STEPS[-1], kept)
    rollouts, scores, tokens = first
    assert steps_in(run_dir, "rollouts") == [step for step in STEPS if step >= rollouts]
    assert steps_in(run_dir, "scores") == [step for step in STEPS if step >= scores for _ in range(2)]
    assert steps_in(run_dir, "tokens") == [step for step in STEPS if step >= tokens]
    assert (tmp_path / "rollouts/notes.txt").exists() and (tmp_path / "scores/.step_000001.npz.1.partial").exists()


def test_forget_removes_steps_by_number_and_not_by_name(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.rollouts(0).parent.mkdir()
    (tmp_path / "rollouts/step_by_step.npz").touch()
    for step in (9, 10, 99, 100, 999_999, 1_000_000):
        run_dir.rollouts(step).touch()
    everything = Kept(rollouts=1, rollouts_needed_from=2_000_000)
    run_dir.forget(100, everything)
    assert numbers(run_dir) == [100, 999_999, 1_000_000]
    run_dir.forget(1_000_000, everything)
    assert numbers(run_dir) == [1_000_000] and (tmp_path / "rollouts/step_by_step.npz").exists()


def numbers(run_dir: RunDir) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run_dir.root / "rollouts").glob("step_[0-9]*.npz"))


def test_a_file_that_cannot_be_removed_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = filled(tmp_path)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match=r"cannot remove .*step_00000\d\S*npz: Permission denied; .* run\.dir"):
        run_dir.forget(7, Kept(rollouts=1, rollouts_needed_from=8))


def test_only_unfinished_files_of_a_killed_launch_are_removed(tmp_path: Path) -> None:
    run_dir = filled(tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for path in (run_dir.rollouts(9), run_dir.scores(9, 0, 0), run_dir.config, run_dir.logs / "rollout.server.json"):
        path.parent.mkdir(exist_ok=True)
        partial = partial_name(path)
        partial.with_name(partial.name.replace(f".{os.getpid()}@", f".{ended.pid}@")).touch()
    for name in ("step_000002", "step_000004.partial"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if str(ended.pid) not in path.name}
    assert run_dir.clean() == 5
    assert set(tmp_path.rglob("*")) == before - {run_dir.checkpoints / "step_000004.partial"}


def test_forget_in_an_empty_directory_does_nothing(tmp_path: Path) -> None:
    RunDir(tmp_path / "absent").forget(7, Kept(1, 1, 1, 8, 8))
    assert not (tmp_path / "absent").exists()


def test_a_run_directory_is_held_by_one_job_at_a_time(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "new" / "run")
    lock = run_dir.lock()
    with pytest.raises(ConfigError, match=r"run.dir: .* is in use by another job; stop it or set another run.dir"):
        RunDir(run_dir.root).lock()
    lock.release()
    RunDir(run_dir.root).lock().release()


def test_a_directory_that_cannot_be_created_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run.dir: cannot write .*; choose another run.dir"):
        RunDir(tmp_path / "file" / "run").lock()


def test_the_record_is_the_one_written_last_and_missing_before_the_first(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.recorded_config() is None
    for text in ("run:\n  steps: 10  # default\n", "run:\n  steps: 20  # file\n"):
        run_dir.record_config(text)
        assert run_dir.recorded_config() == text
    assert [path.name for path in tmp_path.iterdir()] == ["config.resolved.yaml"]


def test_a_record_that_is_not_text_gives_a_one_line_error(tmp_path: Path) -> None:
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
def test_a_run_counts_as_started_if_rollouts_or_checkpoints_exist(tmp_path: Path, left: list[str], begun: bool) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert RunDir(tmp_path).has_begun() is begun


def test_an_export_counts_only_if_its_step_is_recorded(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.exported_at() is None
    run_dir.export_step.write_text("12\n")
    assert run_dir.exported_at() is None
    run_dir.export.mkdir()
    assert run_dir.exported_at() == 12
    run_dir.export_step.unlink()
    assert run_dir.exported_at() is None
