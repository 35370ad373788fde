"""When a model of the job is compared with an independent reading, when not, and the log line in that case."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.glue.stubs import make_config, one_rank
from tropd_mcore.errors import GateError, ModelError
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train import model_check
from tropd_mcore.train.inputs import Inputs, ModelInput
from tropd_mcore.train.model_check import EXACT, ROUNDED, ReadingDifference, bounds_of, check_model

IDS = np.array([5, 6, 7, 8], np.int32)
EXPECTED = np.array([-1.0, -2.0, -3.0], np.float32)


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


class Job:
    """`check_model` with results set by the test. `readings` counts the independent readings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layout: Layout, root: Path) -> None:
        self.layout, self.root = layout, root
        self.readings: list[Path] = []
        self.found = EXPECTED[None].astype(np.float64)
        self.missing: str | None = None
        self.files = {"config.json": "abc"}
        self.launch = {"torch": "2.13", "ranks": "1"}
        self.dtype = torch.float32
        self.sections: dict[str, Any] = {}
        monkeypatch.setattr(model_check, "fits", lambda folder: self.missing)
        monkeypatch.setattr(model_check, "probe_ids", lambda folder: IDS)
        monkeypatch.setattr(model_check, "independent_log_probs", self._read)
        monkeypatch.setattr(model_check, "probe_log_probs", lambda model, ids, settings: self.found)
        model_check._independent.cache_clear()

    def _read(self, folder: Path, ids: Any) -> Any:
        self.readings.append(folder)
        return EXPECTED

    def check(self, key: str = "teacher.path") -> list[Path]:
        """Check once. Returns the folders that were read independently."""
        before = len(self.readings)
        model: Any = SimpleNamespace(
            config=SimpleNamespace(params_dtype=self.dtype), platform=SimpleNamespace(name="cpu")
        )
        folders = {"student.path": "student", "teacher.path": "teacher"}
        inputs = Inputs(
            data={},
            models={name: ModelInput(path=path, files=self.files) for name, path in folders.items()},
            launch=self.launch,
        )
        config = make_config(self.root, **self.sections)
        context: Any = SimpleNamespace(config=config, layout=self.layout, run_dir=RunDir(self.root))
        check_model(context, key, model, inputs)
        return self.readings[before:]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Job:
    caplog.set_level(logging.INFO)
    return Job(monkeypatch, layout, tmp_path)


def test_a_compared_model_is_not_compared_again_until_something_changes(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    assert job.check() == [Path("teacher")]
    caplog.clear()
    assert job.check() == []
    (line,) = caplog.messages
    assert "teacher.path was compared at an earlier launch" in line
    for change in ({"files": {"config.json": "other"}}, {"launch": {"torch": "2.14"}}, {"dtype": torch.bfloat16}):
        model_check._independent.cache_clear()
        vars(job).update(change)
        assert job.check() == [Path("teacher")], change
        assert job.check() == []
    job.sections = {"loss": {"form": "logits"}}
    model_check._independent.cache_clear()
    assert job.check() == [Path("teacher")]


def test_a_model_at_another_layout_is_compared_again(job: Job) -> None:
    job.check()
    record = json.loads((job.root / "model_checks.json").read_text())
    record["teacher.path"]["of"]["layout"][0] = 2
    (job.root / "model_checks.json").write_text(json.dumps(record))
    model_check._independent.cache_clear()
    assert job.check() == [Path("teacher")]


@pytest.mark.parametrize("text", ["", "[]", '{"teacher.path": 3}', '{"teacher.path": {"of": 1}}'])
def test_a_damaged_record_only_repeats_the_comparison(job: Job, text: str) -> None:
    (job.root / "model_checks.json").write_text(text)
    assert job.check() == [Path("teacher")]


def test_models_of_one_folder_share_one_reading(job: Job) -> None:
    job.sections = {"student": {"path": "teacher"}}
    assert job.check("student.path") == [Path("teacher")]
    assert job.check("teacher.path") == []


def test_a_difference_stops_the_run_and_is_not_remembered(job: Job) -> None:
    job.found = job.found + np.array([0.0, 0.0, 2e-3])
    for _ in range(2):
        with pytest.raises(GateError) as caught:
            job.check()
    message = str(caught.value)
    assert "\n" not in message and not (job.root / "model_checks.json").exists()
    assert all(word in message for word in ("gates.model_reading", "teacher.path=teacher", "2.0e-03", "1e-03"))


def test_a_softcap_that_the_model_lacks_is_named_as_the_likely_cause(job: Job) -> None:
    job.found, job.sections = job.found + 1.0, {"loss": {"logit_softcap": 30.0}}
    with pytest.raises(GateError, match=r"loss\.logit_softcap = 30"):
        job.check()


def test_the_error_of_reading_a_folder_is_passed_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, ids: Any) -> Any:
        raise ModelError("transformers cannot load it")

    monkeypatch.setattr(model_check, "independent_log_probs", fails)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        job.check()


@pytest.mark.parametrize(
    ("key", "sections", "level", "words"),
    [
        ("teacher.path", {}, "WARNING", "nothing else compares it"),
        ("student.path", {"gates": {"sampler_logprob": True}}, "INFO", "gates.sampler_logprob"),
        ("student.path", {"gates": {"sampler_logprob": False}}, "WARNING", "nothing else compares it"),
        (
            "student.path",
            {"gates": {"sampler_logprob": True}, "run": {"replay": "other"}},
            "WARNING",
            "nothing else compares it",
        ),
    ],
)
def test_if_the_host_is_too_small_the_log_says_why_and_what_else_compares_the_model(
    job: Job, caplog: pytest.LogCaptureFixture, key: str, sections: dict[str, Any], level: str, words: str
) -> None:
    job.missing, job.sections = "takes 60.0 GiB and 20.0 GiB are available", sections
    assert job.check(key) == []
    (record,) = caplog.records
    assert record.levelname == level
    assert all(word in record.getMessage() for word in (key, "60.0 GiB", "20.0 GiB", words))


def test_the_gate_of_the_model_check_can_be_switched_off(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.sections = {"gates": {"model_reading": False}}
    assert job.check() == [] and caplog.messages == []


def test_the_bounds_of_the_model_check_depend_on_dtype_and_device() -> None:
    def of(dtype: torch.dtype, device: str) -> object:
        model: Any = SimpleNamespace(config=SimpleNamespace(params_dtype=dtype), platform=SimpleNamespace(name=device))
        return bounds_of(model)

    assert of(torch.float32, "cpu") is EXACT
    assert of(torch.bfloat16, "cpu") is of(torch.float32, "cuda") is ROUNDED


def test_the_worst_replica_counts_and_a_nan_is_an_infinite_difference() -> None:
    expected = np.array([-1.0, -2.0], np.float32)
    found = np.array([[-1.0, -2.0], [-1.25, -2.0]])
    assert ReadingDifference.of(found, expected).largest == 0.25
    found[0, 1] = np.nan
    difference = ReadingDifference.of(found, expected)
    assert np.isinf(difference.largest) and not difference.within(ROUNDED)
