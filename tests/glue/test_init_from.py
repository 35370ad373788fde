"""`run.init_from` before anything is loaded: a path that is no matching checkpoint gives one line with the remedy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.glue.contexts import config_of, context_of
from tests.glue.launches import swap_two_tokens
from tests.glue.stubs import one_rank
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.checks import problems_across_sections
from tropd_mcore.errors import ConfigError, DataError, ModelError, TropdError
from tropd_mcore.files import file_digest
from tropd_mcore.mcore.checkpoint_info import HF_FOLDER, INFO_FILE, CheckpointInfo, step_folder
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.train.beginning import Source, find_source
from tropd_mcore.weights.architecture import read_architecture


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


@pytest.fixture
def layout() -> Iterator[Layout]:
    with one_rank() as layout:
        yield layout


def info_of(student: Path, **changes: Any) -> CheckpointInfo:
    info = CheckpointInfo(
        step=2,
        architecture=read_architecture(student),
        param_dtype="float32",
        layout={},
        optimizer="distributed",
        scheduler={"num_steps": 2},
        extra={},
        files={},
    )
    return replace(info, **changes)


def other_run(root: Path, student: Path, steps: tuple[int, ...] = (2,), **changes: Any) -> Path:
    """A run directory whose checkpoints have a JSON and no tensors. Returns the newest checkpoint."""
    folder = root
    for step in steps:
        folder = step_folder(root / "checkpoints", step)
        (folder / HF_FOLDER).mkdir(parents=True)
        (folder / INFO_FILE).write_text(info_of(student, step=step, **changes).to_json())
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(student / name, folder / HF_FOLDER / name)
    return folder


def found(tmp_path: Path, student: Path, layout: Layout, path: Path | None, **sections: Any) -> Source | None:
    sections["run"] = {"init_from": path} | sections.get("run", {})
    return find_source(context_of(config_of(tmp_path / "run", student, **sections), layout))


def refused(tmp_path: Path, student: Path, layout: Layout, path: Path, **sections: Any) -> TropdError:
    with pytest.raises(TropdError) as caught:
        found(tmp_path, student, layout, path, **sections)
    assert "\n" not in str(caught.value) and f"run.init_from={path}" in str(caught.value)
    return caught.value


def test_a_matching_checkpoint_is_used_and_recorded(tmp_path: Path, student: Path, layout: Layout) -> None:
    path = other_run(tmp_path / "other", student)
    source = found(tmp_path, student, layout, path)
    assert source is not None and source.path == path
    assert (source.record.path, source.record.step, source.record.with_optimizer) == (str(path), 2, False)
    assert source.record.sha256 == file_digest(path / INFO_FILE)
    with_optimizer = found(tmp_path, student, layout, path, run={"init_optimizer": True})
    assert with_optimizer is not None and with_optimizer.record.with_optimizer
    assert found(tmp_path, student, layout, None) is None


def test_init_from_a_run_directory_means_its_newest_checkpoint(tmp_path: Path, student: Path, layout: Layout) -> None:
    newest = other_run(tmp_path / "other", student, steps=(2, 10, 9)).with_name("step_000010")
    for place, what in ((tmp_path / "other", "a run directory"), (tmp_path / "other" / "checkpoints", "the folder of")):
        error = refused(tmp_path, student, layout, place)
        assert isinstance(error, ConfigError) and what in str(error)
        assert str(error).endswith(f"run.init_from={newest}")


def test_init_from_a_hugging_face_folder_is_refused_and_student_path_suggested(
    tmp_path: Path, student: Path, layout: Layout
) -> None:
    error = refused(tmp_path, student, layout, student)
    assert isinstance(error, ConfigError) and f"set student.path={student} and remove run.init_from" in str(error)


@pytest.mark.parametrize("name", ["absent", "empty", "step_000002.partial"])
def test_init_from_something_else_is_refused_with_what_was_expected(
    tmp_path: Path, student: Path, layout: Layout, name: str
) -> None:
    place = tmp_path / name
    if name != "absent":
        place.mkdir()
    error = refused(tmp_path, student, layout, place)
    assert isinstance(error, ConfigError) and "expected a checkpoint folder <run.dir>/checkpoints/step_<n>" in str(
        error
    )


@pytest.mark.parametrize(
    ("changes", "run", "words"),
    [
        ({"param_dtype": "bfloat16"}, {}, "student.dtype=bfloat16, found float32; set student.dtype=bfloat16"),
        ({"optimizer": None}, {"init_optimizer": True}, "holds weights only; remove run.init_optimizer"),
        ({"optimizer": "replicated"}, {"init_optimizer": True}, "set optimizer.distributed=false"),
    ],
)  # fmt: skip
def test_init_from_a_checkpoint_that_does_not_match_is_refused(
    tmp_path: Path, student: Path, layout: Layout, changes: dict[str, Any], run: dict[str, Any], words: str
) -> None:
    path = other_run(tmp_path / "other", student, **changes)
    error = refused(tmp_path, student, layout, path, run=run)
    assert isinstance(error, ModelError) and words in str(error)


@pytest.mark.parametrize("optimizer", [None, "replicated"])
def test_init_from_without_the_optimizer_needs_no_optimizer_state(
    tmp_path: Path, student: Path, layout: Layout, optimizer: str | None
) -> None:
    path = other_run(tmp_path / "other", student, optimizer=optimizer)
    assert found(tmp_path, student, layout, path) is not None


def test_init_from_another_architecture_is_refused(tmp_path: Path, student: Path, layout: Layout) -> None:
    deeper = replace(read_architecture(student), num_layers=9)
    path = other_run(tmp_path / "other", student, architecture=deeper)
    assert "num_layers is 9, expected 1" in str(refused(tmp_path, student, layout, path))


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path, student: Path, layout: Layout) -> None:
    """Same architecture and width, but two ids have other tokens. No other check would detect this."""
    path = other_run(tmp_path / "other", student)
    swap_two_tokens(path / HF_FOLDER)
    with pytest.raises(DataError, match=r"run\.init_from=.* differ in 2 of"):
        found(tmp_path, student, layout, path)


def test_a_checkpoint_without_a_tokenizer_to_compare_is_reported(
    tmp_path: Path, student: Path, layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = other_run(tmp_path / "other", student)
    file = checkpoint / HF_FOLDER / "tokenizer.json"
    file.unlink()
    assert (
        find_source(context_of(config_of(tmp_path / "run", student, run={"init_from": checkpoint}), layout)) is not None
    )
    assert caplog.messages == [
        f"run.init_from={checkpoint}: no {file}, so whether its tokens are the student's is not known"
    ]


def test_init_from_a_damaged_checkpoint_gives_a_one_line_error(tmp_path: Path, student: Path, layout: Layout) -> None:
    path = other_run(tmp_path / "other", student)
    (path / INFO_FILE).write_text("torn {")
    with pytest.raises(ModelError, match=r"step_000002.*damaged"):
        found(tmp_path, student, layout, path)


def problems(tmp_path: Path, run: dict[str, Any], **sections: Any) -> list[str]:
    config = config_of(tmp_path / "run", tmp_path / "student", run=run, **sections)
    return [problem for problem in problems_across_sections(config) if "init" in problem]


def test_settings_that_contradict_init_from_are_found_without_reading_files(tmp_path: Path) -> None:
    elsewhere = {"init_from": tmp_path / "other" / "checkpoints" / "step_000002"}
    assert problems(tmp_path, elsewhere) == []
    assert problems(tmp_path, {"init_optimizer": True}) == [
        "run.init_optimizer has no effect without run.init_from; set the checkpoint, or remove it"
    ]
    (own,) = problems(tmp_path, {"init_from": tmp_path / "run" / "checkpoints" / "step_000002"})
    assert "which resumes by itself; remove run.init_from" in own
    (home,) = problems(tmp_path, {"init_from": "~/checkpoints/step_000002"})
    assert "`~` is not expanded" in home
    exopd: dict[str, Any] = {"kind": "exopd", "topk": 3}
    (reference,) = problems(tmp_path, elsewhere, objective=exopd)
    assert reference.startswith("objective.reference: its default is student.path=")
    assert problems(tmp_path, elsewhere, objective=exopd | {"reference": tmp_path / "student"}) == []
    assert problems(tmp_path, elsewhere, objective={"kind": "rlad", "topk": 3}) == []
