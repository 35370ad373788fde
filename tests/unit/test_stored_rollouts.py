"""Rollouts that were put together by hand are refused in one line if their parts do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropd_mcore.errors import DataError
from tropd_mcore.records import replay
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.types import Rollout

GOOD = Rollout(
    sample_id="a/0",
    prompt_id="a",
    prompt_ids=np.array([5, 6], np.int32),
    prefix_ids=np.zeros(0, np.int32),
    response_ids=np.array([7, 8, 9], np.int32),
    rollout_logp=np.array([-1.0, -2.0, -3.0], np.float32),
    trust_u=np.array([0.1, 0.2, 0.3], np.float32),
    policy_version="by hand",
    finish_reason="length",
    carries_prefix_loss=False,
    answer=None,
)
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "log-probs too few": (
        {"rollout_logp": GOOD.rollout_logp[:2]},
        "expected one number in rollout_logp for each of the 3 response tokens, found 2",
    ),
    "uniforms too many": (
        {"trust_u": np.zeros(4, np.float32)}, "expected one number in trust_u for each of the 3 response tokens, found"
    ),
    "a log-prob that is no number": (
        {"rollout_logp": np.array([-1.0, np.nan, -3.0], np.float32)}, "expected finite numbers in rollout_logp, found"
    ),
    "no prompt": ({"prompt_ids": np.zeros(0, np.int32)}, "expected at least one token in prompt_ids"),
    "no tokens": (
        {name: np.zeros(0, np.float32) for name in ("response_ids", "rollout_logp", "trust_u")},
        "expected at least one token in response_ids or prefix_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_rollout_whose_parts_do_not_fit_is_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, line = MISTAKES[what]
    path, wrong = tmp_path / "step_000000.npz", replace(GOOD, sample_id="a/1", **changes)
    with pytest.raises(DataError, match=r"step_000000.npz: sample 'a/1': " + line):
        save_rollouts(path, [GOOD, wrong])
    assert not path.exists()
    with monkeypatch.context() as patch:  # a file that an earlier version wrote
        patch.setattr(replay, "_refuse_what_does_not_fit", lambda path, rollouts: None)
        save_rollouts(path, [GOOD, wrong])
    with pytest.raises(DataError, match=line):
        load_rollouts(path)


def test_a_sample_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 'a/0': expected another sample_id than that of an earlier sample"):
        save_rollouts(tmp_path / "step_000000.npz", [GOOD, GOOD])
