"""Whole jobs of supervised fine-tuning on two ranks: no server, no teacher weights, and a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e import jobs, replayed
from tests.e2e.replayed import PROMPTS, SAMPLES, Stage
from tests.ranks import run_on_ranks
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.types import Rollout

STEPS, END = 3, 2
"""END is the end of a turn of the tiny tokenizer."""
SFT = ["run.replay=null", f"run.steps={STEPS}", "objective={kind: sft}", "data.teacher_responses=RESPONSES"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The stage of the replays with a stored response per prompt; every third response was cut."""
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    names = [json.loads(line)["id"] for line in (stage.root / "prompts.jsonl").read_text().splitlines()]
    lines = [
        {"id": name, "response_ids": [5 + number, 9, 11][: 1 + number % 3], "finished": number % 3 != 0}
        for number, name in enumerate(names)
    ]
    (stage.root / "responses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return stage


def wanted(stage: Stage, name: str, *more: str) -> list[str]:
    return replayed.overrides(stage, name, [*SFT, *more], {"RESPONSES": stage.root / "responses.jsonl"})


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory}: a whole run, the same on data ranks, and one that is killed in its second step."""
    replayed.replay(stage.config, [wanted(stage, "whole"), wanted(stage, "on_data_ranks", "parallel.tensor=1")])
    run_on_ranks(replayed.run_until_killed, 2, stage.config, wanted(stage, "killed"), 1, timeout_s=replayed.JOB_LIMIT_S)
    replayed.replay(stage.config, [wanted(stage, "killed")])
    return {name: stage.run(name) for name in ("whole", "on_data_ranks", "killed")}


def loss_of(folder: Path, rollouts: list[Rollout]) -> float:
    """Mean negative log-likelihood of the teacher's tokens by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        tokens = len(rollout.prefix_ids)
        total -= float(log_p.gather(1, ids[1:, None])[-tokens:].sum())
        count += tokens
    return total / count


def test_the_first_loss_is_that_of_transformers_on_the_stored_responses(runs: dict[str, Path], stage: Stage) -> None:
    rollouts = load_rollouts(runs["whole"] / "rollouts" / "step_000000.npz")
    assert len(rollouts) == PROMPTS * SAMPLES and len({rollout.prompt_id for rollout in rollouts}) == len(rollouts)
    first = jobs.metrics(runs["whole"])[0]
    assert first["loss/total"] == pytest.approx(loss_of(stage.model("student"), rollouts), rel=1e-5)
    assert first["tokens/prefix"] == sum(len(rollout.prefix_ids) for rollout in rollouts)
    assert {rollout.prefix_ids[-1] == END for rollout in rollouts} == {True, False}, "an end, unless it was cut"


def test_the_loss_falls_and_nothing_of_a_student_or_a_teacher_is_reported(runs: dict[str, Path]) -> None:
    lines = jobs.metrics(runs["whole"])
    assert lines[-1]["loss/total"] < lines[0]["loss/total"]
    for line in lines:
        assert line["tokens/student"] == 0 and line["trust/tv"] is None and line["entropy/teacher"] is None
    assert not list((runs["whole"] / "logs").glob("*")) and not list((runs["whole"] / "scores").glob("*"))


def test_sft_does_not_depend_on_the_layout(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["on_data_ranks"]), jobs.metrics(runs["whole"]), strict=True):
        for metric in ("loss/total", "optimizer/grad_norm", "tokens/prefix"):
            assert line[metric] == pytest.approx(reference[metric], rel=1e-4), (metric, line["step"])


def test_a_killed_run_of_sft_ends_with_the_same_bits(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["killed"]), jobs.metrics(runs["whole"]), strict=True):
        for name, value in reference.items():
            assert name.startswith(jobs.NOT_REPRODUCIBLE) or line[name] == value, name
