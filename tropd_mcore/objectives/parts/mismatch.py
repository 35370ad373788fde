"""Correction for sampling with one engine and training with another: weights from trainer and sampler log-probs.

Both log-probs belong to the policy that generated the sample. They differ only because two engines computed them. This
module does not handle the ratio of a policy that has moved over several updates (`policy_gradient`). Invariant: the
weight is detached.

Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Limit (nats) inside exp() only: e^20 is finite in float32 and far above every cap."""


def mismatch_weight(
    old_logp_T: Tensor,
    rollout_logp_T: Tensor,
    *,
    mode: str,
    tis_cap: float,
    icepop_low: float,
    icepop_high: float,
    mask_below: float,
) -> Tensor:
    """Detached weight of each sampled token's policy gradient.

    With w = p_trainer(x) / p_sampler(x), both before the update:

        off      1
        tis      min(w, tis_cap), truncated importance sampling
        icepop   w if icepop_low <= w <= icepop_high, else 0
        mask     0 if p_trainer(x) - p_sampler(x) < mask_below (probabilities), else 1
    """
    old_logp_T, rollout_logp_T = old_logp_T.detach(), rollout_logp_T.detach()
    if mode == "off":
        return torch.ones_like(old_logp_T)
    if mode == "mask":
        difference_T = old_logp_T.exp() - rollout_logp_T.exp()
        return (difference_T >= mask_below).to(old_logp_T.dtype)
    weight_T = (old_logp_T - rollout_logp_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if mode == "tis":
        return weight_T.clamp_max(tis_cap)
    assert mode == "icepop", f"unknown mismatch mode {mode!r}"
    in_band_T = (weight_T >= icepop_low) & (weight_T <= icepop_high)
    return weight_T.masked_fill(~in_band_T, 0.0)
