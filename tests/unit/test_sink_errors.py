"""Sinks whose disk or service fails: one line that names the key, and all sinks are closed at the end of a run."""

from __future__ import annotations

import errno
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.files import read_step_lines
from tropd_mcore.monitor.jsonl import JsonLines
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.monitor.tensorboard import TensorBoard
from tropd_mcore.monitor.wandb import WeightsAndBiases

FULL = OSError(errno.ENOSPC, "No space left on device")
SET = r"set run\.dir \(or monitor\.tensorboard=false\) to another place"


class Writer:
    """A SummaryWriter that fails at one call."""

    fails_at = "flush"

    def __init__(self, folder: str, purge_step: int) -> None:
        self._met("__init__")

    def _met(self, call: str) -> None:
        if call == type(self).fails_at:
            raise FULL

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self._met("add_scalar")

    def flush(self) -> None:
        self._met("flush")

    def close(self) -> None:
        self._met("close")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


@pytest.mark.parametrize("call", ["__init__", "add_scalar", "flush", "close"])
def test_a_full_disk_under_tensorboard_gives_a_one_line_error(
    tmp_path: Path, tensorboard: None, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "fails_at", call)
    with pytest.raises(DataError, match=rf"^cannot write \S*tensorboard: No space left on device; .*{SET}$"):
        sink = TensorBoard(tmp_path / "tensorboard", 0)
        sink.write(0, {"loss": 0.5})
        sink.close()


class Service:
    """A stand-in for wandb."""

    class Error(Exception):
        """Like wandb's, the base class of its errors."""

    def __init__(self, error: Exception, at: str) -> None:
        self.error, self.at = error, at

    def init(self, **_settings: object) -> Service:
        return self._met("init")

    def log(self, values: dict[str, float], step: int) -> Service:
        return self._met("log")

    def finish(self) -> Service:
        return self._met("finish")

    def _met(self, call: str) -> Service:
        if call == self.at:
            raise self.error
        return self


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [FULL, Service.Error("api_key not configured\nsecond line")], ids=["disk", "service"])
def test_an_error_of_wandb_gives_one_line_that_names_the_key(
    tmp_path: Path, call: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(error, call))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^monitor\.wandb_project: wandb says: .*; fix that, ") as caught:
        sink = WeightsAndBiases("project", tmp_path, {})
        sink.write(0, {"loss": 0.5})
        sink.close()
    assert "\n" not in str(caught.value)


def test_an_unreadable_wandb_run_id_gives_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(FULL, "never"))  # type: ignore[arg-type]
    (tmp_path / "wandb.id").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"wandb\.id: expected the id of the W&B run, .*; remove the file"):
        WeightsAndBiases("project", tmp_path, {})


class Failing:
    """A sink that cannot be closed."""

    def __init__(self, closed: list[str], error: Exception | None = None) -> None:
        self._closed, self._error = closed, error

    def write(self, step: int, metrics: object) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._closed.append("closed")
        raise DataError("cannot write the last events")


def monitor_of(*sinks: Failing) -> Monitor:
    monitor = Monitor.__new__(Monitor)
    monitor._sinks = list(sinks)
    return monitor


def test_every_sink_is_closed_and_an_error_while_closing_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed: list[str] = []
    with caplog.at_level(logging.WARNING):
        monitor_of(Failing(closed), Failing(closed)).close()
    assert len(closed) == 2 and caplog.text.count("cannot write the last events") == 2


def test_a_full_disk_under_the_output_of_the_job_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd_mcore.monitor.monitor.compute_metrics", lambda record: {})
    record: Any = "a record"
    with pytest.raises(DataError, match="^cannot write standard output: No space left on device; make room"):
        monitor_of(Failing([], FULL)).log(0, record)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda line: line[: len(line) // 2],
    "no text": lambda line: b"\xff\xfe\x00" + line,
    "zeros, as after a crash of the machine": lambda line: bytes(len(line)),
    "a list": lambda line: b"[1, 2]",
    "without a step": lambda line: b'{"loss": 0.5}',
    "nothing": lambda line: b"",
}


@pytest.mark.parametrize("how", TORN)
def test_a_damaged_line_inside_the_metrics_file_gives_a_one_line_error_with_its_number(
    tmp_path: Path, how: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(4)]
    lines[2] = TORN[how](lines[2])
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    for read in (read_step_lines, lambda place: JsonLines(place, 4)):
        with pytest.raises(
            DataError, match=r"metrics\.jsonl:3: expected a JSON object with `step`, .*; restore"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"".join(line + b"\n" for line in [*lines[:2], lines[3]]) + lines[2])
    assert [record["step"] for record in read_step_lines(path)] == [0, 1, 3]


def test_a_metrics_path_that_is_not_a_file_gives_a_one_line_error(tmp_path: Path) -> None:
    assert read_step_lines(tmp_path / "absent") == []
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_step_lines(tmp_path)
