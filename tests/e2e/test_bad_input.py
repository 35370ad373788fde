"""User mistakes give one line that names the key, exit code 2, and no partial files."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(jobs.TEST_LIMIT_S)]


def refused(run_dir: Path, *overrides: str, log: Path | None = None) -> str:
    """The one error line of a job that must not start."""
    code, output = jobs.attempt(run_dir, *overrides, "parallel.tensor=1", ranks=1, log=log)
    assert code == 2, output[-4000:]
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 1, output[-4000:]
    assert "Traceback" not in output
    assert not (run_dir / "checkpoints").is_dir()
    assert not (run_dir / "metrics.jsonl").is_file()
    return errors[0]


def test_a_missing_model_folder_is_named_in_the_error(settings: list[str], tmp_path: Path) -> None:
    error = refused(tmp_path / "run", *settings, f"student.path={tmp_path / 'nowhere'}")
    assert "nowhere" in error
    assert not (tmp_path / "run").exists()


def test_a_truncated_weight_file_is_named_in_the_error(settings: list[str], example: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(example / "student", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(tmp_path / "run", *settings, f"student.path={damaged}")


def test_a_teacher_with_another_vocabulary_is_refused(settings: list[str], example: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(example / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refused(tmp_path / "run", *settings, f"teacher.path={other}")
    assert "differ in 2 of" in error
    assert "teacher.path" in error


def test_a_run_directory_that_cannot_be_written_is_named_in_the_error(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "run.dir" in refused(tmp_path / "file" / "run", *settings, log=tmp_path / "run.log")


def test_a_teacher_with_a_context_shorter_than_a_rollout_is_refused(
    settings: list[str], example: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(example / "teacher", short)
    config = json.loads((short / "config.json").read_text())
    config["max_position_embeddings"] = 32
    (short / "config.json").write_text(json.dumps(config))
    error = refused(tmp_path / "run", *settings, f"teacher.path={short}")
    assert "32 tokens" in error
    assert "rollout.max_new_tokens" in error


def test_a_taken_port_is_named_in_the_error(settings: list[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused(tmp_path / "run", *settings, f"rollout.server.port={port}")
    assert "rollout.server.port" in error


def test_a_server_that_dies_at_start_is_reported_with_its_key_and_its_log(settings: list[str], tmp_path: Path) -> None:
    error = refused(tmp_path / "run", *settings, "rollout.server.extra_args=[--no-such-option]")
    assert "rollout.server" in error
    assert "log" in error


def test_all_problems_of_a_configuration_are_reported_at_once(settings: list[str], tmp_path: Path) -> None:
    code, output = jobs.attempt(
        tmp_path / "run", *settings, "optimizer.learning_rat=1", "rollout.temperature=-1", ranks=1
    )
    assert code == 2
    assert "did you mean" in output
    assert "rollout.temperature" in output
    assert not (tmp_path / "run").exists()
