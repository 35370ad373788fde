"""A whole job in phases with the real rollout server, and its replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

PHASES = (
    "objective={kind: phases, phases: [{objective: {kind: sft}, until: {step: 2}}, {objective: {kind: opd, topk: 8}}]}"
)


def test_a_phase_that_samples_begins_with_the_weights_of_the_phase_before_it(
    settings: list[str], tmp_path: Path
) -> None:
    """The sampler gate, which compares log-probs to 1e-4 nats, passes at the first sampled step. The replay takes the
    responses of the first phase and the rollouts of the second, and ends with the same bits."""
    served, replayed = tmp_path / "served", tmp_path / "replayed"
    phases = [PHASES, "run.steps=4", "optimizer.learning_rate=1e-3"]
    assert "sampler and trainer agree" in jobs.run(served, *settings, *phases)
    for step in range(4):
        with np.load(served / "rollouts" / f"step_{step:06d}.npz") as rollouts:
            versions = {version.split("/")[-1] for version in rollouts["policy_version"]}
            assert versions == {"teacher" if step < 2 else f"step-{step:06d}"}

    jobs.run(replayed, *settings, *phases, f"run.replay={served}")
    assert jobs.curve(served) == jobs.curve(replayed)
    assert [line["phase/index"] for line in jobs.curve(served)] == [0, 0, 1, 1]
    exported = {(run / "export" / "model.safetensors").read_bytes() for run in (served, replayed)}
    assert len(exported) == 1
