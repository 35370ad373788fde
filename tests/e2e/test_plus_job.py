"""A whole job with examples/plus.py as its objective, on two tensor ranks: the metrics are those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e import jobs, replayed

TOPK, FLOOR, WEIGHT = 9, -0.5, 0.7
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3 * replayed.JOB_LIMIT_S)]


def test_a_job_with_the_example_objective_has_the_loss_of_the_equation(tmp_path: Path) -> None:
    stage = replayed.set_stage(tmp_path)
    arguments = f"{{floor: {FLOOR}, weight: {WEIGHT}}}"
    objective = f"{{kind: custom, function: 'examples.plus:plus', topk: {TOPK}, arguments: {arguments}}}"
    replayed.replay(stage.config, [[f"run.dir={stage.run('plus')}", f"objective={objective}"]])
    found = jobs.metrics(stage.run("plus"))
    assert [line["step"] for line in found] == list(range(replayed.STEPS))

    values, trusted, rewards = [], [], []
    for rollout in stage.rollouts()[0]:
        log_p = replayed.log_probs(stage.model("student"), rollout).numpy()
        log_q = replayed.log_probs(stage.model("teacher"), rollout).numpy()
        for token, x in enumerate(rollout.response_ids):
            r, top = log_q[token, x] - log_p[token, x], np.argsort(log_q[token])[-TOPK:]
            outlier = not np.log(rollout.trust_u[token]) < r
            fkl = (np.exp(log_q[token, top]) * (log_q[token, top] - log_p[token, top])).sum()
            values.append(WEIGHT * outlier * fkl - max(r, FLOOR) * log_p[token, x])
            trusted.append(not outlier)
            rewards.append(r)
    assert found[0]["trust/fraction"] == pytest.approx(np.mean(trusted), abs=1e-6) and 0 < np.mean(trusted) < 1
    assert found[0]["log_ratio/mean"] == pytest.approx(np.mean(rewards), rel=1e-4)
    assert found[0]["loss/total"] == pytest.approx(np.mean(values), rel=1e-4)
    assert found[0]["optimizer/grad_norm"] > 0
