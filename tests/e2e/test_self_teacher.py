"""Whole jobs of objective.kind=sdpo that replay stored rollouts: trained samples, teacher weights, stored files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import jobs, replayed
from tests.e2e.replayed import PROMPTS, SAMPLES, STEPS, Stage
from tests.ranks import run_on_ranks
from tests.tiny_models import tiny_tokenizer
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.types import Rollout

TEMPLATE = "{prompt} ({solution}) so"


def sdpo(rate: float) -> list[str]:
    return [
        f"objective={{kind: sdpo, topk: 9, student_topk: 12, average_rate: {rate}, template: '{TEMPLATE}'}}",
        "teacher.path=STUDENT",
        "batch.tokens_per_micro_batch=160",
    ]


JOBS = {
    "followed": sdpo(0.5),
    "fixed": sdpo(0.0),
    "on_data_ranks": [*sdpo(0.5), "parallel.tensor=1", "parallel.data=2"],
    "on_context_ranks": [*sdpo(0.5), "parallel.tensor=1", "parallel.context=2"],
    "unsolved": [*sdpo(0.5), "run.replay=UNSOLVED"],
    "unsolved_alone": [*sdpo(0.5), "run.replay=UNSOLVED", "run.steps=1", "run.export_at_end=true"],
}
# The first test runs all jobs.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout((len(JOBS) + 1) * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    for step, rollouts in enumerate(stage.rollouts()):
        if step == 0:
            rollouts = [dataclasses.replace(rollout, answer="never said") for rollout in rollouts]
        save_rollouts(stage.run("unsolved_rollouts") / "rollouts" / f"step_{step:06d}.npz", rollouts)
    return stage


def overrides(stage: Stage, name: str, wanted: list[str]) -> list[str]:
    places = {"STUDENT": stage.model("student"), "UNSOLVED": stage.run("unsolved_rollouts")}
    return replayed.overrides(stage, name, wanted, places)


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory} of all jobs, run one after the other by the same two processes."""
    named = [overrides(stage, name, wanted) for name, wanted in JOBS.items()]
    replayed.replay(stage.config, named)
    return {name: stage.run(name) for name in JOBS}


def tokens(run: Path, step: int) -> dict[str, np.ndarray]:
    with np.load(run / "tokens" / f"step_{step:06d}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def taught_by(stage: Stage, rollouts: list[Rollout]) -> np.ndarray:
    """log q of the response tokens of the trained samples, whose teacher reads the first sample of their prompt."""
    tokenizer = tiny_tokenizer()
    pieces = []
    for index, rollout in enumerate(rollouts):
        if index % SAMPLES == 0:
            continue
        solution = tokenizer.decode(rollouts[index - index % SAMPLES].response_ids.tolist(), skip_special_tokens=True)
        prompt = tokenizer.decode(rollout.prompt_ids.tolist())
        text = TEMPLATE.replace("{prompt}", prompt).replace("{solution}", solution)
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
        logp = replayed.log_probs(stage.model("student"), dataclasses.replace(rollout, prompt_ids=ids))
        pieces.append(logp[torch.arange(len(logp)), torch.from_numpy(rollout.response_ids.astype(np.int64))])
    return torch.cat(pieces).numpy()


def test_only_samples_with_another_correct_sample_of_their_prompt_are_trained(
    runs: dict[str, Path], stage: Stage
) -> None:
    for step, line in enumerate(jobs.metrics(runs["followed"])):
        columns = tokens(runs["followed"], step)
        np.testing.assert_array_equal(columns["on"], columns["sample_index"] % SAMPLES != 0)
        assert line["teacher/masked_samples"] == PROMPTS
        assert line["optimizer/token_count"] == columns["on"].sum()
        assert math.isfinite(line["loss/total"]) and line["loss/objective"] > 0 and line["optimizer/grad_norm"] > 0


def test_the_self_teacher_is_the_student_reading_the_prompt_with_a_solution(
    runs: dict[str, Path], stage: Stage
) -> None:
    for step, rollouts in enumerate(stage.rollouts()):
        columns = tokens(runs["fixed"], step)
        found = columns["teacher_logp"][columns["on"].astype(bool)]
        np.testing.assert_allclose(found, taught_by(stage, rollouts), atol=1e-4)


def test_the_self_teacher_follows_the_student_at_the_average_rate(runs: dict[str, Path]) -> None:
    first, second = ([tokens(runs[name], step)["teacher_logp"] for name in ("followed", "fixed")] for step in (0, 1))
    np.testing.assert_array_equal(*first)
    assert np.abs(second[0] - second[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["on_data_ranks", "on_context_ranks"])
def test_self_teaching_does_not_depend_on_the_layout(runs: dict[str, Path], name: str) -> None:
    for line, reference in zip(jobs.metrics(runs[name]), jobs.metrics(runs["followed"]), strict=True):
        assert line["teacher/masked_samples"] == reference["teacher/masked_samples"]
        for metric in ("loss/total", "loss/objective", "optimizer/grad_norm", "entropy/student"):
            assert line[metric] == pytest.approx(reference[metric], rel=5e-3, abs=3e-4), (metric, line["step"])


def test_a_step_without_a_solution_trains_nothing_and_the_next_step_trains(runs: dict[str, Path]) -> None:
    first, second = jobs.metrics(runs["unsolved"])
    assert first["teacher/masked_samples"] == PROMPTS * SAMPLES
    assert first["optimizer/token_count"] == 0 and first["loss/total"] == 0 and first["optimizer/grad_norm"] == 0
    assert second["teacher/masked_samples"] == PROMPTS and second["optimizer/grad_norm"] > 0
    assert (first["optimizer/updates"], second["optimizer/updates"]) == (0, 1)


def test_a_step_without_a_solution_changes_no_bit_of_the_weights(runs: dict[str, Path], stage: Stage) -> None:
    """No weight decay and no step of the schedule: the next step has the weights and the rate of a first step."""
    found, before = (
        load_file(folder / "model.safetensors")
        for folder in (runs["unsolved_alone"] / "export", stage.model("student"))
    )
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in found)
    _, second = jobs.metrics(runs["unsolved"])
    assert second["optimizer/learning_rate"] == jobs.metrics(runs["followed"])[0]["optimizer/learning_rate"]


def test_a_killed_job_resumes_with_the_same_average(runs: dict[str, Path], stage: Stage) -> None:
    wanted = overrides(stage, "killed", JOBS["followed"])
    run_on_ranks(replayed.run_until_killed, 2, stage.config, wanted, 1, timeout_s=replayed.JOB_LIMIT_S)
    assert len(jobs.metrics(stage.run("killed"))) == STEPS - 1
    # The stored rollouts of the second step come from the first weights, not from the checkpoint.
    replayed.replay(stage.config, [[*wanted, "gates.sampler_logprob=false"]])
    assert jobs.curve(stage.run("killed")) == jobs.curve(runs["followed"])


def test_a_self_teacher_run_stores_its_rollouts_but_no_scores(runs: dict[str, Path], stage: Stage) -> None:
    assert not list((runs["followed"] / "scores").glob("*"))
    kept = load_rollouts(runs["followed"] / "rollouts" / "step_000001.npz")
    assert [rollout.sample_id for rollout in kept] == [rollout.sample_id for rollout in stage.rollouts()[1]]
