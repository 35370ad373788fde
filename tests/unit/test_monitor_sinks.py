"""Sinks of metrics: on rank 0 only, null for missing values, and complete files after a crash or resume."""

import json
import sys
import types

import pytest

from tests.unit.test_monitor_metrics import make_record
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.files import read_step_lines
from tropd_mcore.monitor.jsonl import JsonLines, truncate
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.monitor.tensorboard import TensorBoard
from tropd_mcore.monitor.wandb import WeightsAndBiases

NAN = float("nan")


def make_config(**monitor) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "run"},
            "student": {"path": "student"},
            "teacher": {"kind": "megatron", "path": "teacher"},
            "data": {"prompts": "prompts.jsonl"},
            "monitor": monitor,
        }
    )


def test_rank_zero_writes_one_json_line_per_step_and_other_ranks_write_nothing(tmp_path, capsys):
    for rank in (1, 0):
        monitor = Monitor(make_config(), tmp_path / str(rank), rank)
        monitor.log(0, make_record() if rank == 0 else None)
        monitor.close()
    assert not (tmp_path / "1").exists()
    (record,) = read_step_lines(tmp_path / "0" / "metrics.jsonl")
    assert record["step"] == 0 and record["guidance/alpha"] == 0.75 and record["engine/corrected"] is None
    assert capsys.readouterr().out.count("\n") == 2


def test_values_that_are_not_finite_become_null_and_the_file_is_strict_json(tmp_path):
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write(3, {"a": NAN, "b": float("-inf"), "c": 0.5})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 3, "a": None, "b": None, "c": 0.5}


def test_a_resume_drops_repeated_steps_and_a_line_cut_off_by_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    for step in range(5):
        sink.write(step, {"x": step / 3})
    path.write_text(path.read_text() + '{"step": 5, "x": 1.')
    resumed = JsonLines(path, 3)
    resumed.write(3, {"x": -1.0})
    assert [(record["step"], record["x"]) for record in read_step_lines(path)] == [
        (0, 0.0),
        (1, 1 / 3),
        (2, 2 / 3),
        (3, -1.0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_dropping_steps_keeps_the_old_file_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match="No space left"):
        truncate(path, 1)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected a JSON object with `step`"):
        read_step_lines(path)


def test_missing_optional_packages_name_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'tropd-mcore\[wandb\]'"):
        WeightsAndBiases("project", tmp_path, {})
    with pytest.raises(ConfigError, match=r"pip install 'tropd-mcore\[tensorboard\]'"):
        TensorBoard(tmp_path, 0)


class RecordingRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_all_launches_of_a_run_directory_write_to_one_wandb_run(tmp_path, monkeypatch):
    calls: list[dict] = []
    runs: list[RecordingRun] = []

    def init(**settings: object) -> RecordingRun:
        calls.append(settings)
        runs.append(RecordingRun())
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        monitor = Monitor(make_config(wandb_project="distil"), tmp_path, 0)
        monitor.log(4, make_record())
        monitor.close()
    assert calls[0]["id"] == calls[1]["id"] and calls[0]["project"] == "distil" and calls[0]["resume"] == "allow"
    step, values = runs[0].logged[0]
    assert step == 4 and values["guidance/alpha"] == 0.75 and "engine/corrected" not in values
    assert all(run.finished for run in runs)


def test_tensorboard_gets_only_values_that_exist(tmp_path, monkeypatch):
    written: dict[str, float] = {}

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path), 7)

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            written[name] = value

        def flush(self) -> None:
            pass

        def close(self) -> None:
            written["closed"] = 1.0

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    sink = TensorBoard(tmp_path, 7)
    sink.write(7, {"a": 1.5, "b": NAN})
    sink.close()
    assert written == {"a": 1.5, "closed": 1.0}


def test_a_resumed_run_says_which_steps_metrics_jsonl_lacks(tmp_path, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path, 3)
    assert "no metrics of 3 of the 3 earlier steps, the first is step 0" in caplog.text
    caplog.clear()
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 3}\n')
    JsonLines(path, 3)
    assert "no metrics of 1 of the 3 earlier steps, the first is step 1" in caplog.text
    caplog.clear()
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonLines(path, 2)
    assert not caplog.text
