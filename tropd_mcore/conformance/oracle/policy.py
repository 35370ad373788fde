"""From the advantage of a sampled token to its loss: ratio, PPO's clip, dual clip, mismatch weight of the two engines.

Source: PPO (Schulman et al.), dual-clip PPO (Ye et al.), truncated importance sampling, IcePop. The constants are the
keys of objective.policy_gradient.
"""

from __future__ import annotations

import math

from torch import Tensor

from tropd_mcore.config.objectives.base import PolicyGradientConfig
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.token import Token


def policy_loss(token: Token, advantage: float, keys: PolicyGradientConfig, decide: Decisions) -> Tensor:
    """The loss of a token that the student sampled, for a constant advantage."""
    return surrogate(token.log_p, token.old_log_p, advantage * mismatch_weight(token, keys, decide), keys, decide)


def surrogate(log_p: Tensor, anchor: float, advantage: float, keys: PolicyGradientConfig, decide: Decisions) -> Tensor:
    """-A log p, -A w, or PPO's bound on -A w, with w = p / e^anchor."""
    if keys.ratio == "none":
        return -advantage * log_p
    ratio = (log_p - anchor).exp()
    if keys.ratio == "importance":
        return -advantage * ratio
    return clipped_surrogate(ratio, advantage, keys, decide)


def clipped_surrogate(ratio: Tensor, advantage: float, keys: PolicyGradientConfig, decide: Decisions) -> Tensor:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A); for A < 0 at most -dual_clip A.

    Written case by case: A > 0 is held above 1 + clip_high; A < 0 is held below 1 - clip_low and above dual_clip.
    """
    low, high, value = 1.0 - keys.clip_low, 1.0 + keys.clip_high, float(ratio.detach())
    below, above = decide.above("ppo low", low, value), decide.above("ppo high", value, high)
    if advantage > 0 and above:
        return -advantage * high + 0.0 * ratio
    if advantage < 0 and below:
        return -advantage * low + 0.0 * ratio
    if advantage < 0 and keys.dual_clip is not None and decide.above("dual clip", value, keys.dual_clip):
        return -advantage * keys.dual_clip + 0.0 * ratio
    return -advantage * ratio


def mismatch_weight(token: Token, keys: PolicyGradientConfig, decide: Decisions) -> float:
    """Trainer over sampler, w = p_old(x) / p_sampler(x), truncated (tis), 0 outside a band (icepop), or a mask."""
    if keys.mismatch == "off":
        return 1.0
    trainer, sampler = math.exp(token.old_log_p), math.exp(token.rollout_log_p)
    if keys.mismatch == "mask":
        return 0.0 if decide.above("mismatch mask", keys.mask_below, trainer - sampler) else 1.0
    weight = trainer / sampler
    if keys.mismatch == "tis":
        return keys.tis_cap if decide.above("tis cap", weight, keys.tis_cap) else weight
    outside = decide.above("icepop low", keys.icepop_low, weight) or decide.above(
        "icepop high", weight, keys.icepop_high
    )
    return 0.0 if outside else weight


def clipped_reward(reward: float, keys: PolicyGradientConfig) -> float:
    """The reward clamped to [-advantage_clip, advantage_clip]."""
    bound = keys.advantage_clip
    return reward if bound is None else max(-bound, min(bound, reward))
