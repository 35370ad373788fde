"""A second launch of a run directory: which keys may change, and when the records are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.launches import DAY, Runs, copy_inputs, write_models
from tests.glue.stubs import one_rank
from tropd_mcore.train.inputs import Beginning, load_inputs, save_inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def runs(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Runs]:
    copy_inputs(models, tmp_path)
    with one_rank() as layout:
        yield Runs(tmp_path, layout, caplog)


@pytest.mark.parametrize("begun", [True, False])
def test_a_launch_with_unchanged_values_reports_nothing(runs: Runs, begun: bool) -> None:
    assert runs.launch() == []
    if begun:
        runs.sampled()
    assert runs.launch() == []


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        (
            {"optimizer": {"learning_rate": 1e-3}},
            ["optimizer.learning_rate: 5e-06 -> 0.001 (the learning rate follows the new schedule from the next "
             "optimizer step on)"],
        ),
        (
            {"run": {"checkpoint_every": 7}, "rollout": {"server": {"url": "http://there:1"}}},
            ["run.checkpoint_every: 100 -> 7",
             "rollout.server.url: none -> http://there:1 (the student's weights are published to it as before)"],
        ),
        ({"teacher": {"kind": "sglang"}}, ["teacher.kind: megatron -> sglang (the same model, served differently)"]),
        ({"gates": {"vocabulary": False}}, ["gates.vocabulary: true -> false"]),
        ({"verifier": {"kind": "exact_match"}}, ["verifier.kind: none -> exact_match"]),
    ],
    ids=["learning rate", "two", "teacher.kind", "gates", "verifier that nothing learns from"],
)  # fmt: skip
def test_changes_that_are_allowed_are_printed_with_old_and_new_value_and_recorded(
    runs: Runs, sections: dict[str, Any], lines: list[str]
) -> None:
    runs.launch()
    runs.sampled()
    assert runs.launch(**sections) == lines
    assert runs.launch(**sections) == []


def test_a_changed_number_of_steps_is_reported_with_the_schedules_that_depend_on_it(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    (line,) = runs.launch(run={"steps": 9})
    assert line.startswith("run.steps: 4 -> 9 (") and "objective.guidance.total_steps" in line


def test_fewer_steps_than_are_already_done_are_reported(runs: Runs) -> None:
    runs.launch()
    runs.checkpoint(3)
    assert "run.steps = 2 but 3 steps are done: nothing is left to train" in runs.launch(run={"steps": 2})


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"run": {"seed": 9}}, "run.seed: 1234 -> 9 is refused: prompt order"),
        ({"student": {"dtype": "bfloat16"}}, "student.dtype: float32 -> bfloat16 is refused: the checkpoints hold"),
        ({"teacher": {"dtype": "bfloat16"}}, "teacher.dtype: float32 -> bfloat16 is refused: another rounding"),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature: 1.0 -> 0.7 is refused: the rollouts so far"),
        ({"objective": {"kind": "lsm", "topk": 3}}, "objective.kind: opd -> lsm is refused: the steps so far"),
        ({"optimizer": {"beta2": 0.9}}, "optimizer.beta2: 0.999 -> 0.9 is refused: the moments"),
        ({"loss": {"aggregation": "sequence_mean"}}, "loss.aggregation: token_mean -> sequence_mean is refused"),
        ({"run": {"replay": "other"}}, "run.replay: none -> other is refused: the rollouts of the next steps"),
        ({"data": {"chat_template_kwargs": {"a": 1}}}, "data.chat_template_kwargs.a: none -> 1 is refused"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_changes_that_would_make_another_run_are_refused_with_reason_and_remedy(
    runs: Runs, sections: dict[str, Any], line: str
) -> None:
    runs.launch()
    runs.sampled()
    found, way_out = runs.refuse(**sections)
    assert found.startswith(line)
    assert way_out.startswith(f"{runs.run_dir.root} was begun with other values") and "another run.dir" in way_out
    checkpoint = runs.checkpoint()
    assert f"run.init_from={checkpoint}" in runs.refuse(**sections)[-1]


def test_all_refused_keys_are_named_at_once(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    problems = runs.refuse(
        run={"seed": 1, "checkpoint_every": 3}, rollout={"top_p": 0.5}, teacher={"path": runs.root / "student"}
    )
    assert [problem.partition(":")[0] for problem in problems[:-1]] == ["run.seed", "rollout.top_p", "teacher.path"]
    assert "was not checked; it is allowed if the content is the same" in problems[2]


def test_the_verifier_may_not_change_if_the_objective_learns_from_it(runs: Runs) -> None:
    learns: dict[str, Any] = {"objective": {"kind": "kdrl", "topk": 3}}
    runs.launch(**learns, verifier={"kind": "exact_match"})
    runs.sampled()
    problems = runs.refuse(**learns, verifier={"kind": "exact_match", "pattern": "=(.+)"})
    assert problems[0].startswith("verifier.pattern: ") and "other verdicts" in problems[0]


def test_the_recorded_date_of_the_run_may_be_configured_but_no_other_date(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    assert runs.refuse(data={"template_date": "2024-03-01"})[0].startswith("data.template_date: none -> 2024-03-01 is")
    (line,) = runs.launch(data={"template_date": "2024-02-29"})
    assert line == "data.template_date: none -> 2024-02-29 (the day that this run has printed so far)"
    assert runs.refuse()[0].startswith("data.template_date: 2024-02-29 -> none is refused")


def test_the_date_is_recorded_by_the_first_accepted_launch(runs: Runs) -> None:
    runs.compare()
    assert not runs.run_dir.template_date.exists()
    runs.launch()
    assert runs.run_dir.recorded_template_date() == DAY
    runs.run_dir.record_template_date(DAY.replace(year=2028))
    assert runs.run_dir.recorded_template_date() == DAY, "the first one stays"


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ({"kind": "sglang"}, {"kind": "sglang", "server": {"dtype": "float32"}}, None),
        ({"kind": "sglang", "server": {"dtype": "float32"}}, {"kind": "sglang"}, None),
        ({}, {"server": {"dtype": "bfloat16"}}, None),
        ({"kind": "sglang"}, {"kind": "sglang", "server": {"dtype": "bfloat16"}}, "teacher.server.dtype"),
        ({"kind": "sglang", "server": {"dtype": "bfloat16"}}, {"server": {"dtype": "bfloat16"}}, "teacher.kind"),
    ],
    ids=["named", "left to the other key", "no server", "another precision", "another precision by kind"],
)
def test_the_precision_of_the_teacher_is_compared_whichever_key_sets_it(
    runs: Runs, before: dict[str, Any], after: dict[str, Any], refused: str | None
) -> None:
    runs.launch(teacher=before)
    runs.sampled()
    if refused is None:
        (line,) = runs.launch(teacher=after)
        assert line.startswith("teacher.server.dtype: ") and "(the teacher computes in float32 as before)" in line
    else:
        problem, _ = runs.refuse(teacher=after)
        assert problem.startswith(f"{refused}: ") and "another rounding of the teacher, " in problem


@pytest.mark.parametrize("name", ["teacher", "rollout"])
def test_changed_server_arguments_are_reported_with_examples_of_their_effect(runs: Runs, name: str) -> None:
    runs.launch()
    runs.sampled()
    (line,) = runs.launch(**{name: {"server": {"extra_args": ["--quantization", "fp8"]}}})
    assert line.startswith(f"{name}.server.extra_args: [] -> ") and "arguments such as --quantization" in line


def test_a_refused_launch_leaves_the_record_unchanged(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    for _ in range(2):
        assert runs.refuse(run={"seed": 9})
    assert runs.launch() == []


def test_a_refused_first_launch_leaves_no_record(runs: Runs) -> None:
    runs.compare(run={"seed": 9})  # never accepted, because a gate or a server stopped it
    assert runs.records() == []
    assert runs.launch() == []


def test_before_anything_was_sampled_every_change_is_printed_and_none_is_refused(runs: Runs) -> None:
    runs.launch()
    assert runs.launch(run={"seed": 9}) == ["run.seed: 1234 -> 9 (nothing was trained yet)"]
    assert runs.launch(run={"seed": 9}) == []


def test_a_run_directory_of_an_older_version_reports_no_changes_and_is_recorded_from_then_on(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    text = runs.run_dir.config.read_text()
    newer = ("init_from", "init_optimizer", "check_every", "end_tokens", "masked_share")
    runs.run_dir.config.write_text(
        "\n".join(line for line in text.splitlines() if line.split(":")[0].strip() not in newer)
    )
    runs.run_dir.inputs.unlink()
    (line,) = runs.launch()
    assert "recorded no inputs, so contents were not compared" in line
    assert runs.launch() == []


def test_a_started_run_without_its_record_reports_that_nothing_can_be_compared(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    runs.run_dir.config.unlink()
    (line,) = runs.launch(run={"seed": 9})
    assert line.endswith("config.resolved.yaml is missing, so changes made by this launch cannot be detected")


@pytest.mark.parametrize("name", ["config.resolved.yaml", "inputs.json"])
def test_a_truncated_record_gives_a_one_line_error(runs: Runs, name: str) -> None:
    runs.launch()
    runs.sampled()
    path = runs.run_dir.root / name
    path.write_text(path.read_text()[:40])
    (problem,) = runs.refuse()
    assert str(path) in problem and "restore it, or remove it" in problem and "\n" not in problem


def test_a_moved_run_directory_resumes_and_the_move_is_printed(runs: Runs) -> None:
    runs.launch()
    runs.sampled()
    moved = runs.run_dir.root.rename(runs.root / "elsewhere")
    runs.caplog.clear()
    assert runs.launch(run={"dir": moved}) == [f"run.dir: {runs.run_dir.root} -> {moved} (the run directory was moved)"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("init_from", {"init_from": "none", "init_optimizer": False}),
        ("init_optimizer", {"init_optimizer": False}),
    ],
)
def test_init_from_may_not_change_before_the_first_checkpoint(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, key: str, change: dict[str, Any]
) -> None:
    monkeypatch.setattr("tropd_mcore.train.start.find_source", source_of)
    begun = {"init_from": runs.root / "one", "init_optimizer": True}
    runs.launch(run=begun)
    runs.sampled()
    changed = {name: value for name, value in (begun | change).items() if value != "none"}
    assert runs.refuse(run=changed)[0].startswith(f"run.{key}: ")
    assert runs.launch(run=begun) == []
    runs.checkpoint()
    assert [line.partition(":")[0] for line in runs.launch(run=changed)] == [f"run.{name}" for name in change]


def test_a_run_with_a_checkpoint_refuses_a_new_init_from(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropd_mcore.train.start.find_source", source_of)
    runs.launch()
    runs.checkpoint()
    assert "this one has begun" in runs.refuse(run={"init_from": runs.root / "one"})[0]


def test_the_init_from_checkpoint_may_not_be_modified_before_the_first_own_checkpoint(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tropd_mcore.train.start.find_source", source_of)
    begun = {"init_from": runs.root / "one"}
    runs.launch(run=begun)
    runs.sampled()
    recorded = load_inputs(runs.run_dir)
    assert recorded is not None and recorded.init_from is not None
    assert (recorded.init_from.step, recorded.init_from.path) == (7, str(runs.root / "one"))
    other = recorded.init_from.model_copy(update={"sha256": "b" * 64})
    save_inputs(runs.run_dir, recorded.model_copy(update={"init_from": other}))
    assert runs.refuse(run=begun)[0].startswith(f"run.init_from: {runs.root / 'one'}: content changed, sha256 bbb")
    runs.checkpoint()
    runs.launch(run=begun)
    kept = load_inputs(runs.run_dir)
    assert kept is not None and kept.init_from == other, "the record of the beginning stays as long as the run"


def test_an_init_from_that_was_never_used_is_dropped_from_the_record(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tropd_mcore.train.start.find_source", source_of)
    runs.launch(run={"init_from": runs.root / "one"})
    runs.launch()
    kept = load_inputs(runs.run_dir)
    assert kept is not None and kept.init_from is None


def source_of(context: Any) -> Any:
    """A checkpoint where the configuration names one."""
    path = context.config.run.init_from
    record = Beginning(path=str(path), step=7, sha256="a" * 64, with_optimizer=context.config.run.init_optimizer)
    return SimpleNamespace(path=path, record=record) if path is not None else None
