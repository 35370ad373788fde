"""`objective.kind: phases` in the configuration: its shape, ends that can never come, and what such a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.config.derived import longest_sample, phase_configs, samples_rollouts, used_servers
from tropd_mcore.config.loader import leaves, load
from tropd_mcore.config.phase_metrics import PHASE_METRICS
from tropd_mcore.config.phases import PhasesObjective
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.config.record import compare, read_record
from tropd_mcore.config.reference import explain
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.monitor.catalogue import METRICS
from tropd_mcore.train.phases import PhaseState, remaining
from tropd_mcore.train.resume_rules import rule_of

GOOD = """\
run: {dir: runs/a, steps: 60}
student: {path: models/student}
teacher: {path: models/teacher, kind: sglang}
data: {prompts: prompts.jsonl, teacher_responses: responses.jsonl}
objective:
  kind: phases
  phases:
    - objective: {kind: sft}
      until: {step: 20}
    - objective:
        kind: tropd
        guidance: {enabled: false}
      until: {metric: trust/tv, below: 0.05, consecutive: 3}
    - objective: {kind: opd, topk: 8}
"""
KEY = "objective.phases"
HELD_OUT = "held_out={prompts: held.jsonl, responses: held_responses.jsonl}"


def loaded(folder: Path, *overrides: str) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(GOOD)
    return load(path, list(overrides))[0]


def problems(folder: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, *overrides)
    return caught.value.problems


def test_each_phase_is_a_run_with_its_own_objective_and_the_same_other_keys(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    phases = phase_configs(config)
    assert [phase.objective.kind for phase in phases] == ["sft", "tropd", "opd"]
    assert all(phase.run == config.run and phase.optimizer == config.optimizer for phase in phases)
    assert phases[2].objective.teacher_topk == 8 and phases[1].objective.teacher_topk == 64
    alone = phases[2]
    assert phase_configs(alone) == [alone]


def test_a_run_needs_what_any_of_its_phases_needs_and_no_more_once_they_are_over(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    assert set(used_servers(config)) == {"rollout.server", "teacher.server"} and samples_rollouts(config)
    assert config.objective.reads_responses
    rest = remaining(config, PhaseState(index=1, began=20))
    assert [part.kind for part in rest.objective.parts] == ["tropd", "opd"] and not rest.objective.reads_responses
    backwards = loaded(
        tmp_path, f"{KEY}=[{{objective: {{kind: opd}}, until: {{step: 5}}}}, {{objective: {{kind: sft}}}}]"
    )
    assert set(used_servers(backwards)) == {"rollout.server", "teacher.server"}
    assert used_servers(remaining(backwards, PhaseState(index=1, began=5))) == {}


def test_the_longest_sample_is_that_of_the_longest_phase(tmp_path: Path) -> None:
    config = loaded(tmp_path, "rollout.max_new_tokens=10")
    assert longest_sample(config, longest_prompt=5, longest_response=3) == 15, "of a sampled phase"
    assert longest_sample(config, longest_prompt=5, longest_response=30) == 36, "of the stored responses and their end"


def test_what_depends_on_the_phase_cannot_be_asked_of_the_whole(tmp_path: Path) -> None:
    objective: Any = loaded(tmp_path).objective
    for name in ("policy", "active_guidance", "teacher_topk", "student_candidates", "has_prefix_loss"):
        with pytest.raises(AssertionError, match="depends on the phase"):
            getattr(objective, name)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{KEY}=[]"], "objective.phases: expected two or more phases, found 0"),
        ([f"{KEY}=3"], "objective.phases: expected a list, found 3"),
        ([f"{KEY}=[{{objective: {{kind: opd}}}}]"], "objective.phases: expected two or more phases, found 1"),
        ([f"{KEY}.0.objective={{kind: phases, phases: []}}"], "0.objective.kind: expected one of"),
        ([f"{KEY}.0.objective={{topk: 3}}"], "0.objective.kind: missing; expected one of tropd, opd"),
        ([f"{KEY}.0.until=null"], "0.until is missing: the phase would never end"),
        ([f"{KEY}.0.until={{}}"], "0.until is empty: the phase would never end"),
        ([f"{KEY}.2.until={{step: 30}}"], "2.until: the last phase runs to run.steps"),
        ([f"{KEY}.0.until.step=60"], "0.until.step = 60 leaves 0 of run.steps = 60 for the 2 phases after it"),
        ([f"{KEY}.0.until.step=90"], "0.until.step = 90 leaves 0 of run.steps = 60"),
        (["run.steps=20"], "0.until.step = 20 leaves 0 of run.steps = 20 for the 2 phases after it; lower it to 18"),
        ([f"{KEY}.0.until.step=0"], "0.until.step: expected greater than 0, found 0"),
        ([f"{KEY}.1.until={{step: 20}}"], "1.until.step = 20 is not after the 20 steps at which the phase begins"),
        (
            [f"{KEY}.0.until={{metric: loss/total, below: 1.0}}", f"{KEY}.1.until={{step: 30}}"],
            "1.until.step = 30 may pass before the phase begins, because objective.phases.0 ends by a metric alone",
        ),
        ([f"{KEY}.1.until.metric=trust/tb"], "1.until.metric: no metric that can end a phase, found 'trust/tb'; did "),
        ([f"{KEY}.1.until.metric=tv"], "did you mean trust/tv?"),
        ([f"{KEY}.1.until.metric=time/step"], "found 'time/step'; expected one of loss/total, "),
        ([f"{KEY}.1.until.above=0.9"], "1.until: expected one bound of trust/tv, below or above, found both"),
        ([f"{KEY}.1.until.below=null"], "1.until: expected one bound of trust/tv, below or above, found none"),
        (
            [f"{KEY}.1.until.below=0"],
            "1.until.below = 0 with metric trust/tv, whose values are from 0 to 1: the value ",
        ),
        ([f"{KEY}.1.until.below=1.5"], "would always be below the bound"),
        (
            [f"{KEY}.1.until={{metric: entropy/student, below: -1}}"],
            "1.until.below = -1 with metric entropy/student, whose values are from 0 to inf: the value would never be",
        ),
        ([f"{KEY}.1.until={{metric: trust/tv, above: 1}}"], "would never be above the bound"),
        ([f"{KEY}.1.until.consecutive=0"], "1.until.consecutive: expected greater than 0, found 0"),
        ([f"{KEY}.1.until.consecutive=40"], "40 steps in a row do not fit into the 39 steps"),
        ([f"{KEY}.1.until.consecutive=4", f"{KEY}.1.until.step=23"], "do not fit into the 3 steps"),
        (
            [f"{KEY}.1.until={{metric: topk/overlap, above: 0.9, consecutive: 5}}"],
            "5 steps in a row do not fit into the 39 steps that the phase has at most, and topk/overlap is measured at "
            "every 10th step, so its metric would never end it",
        ),
        ([f"{KEY}.0.until={{step: 9, below: 1}}"], "0.until.below needs objective.phases.0.until.metric"),
        ([f"{KEY}.0.until={{metric: trust/tv, below: 0.5}}"], "0.until.metric: trust/tv needs scores of the teacher"),
        ([f"{KEY}.0.until={{metric: rollout/eos, above: 0.5}}"], "is measured on answers of the student"),
        ([f"{KEY}.1.until={{metric: loss/prefix, below: 0.5}}"], "is measured on tokens of the teacher with a loss"),
        ([f"{KEY}.1.until={{metric: verifier/accuracy, above: 0.5}}"], "needs a verifier, and verifier.kind=none"),
        ([f"{KEY}.1.until={{metric: entropy/teacher, below: 2}}"], "which teacher.kind=sglang does not give"),
        ([f"{KEY}.1.until={{metric: topk/overlap, above: 0.9}}", "monitor.topk_overlap=false"], "is not measured with"),
        ([f"{KEY}.1.until={{metric: tv/mean, below: 0.1}}", "monitor.force=false"], "with monitor.force=false"),
        (
            [f"{KEY}.0.until={{metric: held_out/forward_kl, below: 0.1}}"],
            "is not measured without the section held_out",
        ),
        (
            [
                f"{KEY}=[{{objective: {{kind: sft}}, until: {{metric: held_out/forward_kl, below: 1}}}}, "
                "{objective: {kind: sft}}]",
                HELD_OUT,
            ],
            "with teacher.kind=sglang no phase from here on asks it",
        ),
        ([f"{KEY}.1.objective={{kind: opsd}}"], "1.objective.kind=opsd: the student teaches itself"),
        (
            ["optimizer.schedule=cosine", f"{KEY}.2.objective.policy_gradient={{ratio: ppo_clip, mini_batches: 4}}"],
            "objective.phases make 1, 1, 4 of them per step",
        ),
        (
            [
                f"{KEY}.1.objective={{kind: exopd, reference: models/a}}",
                f"{KEY}.2.objective={{kind: exopd, reference: models/b}}",
            ],
            "2.objective.reference=models/b differs from that of phase 1, models/a",
        ),
        (["data.teacher_responses=null"], "0.objective.kind=sft needs data.teacher_responses"),
        (
            [f"{KEY}.1.objective.guidance.enabled=true", "data.teacher_responses=null"],
            "objective.phases.1.objective.guidance.enabled needs data.teacher_responses",
        ),
        ([f"{KEY}.1.objective={{kind: kdrl}}"], "objective.phases.1.objective.kind=kdrl learns from a verifier"),
        ([f"{KEY}.2.objective={{kind: eopd}}"], "objective.phases.2.objective.kind=eopd needs the teacher's entropy"),
        (
            [f"{KEY}.1.objective.policy_gradient.epochs=2"],
            "objective.phases.1.objective.policy_gradient: mini_batches * epochs = 1 * 2",
        ),
        (
            [f"{KEY}.0.objective.topk=3"],
            "0.objective.topk: unknown key: not a key of the chosen objective.phases.0.obj",
        ),
        (
            [f"{KEY}.2.objective.policy_gradient.mini_batchs=3"],
            "unknown key; did you mean objective.phases.2.objective.policy_gradient.mini_batches?",
        ),
        ([f"{KEY}.7.until.step=3"], "expected a place from 0 to 2 in objective.phases, found '7'"),
    ],
    ids=str,
)
def test_phases_that_cannot_be_run_as_they_are_written_are_refused(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    found = problems(tmp_path, *overrides)
    assert any(expected in line for line in found), found
    assert all("objective.phases" in line for line in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{KEY}.0.until.step=56"],
        [f"{KEY}.1.until={{step: 21}}"],
        [f"{KEY}.1.until.step=23"],
        [f"{KEY}.1.until={{metric: log_ratio/mean, above: -0.02}}"],
        [f"{KEY}.1.until={{metric: trust/tv, below: 1}}"],
        [f"{KEY}.0.until={{metric: loss/objective, below: 0.5}}"],
        [f"{KEY}.2.objective.policy_gradient={{ratio: ppo_clip, mini_batches: 4}}"],
        ["run.replay=runs/b"],
        [
            f"{KEY}.0.until={{metric: held_out/forward_kl, below: 0.1}}",
            "held_out={prompts: h.jsonl, responses: r.jsonl}",
        ],
        [f"{KEY}.1.objective={{kind: exopd}}", f"{KEY}.2.objective={{kind: exopd}}"],
    ],
    ids=str,
)
def test_phases_that_can_end_are_accepted(tmp_path: Path, overrides: list[str]) -> None:
    assert isinstance(loaded(tmp_path, *overrides).objective, PhasesObjective)


def test_a_replay_needs_a_phase_that_samples(tmp_path: Path) -> None:
    twice = f"{KEY}=[{{objective: {{kind: sft}}, until: {{step: 5}}}}, {{objective: {{kind: sft}}}}]"
    with pytest.raises(ConfigError, match=r"run\.replay: .*trains on data\.teacher_responses and on no rollouts"):
        loaded(tmp_path, twice, "run.replay=runs/b")


def test_a_resolved_file_gives_the_same_phases_and_names_the_line_of_each_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    config, sources = load(path, [f"{KEY}.1.until.below=0.1"])
    text = resolved_yaml(config, sources)
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load(again, [])[0] == config
    assert "    - objective:\n        kind: sft  #" in text
    assert sources[f"{KEY}.0.until.step"].endswith("recipe.yaml:9")
    assert sources[f"{KEY}.1.until.below"] == "command line" and sources[f"{KEY}.1.objective.trust.mode"] == "default"


def test_a_change_of_a_phase_is_shown_by_its_key_and_refused_in_a_run_that_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    recorded = read_record(resolved_yaml(*load(path, [])), "record").values
    changes = compare(recorded, leaves(load(path, [f"{KEY}.0.until.step=9", f"{KEY}.2.objective={{kind: gkd}}"])[0]))
    assert [str(change) for change in changes] == [
        "objective.phases.0.until.step: 20 -> 9",
        "objective.phases.2.objective.kind: opd -> gkd",
        "objective.phases.2.objective.topk: 8 -> 64",
    ]
    rules = [rule_of(change.key) for change in changes]
    assert all(rule is not None and rule.kind == "refused" for rule in rules)
    reference = rule_of("objective.phases.1.objective.reference")
    assert reference is not None and reference.kind == "content"


def test_the_plan_names_the_phases_and_tells_what_differs_between_them(tmp_path: Path) -> None:
    text = plan(loaded(tmp_path))
    assert "0 sft until 20 steps of the run are done, then 1 tropd until trust/tv is below 0.05 at 3 steps" in text
    assert "rollouts     phase 0: none: trains on the responses" in text and "guidance     off:" in text


def test_explain_shows_the_keys_of_a_phase_and_those_of_its_objective() -> None:
    text = explain("objective.phases")
    assert "objective.phases.until.consecutive" in text and "list of mapping" in text
    assert explain("objective.phases.1.objective.trust.mode") == explain("objective.trust.mode")


def test_every_metric_that_can_end_a_phase_is_one_of_the_catalogue() -> None:
    assert {metric.name for metric in METRICS} >= PHASE_METRICS.keys()
