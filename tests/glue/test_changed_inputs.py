"""The inputs of a run are the same at every launch: prompts, responses, model folders, teacher of stored scores."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.glue.contexts import SDPO, context_of
from tests.glue.faults import on_ranks
from tests.glue.launches import Runs, append, copy_inputs, edit, write_models
from tests.glue.stubs import make_layout, one_rank
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ModelError
from tropd_mcore.train import inputs as inputs_module
from tropd_mcore.train.inputs import Inputs, load_inputs, read_inputs, save_inputs, teacher_name

GUIDED = {"kind": "tropd", "outlier": {"topk": 3}, "guidance": {"min_continuation": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def runs(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Runs]:
    copy_inputs(models, tmp_path)
    with one_rank() as layout:
        yield Runs(tmp_path, layout, caplog)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_moved_model_folder_is_accepted_and_a_different_one_is_refused(runs: Runs, name: str) -> None:
    runs.launch()
    runs.sampled()
    moved = runs.root / "moved"
    (runs.root / name).rename(moved)
    places = {"student": {"path": moved}} if name == "student" else {"teacher": {"path": moved}}
    (line,) = runs.launch(**places)
    assert line == f"{name}.path: {runs.root / name} -> {moved} (moved, the same content)"
    edit(moved / "model.safetensors")
    other = shutil.copytree(moved, runs.root / "other")
    problems = runs.refuse(**{name: {"path": other}})
    assert problems[0].startswith(f"{name}.path: {moved} -> {other}: content changed, sha256 of model.safetensors ")
    assert "another teacher" in problems[0] if name == "teacher" else "another student" in problems[0]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_model_folder_that_was_changed_in_place_is_refused(runs: Runs, name: str, file: str) -> None:
    runs.launch()
    runs.sampled()
    if not (runs.root / name / file).exists():
        (runs.root / name / file).write_text("{}\n")
    else:
        path = runs.root / name / file
        path.write_bytes(path.read_bytes() + b" ")
    problems = runs.refuse()
    assert problems[0].startswith(f"{name}.path: {runs.root / name}: content changed, sha256 of {file} ")
    assert " -> " in problems[0] and "refused: " in problems[0] and len(problems) == 2


def test_prompts_that_changed_are_refused_with_digests_and_lines(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    append(runs.root / "prompts.jsonl")
    problems = runs.refuse()
    assert problems[0].startswith(f"data.prompts: {runs.root / 'prompts.jsonl'}: content changed, sha256 ")
    assert "(3 lines -> 4 lines); refused: the order of the prompts" in problems[0]


def test_moved_prompts_are_the_same_prompts(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    moved = (runs.root / "prompts.jsonl").rename(runs.root / "moved.jsonl")
    (line,) = runs.launch(data={"prompts": moved})
    assert line.startswith("data.prompts: ") and line.endswith("(moved, the same content)")


def test_changed_responses_are_refused_only_if_the_objective_continues_them(runs: Runs) -> None:
    given = {"data": {"prompts": runs.root / "prompts.jsonl", "teacher_responses": runs.root / "responses.jsonl"}}
    for objective, refused in ((GUIDED, True), ({"kind": "opd", "topk": 3}, False)):
        shutil.rmtree(runs.run_dir.root, ignore_errors=True)
        runs.launch(objective=objective, **given)
        runs.sampled()
        append(runs.root / "responses.jsonl")
        if refused:
            assert runs.refuse(objective=objective, **given)[0].startswith("data.teacher_responses: ")
        else:
            (line,) = runs.launch(objective=objective, **given)
            assert "content changed" in line and "not used by this objective" in line


def test_responses_that_are_no_longer_configured_are_reported(runs: Runs) -> None:
    runs.launch(data={"teacher_responses": runs.root / "responses.jsonl"})
    runs.sampled()
    (line,) = runs.launch()
    assert line.startswith("data.teacher_responses: ") and "-> none (no longer read; not used" in line


def test_the_reference_is_compared_by_content(runs: Runs) -> None:
    reference = shutil.copytree(runs.root / "teacher", runs.root / "reference")
    named = {"objective": {"kind": "exopd", "topk": 3, "reference": reference}}
    runs.launch(**named)
    runs.sampled()
    moved = {"objective": {"kind": "exopd", "topk": 3, "reference": runs.root / "teacher"}}
    assert runs.launch(**moved)[0].endswith("(moved, the same content)")
    by_default = {"objective": {"kind": "exopd", "topk": 3}}
    assert runs.refuse(**by_default)[0].startswith("objective.reference: ")


def test_changed_package_versions_and_a_changed_number_of_ranks_are_printed(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    recorded = load_inputs(runs.run_dir)
    assert recorded is not None and recorded.launch["ranks"] == "1" and recorded.launch["platform"] == "cpu"
    assert {"torch", "megatron-core", "transformers", "tropd_mcore"} <= recorded.launch.keys()
    older = recorded.launch | {"torch": "2.0.0", "ranks": "8", "apex": "1.0"}
    save_inputs(runs.run_dir, recorded.model_copy(update={"launch": older}))
    lines = runs.launch()
    assert f"torch: 2.0.0 -> {recorded.launch['torch']}" in lines and "ranks: 8 -> 1" in lines
    assert "apex: 1.0 -> none" in lines and len(lines) == 3


def test_versions_in_the_environment_of_a_server_are_recorded_and_their_change_is_printed(runs: Runs) -> None:
    own = {"rollout": {"server": {"python": sys.executable}}}
    runs.launch(**own)
    runs.sampled()
    recorded = load_inputs(runs.run_dir)
    assert recorded is not None and recorded.launch["rollout.server: sglang"] == "0.5.23"
    assert recorded.launch["rollout.server: torch"] == recorded.launch["torch"]
    older = recorded.launch | {"rollout.server: torch": "2.0.0"}
    save_inputs(runs.run_dir, recorded.model_copy(update={"launch": older}))
    assert runs.launch(**own) == [f"rollout.server: torch: 2.0.0 -> {recorded.launch['torch']}"]


def test_a_changed_source_of_a_custom_objective_is_printed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.root / "own_objective.py").write_text("def loss(): ...\n")
    monkeypatch.syspath_prepend(runs.root)
    custom = {"objective": {"kind": "custom", "function": "own_objective:loss", "topk": 3}}
    runs.launch(**custom)
    runs.sampled()
    assert runs.launch(**custom) == []
    edit(runs.root / "own_objective.py")
    (line,) = runs.launch(**custom)
    assert line.startswith("objective.function: its source file changed, sha256 ")


def test_without_a_recorded_content_another_path_is_refused(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    runs.run_dir.inputs.unlink()
    problems = runs.refuse(student={"path": shutil.copytree(runs.root / "student", runs.root / "copy")})
    assert "no content was recorded before" in problems[0] and problems[0].startswith("student.path: ")


def test_large_input_files_are_read_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd_mcore.weights.digest.REMEMBERED_BYTES", 1)
    monkeypatch.setattr("tropd_mcore.weights.digest.SETTLED_NS", -(10**18))
    read: list[Path] = []
    real = inputs_module.read_files

    def counted(paths: Any) -> Any:
        paths = list(paths)
        read.extend(paths)
        return real(paths)

    monkeypatch.setattr(inputs_module, "read_files", counted)
    runs.launch()
    first = list(read)
    assert {path.name for path in first} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert len({path.resolve() for path in first}) == len(first)
    read.clear()
    assert runs.launch() == [] and read == []
    edit(runs.root / "teacher" / "model.safetensors")
    runs.launch()
    assert read == [(runs.root / "teacher" / "model.safetensors").resolve()]


def inputs_of(runs: Runs, **sections: Any) -> tuple[Config, Inputs]:
    context, start = runs.compare(**sections)
    return context.config, start.inputs


def name_of(runs: Runs, **sections: Any) -> str:
    return teacher_name(*inputs_of(runs, **sections))


def test_stored_scores_are_named_after_the_teachers_content_and_not_its_path(runs: Runs) -> None:
    name = name_of(runs)
    copy = shutil.copytree(runs.root / "teacher", runs.root / "copy")
    assert name_of(runs, teacher={"path": copy}) == name == name_of(runs, run={"steps": 9})
    changes: list[dict[str, Any]] = [
        {"teacher": {"kind": "sglang"}},
        {"teacher": {"kind": "sglang", "server": {"dtype": "bfloat16"}}},
        {"teacher": {"path": runs.root / "student"}},
        {"teacher": {"dtype": "bfloat16"}},
        {"teacher": {"extra_tokens": "exclude"}},
        {"objective": {"kind": "opd", "topk": 4}},
        {"loss": {"logit_softcap": 30.0}},
    ]
    names = [name_of(runs, **change) for change in changes]
    assert len({name, *names}) == len(changes) + 1, names
    assert teacher_name(*inputs_of(runs), identity="x") not in {name, *names}


def test_a_teacher_that_was_replaced_in_place_has_another_name(runs: Runs) -> None:
    name = name_of(runs)
    edit(runs.root / "teacher" / "model.safetensors")
    assert name_of(runs) != name


def test_a_model_that_is_both_student_and_teacher_is_read_once(runs: Runs) -> None:
    itself: dict[str, Any] = {"objective": SDPO, "teacher": {"path": runs.root / "student"}}
    _, inputs = inputs_of(runs, **itself)
    assert inputs.models["student.path"] == inputs.models["teacher.path"]


def read_on_a_rank(root: Path) -> tuple[list[str], str]:
    """(names of the files that this rank read, the record)."""
    read: list[str] = []
    real = inputs_module.read_files

    def noted(paths: Any) -> Any:
        paths = list(paths)
        read.extend(path.name for path in paths)
        return real(paths)

    with mock.patch.object(inputs_module, "read_files", noted):
        inputs = read_inputs(context_of(Runs(root, None, None).config(), make_layout()))  # type: ignore[arg-type]
    return read, inputs.model_dump_json()


def test_ranks_share_the_reading_of_inputs_and_have_one_record(runs: Runs) -> None:
    alone = inputs_of(runs)[1]
    runs.run_dir.digests.unlink()
    (first, one), (second, two) = on_ranks(read_on_a_rank, 2, runs.root)
    assert one == two
    found = Inputs.model_validate_json(one)
    assert (found.models, found.data, found.launch["ranks"]) == (alone.models, alone.data, "2")
    count = sum(len(model.files) for model in found.models.values())
    assert len(first) + len(second) == count and abs(len(first) - len(second)) <= 1
    assert "model.safetensors" in first and "model.safetensors" in second, "the largest files go to different ranks"


def read_fails_on_a_rank(root: Path) -> str:
    """The error on this rank if rank 1 cannot read a file."""

    layout = make_layout()

    def broken(paths: Any) -> Any:
        if layout.rank == 1:
            raise ModelError("the disk of rank 1 is broken")
        return []

    with mock.patch.object(inputs_module, "read_files", broken):
        try:
            read_inputs(context_of(Runs(root, None, None).config(), layout))  # type: ignore[arg-type]
        except ModelError as error:
            return str(error)
    return "read"


def test_a_file_that_one_rank_cannot_read_is_one_error_on_all(runs: Runs) -> None:
    runs.run_dir.digests.unlink(missing_ok=True)
    assert on_ranks(read_fails_on_a_rank, 2, runs.root) == ["the disk of rank 1 is broken"] * 2
