"""Weights for the mismatch of trainer and sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tropd_mcore.objectives.parts.mismatch import mismatch_weight

LIMITS = {"tis_cap": 2.0, "icepop_low": 0.5, "icepop_high": 5.0, "mask_below": -0.2}
MODES = ("off", "tis", "icepop", "mask")


@pytest.mark.parametrize("mode", MODES)
def test_the_mismatch_weight_equals_the_oracle(mode: str) -> None:
    random = torch.Generator().manual_seed(9)
    student_T = -3.0 * torch.rand(301, generator=random, dtype=torch.float64)
    behav_T = -3.0 * torch.rand(301, generator=random, dtype=torch.float64)
    weight_T = mismatch_weight(student_T, behav_T, mode=mode, **LIMITS)
    expected = [
        oracles.engine_weight(s, b, {"mismatch": mode, **LIMITS})
        for s, b in zip(student_T.tolist(), behav_T.tolist(), strict=True)
    ]
    np.testing.assert_allclose(weight_T.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_the_mismatch_weight_is_one_if_the_engines_agree(mode: str) -> None:
    logp_T = -torch.rand(7)
    assert mismatch_weight(logp_T, logp_T.clone(), mode=mode, **LIMITS).tolist() == [1.0] * 7


@pytest.mark.parametrize("mode", MODES)
def test_the_mismatch_weight_is_detached_and_finite_for_any_gap(mode: str) -> None:
    student_T = torch.tensor([0.0, -500.0, -1e-3], requires_grad=True)
    weight_T = mismatch_weight(student_T, torch.tensor([-500.0, 0.0, -1e-3]), mode=mode, **LIMITS)
    assert not weight_T.requires_grad
    assert weight_T.isfinite().all()
