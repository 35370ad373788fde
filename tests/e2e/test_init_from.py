"""Whole jobs that replay stored rollouts: a new run from a checkpoint, and a run resumed with another schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.e2e import jobs, replayed
from tests.e2e.replayed import Stage
from tests.tiny_models import tiny_tokenizer
from tropd_mcore.errors import ConfigError, TropdError
from tropd_mcore.mcore.checkpoint_info import read_info
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.inputs import load_inputs
from tropd_mcore.types import Rollout

FIRST = ["run.steps=1", "run.export_at_end=true"]
BEGUN = ["run.init_from=CHECKPOINT", "gates.sampler_logprob=false"]
"""The stored rollouts come from the first weights, not from the checkpoint."""
SDPO = "objective={kind: sdpo, topk: 9, student_topk: 12, average_rate: 0.0, template: '{prompt} ({solution}) so'}"
JOBS = {
    "first": FIRST,
    "weights": [*BEGUN, *FIRST],
    "weights_dp": [*BEGUN, "run.steps=1", "parallel.tensor=1", "parallel.data=2"],
    "optimizer": [*BEGUN, *FIRST, "run.init_optimizer=true", "optimizer.warmup_steps=1"],
    "itself": [
        *[*BEGUN, "run.steps=1", SDPO, "teacher.path=STUDENT", "batch.tokens_per_micro_batch=160"],
        "verifier.unfinished=judge",
    ],
}
# The first test runs all jobs.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout((len(JOBS) + 3) * replayed.JOB_LIMIT_S)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return replayed.set_stage(tmp_path_factory.mktemp("stage"))


def checkpoint(stage: Stage) -> Path:
    return stage.run("first") / "checkpoints" / "step_000001"


def overrides(stage: Stage, name: str, wanted: list[str]) -> list[str]:
    places = {"CHECKPOINT": checkpoint(stage), "STUDENT": stage.model("student")}
    return replayed.overrides(stage, name, wanted, places)


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Path]:
    """{name: run directory} of all jobs, run one after the other by the same two processes."""
    replayed.replay(stage.config, [overrides(stage, name, wanted) for name, wanted in JOBS.items()])
    return {name: stage.run(name) for name in JOBS}


def tokens(run: Path, step: int = 0) -> dict[str, np.ndarray]:
    with np.load(run / "tokens" / f"step_{step:06d}.npz") as archive:
        return {name: archive[name] for name in archive.files}


def by_transformers(folder: Path, rollouts: list[Rollout]) -> np.ndarray:
    """Log-probs of all response tokens in the order of the rows."""
    pieces = []
    for rollout in rollouts:
        logp = replayed.log_probs(folder, rollout)
        pieces.append(logp[torch.arange(len(logp)), torch.from_numpy(rollout.response_ids.astype(np.int64))])
    return torch.cat(pieces).numpy()


@pytest.mark.parametrize("name", ["weights", "weights_dp", "optimizer"])
def test_the_first_step_of_a_new_run_uses_the_weights_of_the_checkpoint(
    runs: dict[str, Path], stage: Stage, name: str
) -> None:
    rollouts = stage.rollouts()[0]
    found = tokens(runs[name])["student_logp"]
    np.testing.assert_allclose(found, by_transformers(runs["first"] / "export", rollouts), atol=1e-4)
    assert np.abs(found - by_transformers(stage.model("student"), rollouts)).max() > 1e-3


def test_a_new_run_counts_its_own_steps_and_has_its_own_schedule(runs: dict[str, Path]) -> None:
    for name in ("weights", "optimizer"):
        (line,) = jobs.metrics(runs[name])
        assert (line["step"], line["optimizer/learning_rate"]) == (0, 1e-3)
        info = read_info(runs[name] / "checkpoints" / "step_000001")
        assert info.step == 1 and info.scheduler is not None and info.scheduler["num_steps"] == 1


def test_loading_the_optimizer_state_changes_the_next_step(runs: dict[str, Path]) -> None:
    """The same weights, rollouts and rate. Only the moments differ."""
    plain, kept = (jobs.metrics(runs[name])[0] for name in ("weights", "optimizer"))
    assert plain["optimizer/grad_norm"] == kept["optimizer/grad_norm"]
    one, two, before = (
        load_file(runs[name] / "export" / "model.safetensors") for name in ("weights", "optimizer", "first")
    )
    moved = [torch.cat([(found[name] - before[name]).flatten() for name in sorted(before)]) for found in (one, two)]
    assert all(float(each.abs().max()) < 2e-3 for each in moved), "neither ran away"
    assert float((moved[0] - moved[1]).abs().max()) > 1e-4


def test_the_average_that_teaches_starts_from_the_weights_of_the_checkpoint(
    runs: dict[str, Path], stage: Stage
) -> None:
    columns = tokens(runs["itself"])
    taught = columns["on"].astype(bool)
    export, tokenizer, rollouts = runs["first"] / "export", tiny_tokenizer(), stage.rollouts()[0]
    expected = []
    for index, rollout in enumerate(rollouts):
        if index % replayed.SAMPLES:  # the first sample of a prompt is its solution
            solution = tokenizer.decode(rollouts[index - 1].response_ids.tolist(), skip_special_tokens=True)
            text = f"{tokenizer.decode(rollout.prompt_ids.tolist())} ({solution}) so"
            ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
            expected.append(dataclasses.replace(rollout, prompt_ids=ids))
    found = columns["teacher_logp"][taught]
    np.testing.assert_allclose(found, by_transformers(export, expected), atol=1e-4)
    assert np.abs(found - by_transformers(stage.model("student"), expected)).max() > 1e-3
    info = read_info(runs["itself"] / "checkpoints" / "step_000001")
    assert info.average


def test_the_checkpoint_that_a_run_started_from_is_recorded(runs: dict[str, Path], stage: Stage) -> None:
    for name, with_optimizer in (("weights", False), ("optimizer", True)):
        inputs = load_inputs(RunDir(runs[name]))
        assert inputs is not None and inputs.init_from is not None
        assert (inputs.init_from.path, inputs.init_from.step) == (str(checkpoint(stage)), 1)
        assert inputs.init_from.with_optimizer is with_optimizer
    first = load_inputs(RunDir(runs["first"]))
    assert first is not None and first.init_from is None and first.launch["ranks"] == "2"


def refused(stage: Stage, name: str, wanted: list[str]) -> Any:
    with pytest.raises(TropdError) as caught:
        replayed.replay(stage.config, [overrides(stage, name, wanted)])
    return caught.value


def test_a_run_started_from_a_checkpoint_resumes_from_its_own(runs: dict[str, Path], stage: Stage) -> None:
    replayed.replay(stage.config, [overrides(stage, "weights", [*BEGUN, "run.steps=2"])])
    assert [line["step"] for line in jobs.metrics(runs["weights"])] == [0, 1]
    error = refused(stage, "first", [*BEGUN, "run.steps=2"])
    assert isinstance(error, ConfigError) and "run.init_from" in error.problems[0]


def test_a_run_resumes_with_another_rate_and_more_steps_but_not_with_another_seed(
    runs: dict[str, Path], stage: Stage
) -> None:
    record = (runs["optimizer"] / "config.resolved.yaml").read_bytes()
    same = [*JOBS["optimizer"], "run.steps=2"]
    error = refused(stage, "optimizer", [*same, "run.seed=7"])
    newest = runs["optimizer"] / "checkpoints" / "step_000001"
    assert error.problems[0].startswith("run.seed: 1234 -> 7 is refused: ")
    assert f"run.init_from={newest}" in error.problems[-1]
    assert (runs["optimizer"] / "config.resolved.yaml").read_bytes() == record
    replayed.replay(stage.config, [overrides(stage, "optimizer", [*same, "optimizer.learning_rate=3e-4"])])
    rates = [line["optimizer/learning_rate"] for line in jobs.metrics(runs["optimizer"])]
    assert rates == pytest.approx([1e-3, 3e-4], rel=1e-9)
    assert "learning_rate: 0.0003" in (runs["optimizer"] / "config.resolved.yaml").read_text()
