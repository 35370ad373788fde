"""Whole jobs in phases on two ranks: each phase trains its objective, and a kill inside or between phases changes
nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import jobs, replayed
from tests.e2e.replayed import Stage
from tests.ranks import run_on_ranks
from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.loader import load
from tropd_mcore.config.phase_metrics import PHASE_METRICS
from tropd_mcore.mcore.checkpoint_info import latest, read_info
from tropd_mcore.records.replay import load_rollouts

STEPS, BORDERS = 6, (2, 4)
"""The first steps of the second and the third phase."""
PHASES = """objective={kind: phases, phases: [
    {objective: {kind: sft}, until: {step: 2}},
    {objective: {kind: tropd, outlier: {topk: 9}, guidance: {enabled: false}},
     until: {metric: entropy/student, above: 0.5, consecutive: 2}},
    {objective: {kind: gkd, topk: 7}}]}"""
INDEX = [0, 0, 1, 1, 2, 2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(6 * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Rollouts of six steps and a stored response per prompt."""
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"), steps=STEPS)
    names = [json.loads(line)["id"] for line in (stage.root / "prompts.jsonl").read_text().splitlines()]
    lines = [{"id": name, "response_ids": [5 + place, 9, 11]} for place, name in enumerate(names)]
    (stage.root / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stage


def wanted(stage: Stage, name: str, *more: str) -> list[str]:
    settings = [
        PHASES,
        "monitor.topk_overlap_every=1",
        "data.teacher_responses=RESPONSES",
        "run.export_at_end=true",
        "run.keep_scores=null",
        *more,
    ]
    settings.append("gates.sampler_logprob=false")  # the replayed rollouts are those of the untrained student
    return replayed.overrides(stage, name, settings, {"RESPONSES": stage.root / "responses.jsonl"})


@pytest.fixture(scope="module")
def whole(stage: Stage) -> Path:
    """A run without an interruption, whose checkpoints lie inside of phases."""
    replayed.replay(stage.config, [wanted(stage, "whole", "run.checkpoint_every=3")])
    return stage.run("whole")


def killed(stage: Stage, name: str, every: int, kills: list[int]) -> Path:
    """A run that is killed at the update numbers `kills` of its launches, and then finished."""
    settings = wanted(stage, name, f"run.checkpoint_every={every}")
    for updates in kills:
        run_on_ranks(replayed.run_until_killed, 2, stage.config, settings, updates, timeout_s=replayed.JOB_LIMIT_S)
    replayed.replay(stage.config, [settings])
    return stage.run(name)


def test_each_phase_trains_with_its_own_objective(whole: Path) -> None:
    lines = jobs.metrics(whole)
    assert [line["phase/index"] for line in lines] == INDEX
    taught, gated, matched = lines[0:2], lines[2:4], lines[4:6]
    for line in taught:
        assert line["tokens/student"] == 0 and line["tokens/prefix"] > 0 and line["trust/tv"] is None
    assert all(line["tokens/student"] > 0 and line["tokens/prefix"] == 0 for line in gated + matched)
    assert all(0 < line["trust/fraction"] < 1 for line in gated)
    assert all(line["trust/fraction"] == 1 for line in matched)
    for step in range(STEPS):
        rollouts = load_rollouts(whole / "rollouts" / f"step_{step:06d}.npz")
        assert {rollout.policy_version for rollout in rollouts} == {"teacher" if step < 2 else "replayed"}
        assert bool(list((whole / "scores").glob(f"step_{step:06d}*"))) == (step >= 2), "sft asks no teacher"


@pytest.mark.parametrize(
    ("every", "kills"),
    [
        pytest.param(3, [1, 2, 4], id="borders between checkpoints"),
        pytest.param(1, [2, 1, 1], id="checkpoints at borders"),
    ],
)
def test_a_run_killed_inside_and_between_its_phases_ends_with_the_same_bits(
    stage: Stage, whole: Path, every: int, kills: list[int]
) -> None:
    """The kills of the first case: inside the first phase, at the first border, at the second. Those of the second: at
    the first border, inside the second phase with one of two steps counted, at the second border."""
    run = killed(stage, f"killed_{every}", every, kills)
    assert jobs.curve(run) == jobs.curve(whole)
    tensors = (path / "export" / "model.safetensors" for path in (run, whole))
    assert len({path.read_bytes() for path in tensors}) == 1


def test_a_metric_that_can_end_a_phase_has_a_value_in_each_phase_that_does_not_lack_it(
    stage: Stage, whole: Path
) -> None:
    phases = phase_configs(load(stage.config, wanted(stage, "whole"))[0])
    of_responses = ("verifier/", "rollout/")  # in a phase of sft these have values, but not of the student
    for line in jobs.metrics(whole):
        for name, metric in PHASE_METRICS.items():
            lack = metric.lack(phases[int(line["phase/index"])], True)
            if lack is None or not name.startswith(of_responses):
                assert (line[name] is None) == (lack is not None), (line["step"], name)


def test_a_checkpoint_says_in_which_phase_it_was_written(stage: Stage, whole: Path) -> None:
    names = ["sft", "tropd", "gkd fkl"]
    inside = read_info(whole / "checkpoints" / "step_000003").extra
    assert inside == {"phase": {"index": 1, "began": 2, "met": 1, "names": names}}
    last = latest(whole / "checkpoints")
    assert last is not None and read_info(last).extra["phase"] == {"index": 2, "began": 4, "met": 0, "names": names}
