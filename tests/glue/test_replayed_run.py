"""Rollouts of another run: the records of both are compared, and ids of another tokenizer are refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.glue.launches import Runs, append, copy_inputs, edit, swap_two_tokens, write_models
from tests.glue.stubs import one_rank
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.records.run_dir import RunDir


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def runs(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Runs]:
    """The replayed run, `other`, was launched over the same models and prompts."""
    copy_inputs(models, tmp_path)
    with one_rank() as layout:
        runs = Runs(tmp_path, layout, caplog)
        runs.launch(run={"dir": other(runs).root})
        yield runs


def other(runs: Runs) -> RunDir:
    return RunDir(runs.root / "other")


def replays(runs: Runs, **sections: Any) -> list[str]:
    """The lines of a launch that replays `other` about that run."""
    runs.caplog.clear()
    with runs.caplog.at_level(logging.WARNING):
        runs.compare(run={"replay": other(runs).root}, **sections)
    return [message.removeprefix(f"run.replay={other(runs).root}: ") for message in runs.caplog.messages]


def test_a_run_with_the_same_student_prompts_and_sampling_is_replayed_without_a_message(runs: Runs) -> None:
    assert replays(runs) == []
    copy = shutil.copytree(runs.root / "student", runs.root / "copy")
    assert replays(runs, student={"path": copy}, teacher={"path": runs.root / "student"}) == []


def test_other_prompts_and_another_student_are_reported(runs: Runs) -> None:
    append(runs.root / "prompts.jsonl")
    edit(runs.root / "student" / "model.safetensors")
    student, prompts = replays(runs)
    assert student.startswith("its rollouts come from another student: ")
    assert prompts.startswith("its rollouts answer other prompts: ")


def test_differing_settings_that_shaped_the_replayed_rollouts_are_reported(runs: Runs) -> None:
    changes = {"temperature": 0.7, "max_new_tokens": 5, "end_tokens": ["a"], "server": {"port": 7}}
    data = {"chat_template_kwargs": {"enable_thinking": False}, "template_date": "2024-02-29"}
    lines = replays(runs, rollout=changes, data=data)
    pattern = r"its rollouts were sampled with other settings, so here .*: .* -> .* has no effect"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert {line.split("here ")[1].split(":")[0] for line in lines} == {
        "rollout.temperature",
        "rollout.max_new_tokens",
        "rollout.end_tokens",
        "data.chat_template_kwargs.enable_thinking",
        "data.template_date",
    }


def test_a_replayed_run_without_records_is_reported_as_unknown(runs: Runs) -> None:
    other(runs).inputs.unlink()
    other(runs).config.unlink()
    (line,) = replays(runs)
    assert line.startswith("no inputs.json there: ")


def test_rollouts_of_another_vocabulary_are_refused(runs: Runs) -> None:
    mine = shutil.copytree(runs.root / "student", runs.root / "mine")
    swap_two_tokens(mine)
    with pytest.raises(DataError, match=r"run\.replay=.* differ in 2 of"):
        replays(runs, student={"path": mine})


def test_rollouts_of_another_tokenizer_that_is_gone_are_refused(runs: Runs) -> None:
    mine = (runs.root / "student").rename(runs.root / "mine")
    swap_two_tokens(mine)
    with pytest.raises(
        DataError, match=r"the student of that run \(.*student\) is gone, so the two cannot be compared"
    ):
        replays(runs, student={"path": mine})


def test_a_tokenizer_that_differs_only_in_its_settings_is_reported(runs: Runs) -> None:
    mine = shutil.copytree(runs.root / "student", runs.root / "mine")
    file = mine / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    (line,) = replays(runs, student={"path": mine})
    assert line.startswith("settings of its student's tokenizer differ: ")


def test_damaged_records_of_the_replayed_run_give_a_one_line_error(runs: Runs) -> None:
    other(runs).inputs.write_text("{")
    with pytest.raises(ConfigError, match=r"other/inputs\.json: the record of the run's inputs is damaged"):
        replays(runs)


@pytest.mark.parametrize(("section", "key"), [("models", "student.path"), ("data", "data.prompts")])
def test_a_record_with_a_missing_entry_gives_a_one_line_error(runs: Runs, section: str, key: str) -> None:
    path = other(runs).inputs
    record = json.loads(path.read_text())
    del record[section][key]
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"other/inputs\.json: expected {key} in it \(edited\?\); restore it"):
        replays(runs)


def test_a_recorded_configuration_with_a_missing_key_gives_no_traceback(runs: Runs) -> None:
    path = other(runs).config
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "temperature:" not in line))
    replays(runs)
