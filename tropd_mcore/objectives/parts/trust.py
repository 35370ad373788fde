"""The trust gate: which tokens of the student's own sample are trained by their reward.

This module does not decide what happens to a distrusted token (`objectives`). Invariant: the weight is detached and a
pure function of its arguments. The randomness of the Bernoulli gate is in `trust_u_T`, drawn once with the rollout and
stored with it.

Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trust_gate(log_ratio_T: Tensor, *, mode: str, trust_u_T: Tensor, threshold: float) -> Tensor:
    """Return the trust weight in [0, 1] of each token sampled by the student, detached.

    With rho = q(x) / p(x) = exp(log_ratio), p the student and q the teacher:

        bernoulli   1 if u < rho else 0, u uniform in [0, 1): the acceptance rule of speculative decoding
        soft        min(rho, 1), the expectation of `bernoulli` over u
        threshold   1 if log_ratio > threshold (nats) else 0
        none        1

    u < rho is computed as log u < log_ratio; u = 0 accepts. Over x ~ p the mean of 1 - weight (bernoulli, soft) is
    sum_x p max(0, 1 - q / p), the total variation distance of p and q. Source: TrOPD, P_trust(x) = min(q/p, 1).
    """
    log_ratio_T = log_ratio_T.detach()
    if mode == "bernoulli":
        return (trust_u_T.log() < log_ratio_T).to(log_ratio_T.dtype)
    if mode == "soft":
        return log_ratio_T.clamp_max(0.0).exp()
    if mode == "threshold":
        return (log_ratio_T > threshold).to(log_ratio_T.dtype)
    assert mode == "none", f"unknown trust mode {mode!r}"
    return torch.ones_like(log_ratio_T)
