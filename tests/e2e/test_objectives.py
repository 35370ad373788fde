"""Whole jobs that replay stored rollouts: updates within a step, and inputs of objectives besides teacher scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import jobs, replayed
from tests.e2e.replayed import PROMPTS, SAMPLES, Stage
from tests.ranks import run_on_ranks
from tropd_mcore.types import Rollout

UPDATES = [
    "objective={kind: opd, topk: 9, policy_gradient: {ratio: ppo_clip, mini_batches: 2, epochs: 2}}",
    "optimizer.warmup_steps=8",
]
JOBS = {
    "updates": [*UPDATES, "run.export_at_end=true"],
    "updates_dp": [*UPDATES, "parallel.tensor=1", "parallel.data=2"],
    "exopd": ["objective={kind: exopd, topk: 9, reference: REFERENCE}"],
    "vopd": ["objective={kind: vopd, topk: 9, student_topk: 7}", "gates.longest_sequence=true"],
    "rethinking": ["objective={kind: rethinking, topk: 9, student_topk: 7, support: intersection}"],
    "kdrl": ["objective={kind: kdrl, topk: 9}"],
    "kdrl_pp": ["objective={kind: kdrl, topk: 9}", "parallel.tensor=1", "parallel.pipeline=2"],
    "entropy": ["objective={kind: entropy_opd, topk: 9, fraction: 0.3}"],
    "gkd": ["objective={kind: gkd, topk: 9, full_vocabulary: true}", "gates.longest_sequence=true"],
    "truncated": ["rollout.truncate={start: 3, increment: 2, every: 1}", "loss.ignore_tokens=[a, ' apple']"],
}
# The first test runs all jobs.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout((len(JOBS) + 1) * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return replayed.set_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory} of all jobs, run one after the other by the same two processes."""
    replay(stage, JOBS)
    return {name: stage.run(name) for name in JOBS}


def replay(stage: Stage, wanted: dict[str, list[str]]) -> None:
    named = [
        [
            f"run.dir={stage.run(name)}",
            *(text.replace("REFERENCE", str(stage.model("reference"))) for text in overrides),
        ]
        for name, overrides in wanted.items()
    ]
    replayed.replay(stage.config, named)


def tokens(run: Path, step: int = 0) -> dict[str, np.ndarray]:
    """The columns of a step, rows by (sample, token)."""
    with np.load(run / "tokens" / f"step_{step:06d}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def by_transformers(stage: Stage, name: str, rollouts: list[Rollout]) -> np.ndarray:
    """Log-probs of all response tokens in the order of the rows, float64."""
    pieces = []
    for rollout in rollouts:
        logp = replayed.log_probs(stage.model(name), rollout)
        pieces.append(logp[torch.arange(len(logp)), torch.from_numpy(rollout.response_ids.astype(np.int64))])
    return torch.cat(pieces).numpy()


def test_every_step_makes_all_its_updates_and_the_first_has_a_ratio_of_one(runs: dict[str, Path]) -> None:
    first, second = jobs.metrics(runs["updates"])
    assert first["optimizer/updates"] == second["optimizer/updates"] == 4
    assert first["tokens/student"] * 2 == first["optimizer/token_count"]  # two epochs
    columns = tokens(runs["updates"])
    first_part = columns["sample_index"] < PROMPTS * SAMPLES // 2
    assert (columns["ratio"][first_part] == 1.0).all()
    assert (columns["student_logp"][first_part] == columns["old_logp"][first_part]).all()
    assert (columns["ratio"][~first_part] != 1.0).any()
    assert first["ratio/max"] > 1.0 and first["ratio/difference_mean"] > 0.0


def test_the_learning_rate_follows_optimizer_steps(runs: dict[str, Path]) -> None:
    rates = [line["optimizer/learning_rate"] for line in jobs.metrics(runs["updates"])]
    assert rates == pytest.approx([1e-3 * 4 / 8, 1e-3])


@pytest.mark.parametrize(("name", "layout"), [("updates", "dp"), ("kdrl", "pp")])
def test_updates_and_statistics_do_not_depend_on_the_layout(runs: dict[str, Path], name: str, layout: str) -> None:
    for line, reference in zip(jobs.metrics(runs[f"{name}_{layout}"]), jobs.metrics(runs[name]), strict=True):
        for metric in ("loss/total", "loss/objective", "optimizer/grad_norm", "entropy/student"):
            assert line[metric] == pytest.approx(reference[metric], rel=5e-3, abs=3e-4), (metric, line["step"])


def test_a_job_killed_between_two_updates_of_a_step_repeats_the_step_bit_for_bit(
    runs: dict[str, Path], stage: Stage
) -> None:
    killed = stage.run("killed")
    overrides = [f"run.dir={killed}", *JOBS["updates"]]
    run_on_ranks(replayed.run_until_killed, 2, stage.config, overrides, 4 + 2, timeout_s=replayed.JOB_LIMIT_S)
    assert len(jobs.metrics(killed)) == 1 and list((killed / "scores").glob("step_000001.*"))
    # The stored rollouts of the second step come from the first weights, not from the checkpoint.
    replayed.replay(stage.config, [[*overrides, "gates.sampler_logprob=false"]])
    assert jobs.curve(killed) == jobs.curve(runs["updates"])
    one, two = (load_file(run / "export" / "model.safetensors") for run in (killed, runs["updates"]))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_reward_of_exopd_is_relative_to_the_reference(runs: dict[str, Path], stage: Stage) -> None:
    rollouts = stage.rollouts()[0]
    student, teacher, reference = (
        by_transformers(stage, name, rollouts) for name in ("student", "teacher", "reference")
    )
    expected = 1.25 * (teacher - reference) - (student - reference)
    np.testing.assert_allclose(tokens(runs["exopd"])["advantage"], expected, atol=2e-3)


def test_the_baseline_of_vopd_is_the_divergence_on_the_students_own_candidates(
    runs: dict[str, Path], stage: Stage
) -> None:
    rollouts = stage.rollouts()[0]
    expected = []
    for rollout in rollouts:
        p, q = (replayed.log_probs(stage.model(name), rollout) for name in ("student", "teacher"))
        ids = torch.from_numpy(rollout.response_ids.astype(np.int64))[:, None]
        own = p.topk(7).indices
        p_own, q_own = p.gather(1, own).log_softmax(-1), q.gather(1, own).log_softmax(-1)
        baseline = (p_own.exp() * (p_own - q_own)).sum(1)
        expected.append((q - p).gather(1, ids)[:, 0] + baseline)
    np.testing.assert_allclose(tokens(runs["vopd"])["advantage"], torch.cat(expected).numpy(), atol=2e-3)


def test_rethinking_trains_on_the_students_candidates(runs: dict[str, Path]) -> None:
    for line in jobs.metrics(runs["rethinking"]):
        assert math.isfinite(line["loss/total"]) and line["optimizer/grad_norm"] > 0


def test_kdrl_gives_a_positive_advantage_to_samples_that_the_verifier_accepts(runs: dict[str, Path]) -> None:
    columns = tokens(runs["kdrl"])
    right = columns["sample_index"] % SAMPLES == 0
    np.testing.assert_allclose(columns["advantage"], np.where(right, 1.0, -1.0), atol=1e-6)
    assert [line["verifier/accuracy"] for line in jobs.metrics(runs["kdrl"])] == [0.5, 0.5]


def test_entropy_opd_counts_the_most_uncertain_tokens_of_all_ranks(runs: dict[str, Path]) -> None:
    columns, line = tokens(runs["entropy"]), jobs.metrics(runs["entropy"])[0]
    count = round(0.3 * len(columns["on"]))
    assert line["optimizer/token_count"] == count
    chosen = np.argsort(-columns["student_entropy"], kind="stable")[:count]
    np.testing.assert_array_equal(np.flatnonzero(columns["advantage"]), np.sort(chosen))


def test_gkd_measures_the_divergence_over_the_whole_vocabulary(runs: dict[str, Path], stage: Stage) -> None:
    expected = []
    for rollout in stage.rollouts()[0]:
        p, q = (replayed.log_probs(stage.model(name), rollout) for name in ("student", "teacher"))
        expected.append((q.exp() * (q - p)).sum(1))
    np.testing.assert_allclose(tokens(runs["gkd"])["divergence"], torch.cat(expected).numpy(), rtol=1e-3, atol=1e-4)
    assert not list((runs["gkd"] / "scores").glob("*"))


def test_tokens_beyond_the_truncation_and_ignored_tokens_are_not_trained(runs: dict[str, Path], stage: Stage) -> None:
    vocabulary = json.loads((stage.model("student") / "tokenizer.json").read_text())["model"]["vocab"]
    ignored = {vocabulary["a"], vocabulary["Ġapple"]}
    for step, rollouts in enumerate(stage.rollouts()):
        expected: list[tuple[int, int]] = []
        for sample, rollout in enumerate(rollouts):
            start = len(rollout.prompt_ids)
            kept = rollout.response_ids[: 3 + 2 * step]
            expected += [(sample, start + place) for place, index in enumerate(kept) if int(index) not in ignored]
        columns = tokens(runs["truncated"], step)
        found = zip(columns["sample_index"].tolist(), columns["token_index"].tolist(), strict=True)
        assert list(found) == expected


def refused(stage: Stage, *overrides: str) -> Any:
    with pytest.raises(Exception) as caught:
        replay(stage, {"refused": list(overrides)})
    return str(caught.value)


def test_a_prompt_without_an_answer_is_named_if_the_objective_learns_from_answers(stage: Stage, tmp_path: Path) -> None:
    lines = (stage.root / "prompts.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    del record["answer"]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:2], json.dumps(record), *lines[3:]]) + "\n")
    message = refused(stage, "objective={kind: kdrl}", f"data.prompts={tmp_path / 'prompts.jsonl'}")
    assert record["id"] in message and "answer" in message


def test_an_unknown_token_to_ignore_is_named_in_the_error(stage: Stage) -> None:
    message = refused(stage, "loss.ignore_first_of=['no such token']")
    assert message.startswith("loss.ignore_first_of: 'no such token' is not one token")
