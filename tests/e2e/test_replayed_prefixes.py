"""Whole jobs that replay guided rollouts: prefixes are rows only if the objective has a loss for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.e2e import jobs, replayed
from tests.e2e.replayed import LONGEST, PROMPTS, SAMPLES, STEPS, Stage
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.types import Rollout

PREFIX = 5
"""Tokens of each teacher prefix: the beginning of the first sample of the prompt."""
GUIDED = "objective={kind: tropd, outlier: {topk: 9}, guidance: {loss: LOSS, min_continuation: 1}}"
JOBS = {
    "opd": ["objective={kind: opd, topk: 9}", "run.replay=GUIDED"],
    "opd_bare": ["objective={kind: opd, topk: 9}", "run.replay=BARE"],
    "none": [GUIDED.replace("LOSS", "none"), "run.replay=GUIDED"],
    "nll": [GUIDED.replace("LOSS", "nll"), "run.replay=GUIDED"],
    "nll_unmarked": [GUIDED.replace("LOSS", "nll"), "run.replay=UNMARKED"],
}
# The first test runs all jobs.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout((len(JOBS) + 1) * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = replayed.set_stage(tmp_path_factory.mktemp("stage"))
    for step, rollouts in enumerate(stage.rollouts()):
        firsts = [rollouts[index - index % SAMPLES] for index in range(len(rollouts))]
        for name, make in (("guided", guided), ("bare", bare), ("unmarked", unmarked)):
            made = [make(index, *pair) for index, pair in enumerate(zip(rollouts, firsts, strict=True))]
            save_rollouts(stage.run(name) / "rollouts" / f"step_{step:06d}.npz", made)
    return stage


def guided(index: int, rollout: Rollout, first: Rollout) -> Rollout:
    return dataclasses.replace(
        rollout, prefix_ids=first.response_ids[:PREFIX], carries_prefix_loss=index % SAMPLES == 0
    )


def unmarked(index: int, rollout: Rollout, first: Rollout) -> Rollout:
    """The rollout as stored by a run with guidance.loss=none."""
    return dataclasses.replace(guided(index, rollout, first), carries_prefix_loss=False)


def bare(index: int, rollout: Rollout, first: Rollout) -> Rollout:
    """The same tokens without a prefix."""
    prompt_ids = np.concatenate([rollout.prompt_ids, first.response_ids[:PREFIX]])
    return dataclasses.replace(rollout, prompt_ids=prompt_ids)


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory} of all jobs, run one after the other by the same two processes."""
    responses = stage.root / "responses.jsonl"
    names = [f"s{step}p{prompt}" for step in range(STEPS) for prompt in range(PROMPTS)]
    responses.write_text("".join(f'{{"id": "{name}", "response_ids": {[5] * LONGEST}}}\n' for name in names))
    # The stored log-probs are of the responses without a prefix.
    shared = ["gates.sampler_logprob=false", f"data.teacher_responses={responses}"]
    places = {name.upper(): str(stage.run(name)) for name in ("guided", "bare", "unmarked")}
    named = []
    for name, wanted in JOBS.items():
        *others, replay = wanted
        key, _, place = replay.partition("=")
        named.append([f"run.dir={stage.run(f'of_{name}')}", *others, f"{key}={places[place]}", *shared])
    replayed.replay(stage.config, named)
    return {name: stage.run(f"of_{name}") for name in JOBS}


def test_without_a_prefix_loss_guided_rollouts_train_only_their_responses(runs: dict[str, Path]) -> None:
    for line, reference in zip(jobs.metrics(runs["opd"]), jobs.metrics(runs["opd_bare"]), strict=True):
        assert line["tokens/prefix"] == 0 and line["guidance/prefix_length"] == PREFIX
        assert line["optimizer/token_count"] == reference["optimizer/token_count"] == line["tokens/student"]
        for metric in ("loss/total", "loss/objective", "optimizer/grad_norm", "entropy/student"):
            assert line[metric] == reference[metric], metric


def test_with_a_prefix_loss_the_same_rollouts_train_their_prefixes_too(runs: dict[str, Path]) -> None:
    for none, nll in zip(jobs.metrics(runs["none"]), jobs.metrics(runs["nll"]), strict=True):
        assert none["tokens/prefix"] == 0 and nll["tokens/prefix"] == PROMPTS * PREFIX
        assert nll["optimizer/token_count"] == none["optimizer/token_count"] + PROMPTS * PREFIX


def test_rollouts_sampled_without_a_prefix_loss_get_prefix_carriers_when_replayed_with_one(
    runs: dict[str, Path],
) -> None:
    assert jobs.curve(runs["nll_unmarked"]) == jobs.curve(runs["nll"])
    kept = load_rollouts(runs["nll_unmarked"] / "rollouts" / "step_000000.npz")
    assert not any(rollout.carries_prefix_loss for rollout in kept), "the run keeps what it was given"
