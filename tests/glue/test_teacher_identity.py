"""A served teacher at the start of a launch, compared with its folder, the student's, and the first launch's record."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.glue.served_model import URL, Served, config_of
from tests.tiny_models import write_moe_teacher
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, GateError, ServerError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher import identity_check as module
from tropd_mcore.teacher.identity import (
    FLOAT32_BOUND,
    ROUNDED_BOUND,
    Fingerprint,
    ServedModel,
    changes,
    other_weights,
    text_ids,
)
from tropd_mcore.teacher.identity_check import TeacherIdentity
from tropd_mcore.weights.independent import independent_log_probs

READ: dict[Path, np.ndarray] = {}


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real reading of a folder, made once for all tests."""

    def reading(folder: Path, ids: np.ndarray) -> np.ndarray:
        if folder not in READ:
            READ[folder] = independent_log_probs(folder, ids)
        return READ[folder]

    monkeypatch.setattr(module, "independent_log_probs", reading)


def start(server: Served, config: Config) -> TeacherIdentity:
    """A launch that begins to train."""
    identity = TeacherIdentity(server, config)  # type: ignore[arg-type]
    identity.check_start()
    identity.record()
    return identity


def refused(server: Served, config: Config) -> str:
    identity = TeacherIdentity(server, config)  # type: ignore[arg-type]
    with pytest.raises(GateError) as caught:
        identity.check_start()
    return str(caught.value)


def unreadable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    def fits(folder: Path, *, tokens: int) -> str | None:
        assert tokens > 128, "the text is longer than the one of gates.model_reading"
        return "an independent reading takes 300 GiB" if folder in folders else None

    monkeypatch.setattr(module, "fits", fits)


def test_a_server_with_the_weights_of_teacher_path_passes_and_the_comparison_is_logged(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    start(Served(model_scores["teacher"], model_path="hub/teacher"), config_of(model_folders, tmp_path))
    assert f"teacher.server ({URL}) serves model_path hub/teacher, weight_version default, float32" in caplog.text
    assert "fingerprint from teacher.path: " in caplog.text and "; student.path: " in caplog.text


def test_a_server_with_the_weights_of_the_student_is_refused_by_name(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    message = refused(Served(model_scores["student"], model_path="hub/student"), config_of(model_folders, tmp_path))
    assert f"gates.teacher_identity: teacher.server ({URL}) serves the student: " in message
    assert f"student.path={model_folders['student']}" in message and "it says model_path hub/student" in message
    assert f"Expected teacher.path={model_folders['teacher']}: correct teacher.server.url" in message
    apart = float(np.abs(model_scores["teacher"] - model_scores["student"]).mean())
    assert f"by {apart:.1e} from teacher.path" in message


def test_a_mixture_of_experts_is_recognised_by_its_weights(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Megatron could not build it. Another one with the same sizes is refused, and so is the student."""
    folders, scores = {"student": model_folders["student"]}, {}
    for seed, name in enumerate(("teacher", "other")):
        folders[name] = write_moe_teacher(tmp_path / name, model_folders["student"], seed=seed)
        scores[name] = independent_log_probs(folders[name], text_ids(folders["student"], folders[name]))
    config = config_of(folders, tmp_path / "run")
    start(Served(scores["teacher"], model_type="qwen3_moe"), config)
    other = config_of(folders, tmp_path / "other-run")
    assert "serves other weights than teacher.path" in refused(Served(scores["other"], model_type="qwen3_moe"), other)
    student = independent_log_probs(folders["student"], text_ids(folders["student"], folders["teacher"]))
    assert "serves the student" in refused(Served(student), other)


def test_a_quantised_folder_is_not_read_and_its_first_launch_is_recorded(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    folder = write_moe_teacher(tmp_path / "teacher", model_folders["student"])
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    config = config_of({"student": model_folders["student"], "teacher": folder}, tmp_path / "run")
    start(Served(model_scores["teacher"], model_type="qwen3_moe", quantization="fp8"), config)
    assert "teacher.path: its weights are quantised (fp8), which is not computed on a CPU" in caplog.text
    assert "it is assumed, not checked, to be the model of teacher.path" in caplog.text


def test_a_server_with_any_other_weights_is_refused(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    distance = float(np.abs(model_scores["teacher"] - model_scores["third"]).mean())
    message = refused(Served(model_scores["third"]), config_of(model_folders, tmp_path))
    assert f"serves other weights than teacher.path={model_folders['teacher']}: its scores of a text differ" in message
    assert f"by {distance:.1e} nats (mean), allowed 1e-04" in message
    assert "gates.teacher_logprob_mean" in message


@pytest.mark.parametrize(("dtype", "bound"), [("float32", FLOAT32_BOUND), ("bfloat16", ROUNDED_BOUND)])
def test_the_bound_depends_on_the_dtype_of_the_server_or_on_the_key(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, dtype: str, bound: float
) -> None:
    for config, limit in (
        (config_of(model_folders, tmp_path), bound),
        (config_of(model_folders, tmp_path, gates={"teacher_logprob_mean": 0.3}), 0.3),
    ):
        start(Served(model_scores["teacher"] + 0.9 * limit, dtype=dtype), config)
        shutil.rmtree(tmp_path)
        assert "other weights" in refused(Served(model_scores["teacher"] + 1.1 * limit, dtype=dtype), config)
    for number, given in enumerate(({"quantization": "fp8"}, {"device": "cuda"}, {"device": "?"})):
        rounded = Served(model_scores["teacher"] + 0.9 * ROUNDED_BOUND, **given)  # type: ignore[arg-type]
        start(rounded, config_of(model_folders, tmp_path / str(number)))


def test_a_teacher_that_is_the_student_by_content_is_allowed(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for number, path in enumerate(("copy", "student")):
        config = config_of(model_folders, tmp_path / str(number), teacher={"path": model_folders[path]})
        start(Served(model_scores["student"]), config)


def test_a_server_with_the_students_weights_is_detected_even_if_the_teacher_is_too_large_to_read(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable(monkeypatch, model_folders["teacher"])
    assert "serves the student" in refused(Served(model_scores["student"]), config_of(model_folders, tmp_path))
    noise = 0.02 * np.where(np.arange(len(model_scores["student"])) % 2, 1.0, -1.0).astype(np.float32)
    rounded = Served(model_scores["student"] + noise, dtype="bfloat16")
    assert "serves the student" in refused(rounded, config_of(model_folders, tmp_path))
    start(Served(model_scores["teacher"]), config_of(model_folders, tmp_path))


def test_without_a_readable_folder_the_first_launch_records_and_later_ones_compare(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    unreadable(monkeypatch, model_folders["teacher"], model_folders["student"])
    config = config_of(model_folders, tmp_path)
    start(Served(model_scores["teacher"], checksum=None), config)
    assert "this first launch records one (teacher.path: an independent reading takes 300 GiB)" in caplog.text
    assert "not compared with student.path: an independent reading takes 300 GiB" in caplog.text
    caplog.clear()
    start(Served(model_scores["teacher"], checksum=None), config)
    assert "fingerprint recorded at the first launch (teacher.path: an independent reading takes" in caplog.text
    message = refused(Served(model_scores["third"], checksum=None, model_path="hub/third"), config)
    assert f"serves other weights than at the first launch of this run ({RunDir(tmp_path).teacher})" in message
    assert "it said model_path somewhere" in message and "says model_path hub/third" in message


def test_a_changed_checksum_means_another_teacher_at_the_same_layout_and_scores_decide_at_another(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(model_folders, tmp_path)
    start(Served(model_scores["teacher"]), config)
    message = refused(Served(model_scores["teacher"], checksum="bbbbbbbbbbbbbbbb"), config)
    assert "checksum aaaaaaaaaaaa -> bbbbbbbbbbbb" in message
    start(Served(model_scores["teacher"], checksum="bbbbbbbbbbbbbbbb", tensor_parallel=2), config)
    assert "teacher.server: tensor_parallel 1 -> 2 since the first launch; its weights are the same" in caplog.text
    start(Served(model_scores["teacher"], checksum=None, label="again", model_path="moved"), config)
    assert "weight_version default -> again" in caplog.text and "model_path somewhere -> moved" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"), [({"model_type": "llama"}, "with model_type llama; expected qwen3"), ({}, "vocab_size 300")]
)
def test_a_model_of_another_kind_is_refused_by_its_own_description_if_scores_cannot_be_compared(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    expected: str,
) -> None:
    unreadable(monkeypatch, model_folders["teacher"], model_folders["student"])
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "config.json").write_text('{"vocab_size": 300}')
    server = Served(model_scores["teacher"], **(given or {"model_path": str(tmp_path / "served")}))
    assert expected in refused(server, config_of(model_folders, tmp_path / "run"))


def test_a_server_whose_vocabulary_lacks_the_test_text_is_refused_before_it_is_sent(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "config.json").write_text('{"vocab_size": 50}')
    server = Served(model_scores["teacher"], model_path=str(tmp_path / "served"))
    assert "with vocab_size 50; expected 307" in refused(server, config_of(model_folders, tmp_path / "run"))
    assert "score" not in server.asked


def test_models_closer_to_each_other_than_to_the_server_are_reported_as_indistinguishable(
    model_folders: dict[str, Path],
    model_scores: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    near = model_scores["teacher"] + 0.01
    readings = {model_folders["teacher"]: model_scores["teacher"], model_folders["student"]: near}
    monkeypatch.setattr(module, "independent_log_probs", lambda folder, ids: readings[folder])
    noise = 0.03 * np.where(np.arange(len(near)) % 2, 1.0, -1.0)
    start(Served(model_scores["teacher"] + noise, dtype="bfloat16"), config_of(model_folders, tmp_path))
    assert "it is unclear which of the two it serves" in caplog.text


def test_a_folder_is_read_once_per_run_and_again_if_its_files_changed(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(folder: Path, ids: np.ndarray) -> np.ndarray:
        read.append(folder.name)
        return model_scores[folder.name][: len(ids) - 1]

    monkeypatch.setattr(module, "independent_log_probs", reading)
    config = config_of(model_folders, tmp_path)
    start(Served(model_scores["teacher"]), config)
    start(Served(model_scores["teacher"]), config)
    assert read == ["teacher", "student"]
    os.utime(model_folders["teacher"] / "model.safetensors")
    start(Served(model_scores["teacher"]), config)
    assert read == ["teacher", "student", "teacher"]


def test_a_launch_that_does_not_start_training_leaves_no_record(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    TeacherIdentity(Served(model_scores["teacher"]), config_of(model_folders, tmp_path)).check_start()  # type: ignore[arg-type]
    assert not RunDir(tmp_path).teacher.exists()


@pytest.mark.parametrize("content", ["", "{", "{}", '{"identity": 3}'])
def test_a_damaged_record_gives_a_one_line_error_that_names_the_file(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, content: str
) -> None:
    RunDir(tmp_path).teacher.write_text(content)
    with pytest.raises(ConfigError, match=r"teacher\.json: the record of the served teacher is damaged .*; remove it"):
        TeacherIdentity(Served(model_scores["teacher"]), config_of(model_folders, tmp_path))  # type: ignore[arg-type]


def test_the_name_of_a_teacher_is_the_same_in_every_launch_and_differs_between_teachers(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path
) -> None:
    config = config_of(model_folders, tmp_path)
    first = start(Served(model_scores["teacher"]), config).digest()
    noisy = Served(model_scores["teacher"] + 1e-6, checksum="c" * 16, tensor_parallel=2)
    assert start(noisy, config).digest() == first
    elsewhere = config_of(model_folders, tmp_path / "other")
    assert start(Served(model_scores["teacher"]), elsewhere).digest() == first
    others = [
        Served(model_scores["teacher"], checksum="d" * 16),
        Served(model_scores["teacher"], dtype="bfloat16"),
        Served(model_scores["teacher"], quantization="fp8"),
        Served(model_scores["teacher"], checksum=None),
    ]
    digests = {
        start(server, config_of(model_folders, tmp_path / str(number))).digest() for number, server in enumerate(others)
    }
    assert len(digests | {first}) == 5


def test_texts_are_compared_over_their_common_length_and_different_texts_are_infinitely_far() -> None:
    long, short = Fingerprint((1, 2, 3, 4), (-1.0, -2.0, -3.0)), Fingerprint((1, 2, 3), (-1.5, -2.5))
    assert long.distance(short) == short.distance(long) == 0.5
    assert long.distance(Fingerprint((1, 9, 3, 4), (-1.0, -2.0, -3.0))) == float("inf")
    assert long.distance(Fingerprint((1,), ())) == float("inf")
    assert long.distance(Fingerprint((1, 2, 3), (-1.0, float("nan")))) == float("inf")


def test_a_different_amount_of_server_memory_or_an_unreadable_file_does_not_mean_another_model() -> None:
    """On a GPU, a restarted server has a different amount of free memory. A file system may be briefly unavailable."""
    model = ServedModel("m", "default", "qwen3", "bfloat16", None, 1, "0.5.23", 90_000, 307, "a" * 16)
    assert changes(model, replace(model, longest_input=89_000, vocab_size=None, checksum=None)) == []
    assert changes(model, replace(model, device="cpu")) == []
    assert changes(model, replace(model, vocab_size=308)) == ["vocab_size 307 -> 308"]


def test_checksums_of_two_devices_are_not_compared() -> None:
    """SGLang uses different hash functions on GPU and CPU."""
    one = ServedModel("m", "default", "qwen3", "float32", None, 1, "0.5.23", 500, 307, "a" * 16, device="cpu")
    assert other_weights(one, replace(one, checksum="b" * 16)) is not None
    assert other_weights(one, replace(one, checksum="b" * 16, device="cuda")) is None


@pytest.mark.parametrize("layout", ["data_parallel", "pipeline_parallel", "tensor_parallel"])
def test_checksums_of_two_layouts_are_not_compared(layout: str) -> None:
    """SGLang's checksum covers all ranks together, so it differs with two copies of the same weights."""
    one = ServedModel("m", "default", "qwen3", "bfloat16", None, 1, "0.5.23", 500, 307, "a" * 16)
    other = replace(one, checksum="b" * 16)
    assert other_weights(one, other) is not None
    setting: dict[str, Any] = {layout: 2}
    assert other_weights(one, replace(other, **setting)) is None


def test_an_unusable_answer_of_the_teacher_stops_the_launch(
    model_folders: dict[str, Path], model_scores: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Served(model_scores["teacher"])
    monkeypatch.setattr(server, "score", lambda requests: [ServerError("no log-probs")], raising=False)
    with pytest.raises(ServerError, match="no log-probs"):
        start(server, config_of(model_folders, tmp_path))
