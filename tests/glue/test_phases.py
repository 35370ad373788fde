"""A run in phases over stubs: which parts each phase gets, when the next one begins, and what a resume needs."""

from __future__ import annotations

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.launch import Launch
from tests.glue.stubs import VOCABULARY, NamedPolicy, make_config, make_prompts, make_rollouts, one_rank
from tests.glue.test_trainer import NotedCheck
from tropd_mcore.config.schema import Config
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.rollout_source import RolloutSource
from tropd_mcore.teacher.served import ServedTeacher
from tropd_mcore.train import job
from tropd_mcore.train import phases as phases_module
from tropd_mcore.train.components import JobContext, Servers
from tropd_mcore.train.phases import PhaseState, resumed

STEPS = 6
OPD, GKD, SFT = {"kind": "opd", "topk": 3}, {"kind": "gkd", "topk": 3}, {"kind": "sft"}


def phases(*pairs: tuple[dict[str, Any], dict[str, Any] | None]) -> dict[str, Any]:
    return {"kind": "phases", "phases": [{"objective": objective, "until": until} for objective, until in pairs]}


BY_STEP_AND_METRIC = phases(
    (OPD, {"step": 2}), (GKD, {"metric": "log_ratio/mean", "above": 0.25, "consecutive": 2}), (OPD, None)
)


def config_with(objective: dict[str, Any], run_dir: Path | str = "nowhere", **run: Any) -> Config:
    return make_config(run_dir, objective=objective, run={"steps": STEPS, **run})


def launched(config: Config, first_step: int = 0, last_step: int = STEPS, **given: Any) -> Launch:
    with one_rank() as layout:
        return Launch(config, layout, **given).run(first_step, last_step)


def indices(launch: Launch) -> list[int | None]:
    return [record.phase for record in launch.records if record is not None]


def losses(launch: Launch) -> list[float]:
    return [update.loss for record in launch.records if record is not None for update in record.updates]


def test_each_step_is_trained_with_the_objective_of_its_phase() -> None:
    given: dict[str, Any] = {"log_ratio": lambda *_: 0.5}
    found = launched(config_with(BY_STEP_AND_METRIC), **given)
    assert indices(found) == [0, 0, 1, 1, 2, 2]
    opd, gkd = (losses(launched(config_with(objective), **given)) for objective in (OPD, GKD))
    assert losses(found) == [*opd[:2], *gkd[2:4], *opd[4:]] and opd[0] != gkd[0]


@pytest.mark.parametrize("first_step", range(1, STEPS))
def test_a_launch_that_begins_with_the_state_of_a_checkpoint_ends_each_phase_at_the_same_step(first_step: int) -> None:
    given: dict[str, Any] = {"log_ratio": lambda *_: 0.5}
    config = config_with(BY_STEP_AND_METRIC, checkpoint_every=1)
    whole = launched(config, **given)
    saved = dict(whole.extras[first_step]["phase"])
    assert saved.pop("names") == ["opd", "gkd fkl", "opd"]
    rest = launched(config, first_step, phase=PhaseState(**saved), **given)
    assert indices(rest) == indices(whole)[first_step:] and losses(rest) == losses(whole)[first_step:]
    assert rest.extras[STEPS] == whole.extras[STEPS]


def test_the_checkpoint_at_a_border_belongs_to_the_phase_that_begins() -> None:
    found = launched(config_with(BY_STEP_AND_METRIC, checkpoint_every=1), log_ratio=lambda *_: 0.5)
    states = [
        (found.extras[done]["phase"]["index"], found.extras[done]["phase"]["met"]) for done in range(1, STEPS + 1)
    ]
    assert states == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 0), (2, 0)]


def test_a_run_without_phases_has_none_in_its_metrics_and_checkpoints() -> None:
    found = launched(config_with(OPD))
    assert indices(found) == [None] * STEPS and found.extras == {STEPS: {}}


def test_a_phase_that_does_not_end_is_reported_when_the_steps_are_over(caplog: pytest.LogCaptureFixture) -> None:
    objective = phases((OPD, {"metric": "log_ratio/mean", "above": 0.75}), (GKD, None))
    with caplog.at_level(logging.WARNING):
        found = launched(config_with(objective), log_ratio=lambda *_: 0.5)
    assert indices(found) == [0] * STEPS
    (line,) = [line for line in caplog.messages if "has not ended" in line]
    assert line.startswith("run.steps = 6 are done but phase 0 (opd)") and "objective.phases.0.until" in line
    caplog.clear()
    launched(config_with(objective), 0, 3, log_ratio=lambda *_: 0.5)
    assert not [line for line in caplog.messages if "has not ended" in line], "the run goes on in another launch"


def test_a_served_teacher_is_checked_at_the_end_of_a_phase_and_not_asked_in_one_that_reads_no_scores() -> None:
    with one_rank() as layout:
        config = config_with(phases((OPD, {"step": 2}), (SFT, {"step": 4}), (OPD, None)))
        launch = Launch(config, layout)
        launch.teacher_check = NotedCheck(launch, other_from=100)
        launch.run(0, STEPS)
    assert launch.did("teacher?", "teacher at") == [
        ("teacher?", 0), ("teacher?", 1), ("teacher at", 2), ("teacher?", 4), ("teacher?", 5), ("teacher at", 6),
    ]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """What `_make_components` made for a run in phases, and what it called."""

    parts: Any
    called: list[Any]


def make_parts(monkeypatch: pytest.MonkeyPatch, config: Config, phase: PhaseState) -> Made:
    called: list[Any] = []

    def note(name: str, value: Any) -> Any:
        def make(*given: Any, **_: Any) -> Any:
            called.append(name)
            return value(*given) if callable(value) else value

        return make

    def teacher(context: Any, model: Any, settings: Any, server: Any, longest: int, excluded: Any, check: Any) -> Any:
        if not context.config.objective.reads_teacher:
            return "nobody"
        nowhere: Any = SimpleNamespace()
        return ServedTeacher(
            None, nowhere, topk=3, only_rank_zero=True, masked_share=1.0,
            check=check or SimpleNamespace(name=f"check {called.count('teacher')}"),
        )  # type: ignore[arg-type]  # fmt: skip

    for name, value in {
        "teacher_model": lambda context: [part.kind for part in context.config.objective.parts],
        "reference_model": None,
        "check_model": None,
        "probe_memory": lambda student, objective, *_: called.append(objective.kind),
        "make_policy": NamedPolicy("policy"),
        "sampler_bounds": "bounds",
        "raise_on_all_ranks": lambda control: nullcontext(),
        "Monitor": lambda *_: SimpleNamespace(close=lambda: None),
        "BatchContextSource": lambda config, student, reference: config.objective.kind,
        "scorer_name": lambda config, inputs, identities: f"{config.objective.kind} {identities}",
        "ScoreSource": "scores",
    }.items():
        monkeypatch.setattr(job, name, note(name, value))
    monkeypatch.setattr(job, "make_teacher", teacher)
    monkeypatch.setattr(
        job, "RolloutSource", lambda config, _, __, policy, *___, **____: (config.objective.kind, policy)
    )
    state = TrainState("student", "optimizer", "scheduler")  # type: ignore[arg-type]
    loaded: Any = SimpleNamespace(
        renderer="renderer", prompts="prompts", ignored="ignored", longest=9, solution_prompts=None,
        ends=SimpleNamespace(end_id=2), excluded=(),
    )  # fmt: skip
    layout: Any = SimpleNamespace(rank=0, groups=SimpleNamespace(control="control"))
    models: Any = {"student.path": SimpleNamespace(vocab_size=307)}
    context = JobContext(config, SimpleNamespace(), layout, RunDir(config.run.dir), models)  # type: ignore[arg-type]
    start: Any = SimpleNamespace(first_step=0, inputs="inputs", phase=phase)
    with ExitStack() as cleanup:
        made = job._make_components(context, loaded, state, Servers(), start, cleanup)
    return Made(made, called)


def test_the_parts_of_all_phases_share_servers_monitor_clock_and_the_teachers_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_with(phases((SFT, {"step": 2}), (OPD, {"step": 4}), (GKD, None)))
    made = make_parts(monkeypatch, config, PhaseState())
    run = made.parts.phases
    parts = [run._parts[place] for place in range(3)]
    assert [part.rollouts for part in parts] == [("sft", None), ("opd", "policy"), ("gkd", "policy")]
    assert len({id(part.clock) for part in parts}) == len({id(part.monitor) for part in parts}) == 1
    assert parts[0].teacher_check is None and parts[1].teacher_check is parts[2].teacher_check is not None
    assert [part.config.objective.kind for part in parts] == [part.context for part in parts] == ["sft", "opd", "gkd"]
    assert [kind for kind in made.called if kind in ("sft", "opd", "gkd")] == ["sft", "opd", "gkd"], "each is tried"
    assert made.called.count("make_policy") == made.called.count("Monitor") == made.called.count("teacher_model") == 1


def test_a_resumed_run_makes_the_parts_of_the_phases_that_are_not_over(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(phases((OPD, {"step": 2}), (GKD, {"step": 4}), (SFT, None)))
    made = make_parts(monkeypatch, config, PhaseState(index=1, began=2))
    assert made.parts.config.objective.kind == "gkd" and made.parts.teacher_model == ["gkd", "sft"]
    last = make_parts(monkeypatch, config, PhaseState(index=2, began=4))
    assert last.parts.config.objective.kind == "sft" and "make_policy" not in last.called


def info_of(extra: dict[str, Any]) -> Any:
    return lambda path: SimpleNamespace(extra=extra)


def test_a_resume_in_other_phases_than_those_of_the_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config, checkpoint = config_with(BY_STEP_AND_METRIC), Path("checkpoints/step_000003")
    saved = {"index": 1, "began": 2, "met": 1, "names": ["opd", "gkd fkl", "opd"]}
    monkeypatch.setattr(phases_module, "read_info", info_of({"phase": saved}))
    assert resumed(config, checkpoint) == PhaseState(1, 2, 1)
    with pytest.raises(
        ConfigError, match=r"written in phase 1 of opd, gkd fkl, opd, found objective\.phases of opd, sft"
    ):
        resumed(config_with(phases((OPD, {"step": 2}), (SFT, None))), checkpoint)
    monkeypatch.setattr(phases_module, "read_info", info_of({}))
    with pytest.raises(ConfigError, match="written by a run without phases"):
        resumed(config, checkpoint)
    assert resumed(config_with(OPD), checkpoint) is None and resumed(config_with(OPD), None) is None
    assert resumed(config, None) == PhaseState()


def source(config: Config, policy: Any, layout: Any) -> RolloutSource:
    prompts = PromptSet(make_prompts(6), shuffle=False, seed=0)
    return RolloutSource(config, RunDir(config.run.dir), prompts, policy, layout, vocab_size=VOCABULARY, end_id=2)


def sampling(step: int) -> Any:
    return SimpleNamespace(sample=lambda requests, *, step: make_rollouts(step, version="fresh"))


def test_a_phase_without_rollouts_takes_the_stored_responses_in_a_replay_too(tmp_path: Path) -> None:
    save_rollouts(RunDir(tmp_path / "other").rollouts(1), make_rollouts(1))
    config = config_with(SFT, tmp_path / "run", replay=tmp_path / "other")
    with one_rank() as layout:
        found = source(config, None, layout).at_step(1)
    assert {rollout.policy_version for rollout in found} == {"teacher"}


def test_a_replay_of_responses_of_the_teacher_by_a_phase_that_samples_is_refused(tmp_path: Path) -> None:
    with one_rank() as layout:
        source(config_with(SFT, tmp_path / "other"), None, layout).at_step(1)
        config = config_with(OPD, tmp_path / "run", replay=tmp_path / "other")
        with pytest.raises(DataError, match=r"run\.replay: .*holds responses of the teacher.*objective\.kind=opd"):
            source(config, None, layout).at_step(1)


@pytest.mark.parametrize(("before", "after"), [(SFT, OPD), (OPD, SFT)], ids=["sft first", "opd first"])
def test_rollouts_that_another_phase_stored_for_the_step_are_made_again(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """On another layout a metric may end a phase one step earlier or later."""
    with one_rank() as layout:
        source(config_with(before, tmp_path), sampling(1), layout).at_step(1)
        with caplog.at_level(logging.WARNING):
            found = source(config_with(after, tmp_path), sampling(1), layout).at_step(1)
    expected = "fresh" if after is OPD else "teacher"
    assert {rollout.policy_version for rollout in found} == {expected} and "of another phase" in caplog.text
    assert {rollout.policy_version for rollout in load_rollouts(RunDir(tmp_path).rollouts(1))} == {expected}
