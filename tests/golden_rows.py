"""The golden vector as rows of an exact expectation, through the real kernel on as many ranks as there are.

An expectation over the sampled token (and over the gate) has one row per possible outcome, weighted by its probability.
The shard layout is uneven, with padding columns that hold large numbers.

Shapes: T rows, V vocabulary (8), K teacher top-k (3), L student top-k (8), W width of this rank's shard.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from tests.mutants import Losses

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tropd_vector.json").read_text(encoding="utf-8"))
VOCABULARY = 8
SHARD_STARTS = {1: (0, 11), 2: (0, 5, 11), 3: (0, 2, 9, 11)}
"""Shard borders by world size: V = 8 is padded to 11, and the third of three ranks owns padding only."""
PADDING_LOGIT = 7.0
ALMOST_ONE = 1.0 - 1e-12
"""A uniform that rejects every token that can be rejected."""
TOLERANCE = 1.5e-6
"""The golden vectors have 6 decimals."""

SETTINGS: dict[str, Any] = {
    "trust_mode": "bernoulli",
    "trust_threshold": GOLDEN["clip_tau"],
    "outlier_mode": "fkl_direct",
    "outlier_weight": 1.0,
    "outlier_norm": "truncated",
    "clip_tau": GOLDEN["clip_tau"],
    "beta": 1.0,
    "prefix_loss": "nll",
}
"""Keywords of `tropd`. A claim overrides those that it is about."""
POLICY: dict[str, Any] = {
    "ratio": "none",
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 3.0,
    "mismatch": "off",
    "tis_cap": 2.0,
    "icepop_low": 0.5,
    "icepop_high": 5.0,
    "mask_below": -0.2,
    "advantage_clip": None,
}
"""Keywords of `PolicyGradient`, likewise."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Rows of an exact expectation: which token is drawn, the gate's uniform, and the probability of both."""

    x: list[int]
    u: list[float]
    probability: list[float]
    origin: str = "student"


def student_draws() -> Outcomes:
    """x ~ p, for gates that draw nothing."""
    p = np.exp(log_softmax(GOLDEN["student_logits"]))
    return Outcomes(list(range(VOCABULARY)), [0.5] * VOCABULARY, p.tolist())


def student_draws_and_gate() -> Outcomes:
    """x ~ p and u ~ U[0, 1): each x once accepted (u = 0) and once rejected, if it can be."""
    log_p, log_q = log_softmax(GOLDEN["student_logits"]), log_softmax(GOLDEN["teacher_logits"])
    p, accept = np.exp(log_p), np.minimum(np.exp(log_q - log_p), 1.0)
    every = list(range(VOCABULARY))
    return Outcomes(
        every + every, [0.0] * VOCABULARY + [ALMOST_ONE] * VOCABULARY, [*(p * accept), *(p * (1.0 - accept))]
    )


def teacher_draws() -> Outcomes:
    """x ~ q: prefix tokens."""
    q = np.exp(log_softmax(GOLDEN["teacher_logits"]))
    return Outcomes(list(range(VOCABULARY)), [0.5] * VOCABULARY, q.tolist(), origin="prefix")


@dataclass(frozen=True)
class Rows:
    """The rows of an expectation on this rank: the inputs of an objective, and the logits of its gradient."""

    inputs: Any
    logits_TW: Tensor
    shard: Any

    def gradient(self, loss_sum: Tensor) -> Tensor:
        """The gradient [T, V] in the student's logits, from all ranks. Call it once: it overwrites the logits."""
        (gradient_TW,) = torch.autograd.grad(loss_sum, self.logits_TW)
        return whole_vocabulary(gradient_TW.detach(), self.shard)


def golden_rows(losses: Losses, outcomes: Outcomes, *, teacher: str = "teacher_logits") -> Rows:
    """The policy has not moved. log p before the update keeps its graph, but no gradient may flow through it."""
    rows = len(outcomes.x)
    logits_TW, shard = this_shard(losses, torch.tensor([GOLDEN["student_logits"]] * rows, dtype=torch.float64))
    logits_TW.requires_grad_(True)
    log_q_V = torch.from_numpy(log_softmax(GOLDEN[teacher]))
    topk_ids = log_q_V.topk(VOCABULARY if teacher == "student_logits" else GOLDEN["topk"]).indices
    own_ids = torch.tensor(GOLDEN["student_logits"]).argsort(descending=True)
    x_T, k = torch.tensor(outcomes.x), len(topk_ids)
    ids_TJ = torch.cat([x_T[:, None], topk_ids.expand(rows, -1), own_ids.expand(rows, -1)], dim=1)
    logp_TJ, entropy_T = support_log_probs(losses, logits_TW, ids_TJ, shard, (1, k, VOCABULARY))
    is_student = torch.full((rows,), outcomes.origin == "student")
    one_T = torch.ones(rows, dtype=torch.float64)
    inputs = losses["objectives.inputs"].TokenInputs(
        student_logp_T=logp_TJ[:, 0],
        student_topk_logp_TK=logp_TJ[:, 1 : 1 + k],
        student_own_logp_TL=logp_TJ[:, 1 + k :],
        student_entropy_T=entropy_T,
        divergence_T=None,
        teacher_logp_T=log_q_V[x_T],
        teacher_topk_logp_TK=log_q_V[topk_ids].expand(rows, -1),
        teacher_own_logp_TL=log_q_V[own_ids].expand(rows, -1),
        teacher_entropy_T=-(log_q_V.exp() * log_q_V).sum() * one_T,
        topk_ids_TK=topk_ids.expand(rows, -1),
        own_ids_TL=own_ids.expand(rows, -1),
        target_ids_T=x_T,
        reference_logp_T=-math.log(VOCABULARY) * one_T,
        old_logp_T=logp_TJ[:, 0],
        old_own_logp_TL=logp_TJ[:, 1 + k :],
        rollout_logp_T=logp_TJ[:, 0].detach(),
        selected_T=one_T,
        advantage_T=one_T,
        history_weight_T=one_T,
        trust_u_T=torch.tensor(outcomes.u, dtype=torch.float64),
        student_mask_T=is_student,
        prefix_mask_T=~is_student,
        weight_T=torch.tensor(outcomes.probability, dtype=torch.float64),
    )
    return Rows(inputs, logits_TW, shard)


def golden_result(losses: Losses, outcomes: Outcomes, **changed: Any) -> tuple[Any, Tensor]:
    """TokenLosses of `tropd` over the outcomes, and the expected gradient [V]."""
    rows = golden_rows(losses, outcomes)
    output = losses["objectives.trust_region"].tropd(rows.inputs, **{**SETTINGS, **changed}, policy=policy(losses))
    return output, rows.gradient(output.loss_sum).sum(dim=0)


def policy(losses: Losses, **changed: Any) -> Any:
    """A PolicyGradient of the modules under test."""
    return losses["objectives.parts.policy_gradient"].PolicyGradient(**{**POLICY, **changed})


def support_log_probs(
    losses: Losses, logits_TW: Tensor, ids_TJ: Tensor, shard: Any, unique_run_lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy from this rank's logits, by the eager kernel in chunks of 3 rows."""
    kernel = losses["kernel.backend"].Kernel(
        shard=shard,
        group=dist.group.WORLD,
        backend=losses["kernel.eager"].EagerBackend(),
        scaling=losses["kernel.shard"].Scaling(),
        chunk_tokens=3,
    )
    source = losses["kernel.source"].GivenLogits(logits_TW.clone())  # the gradient is written over it
    result: tuple[Tensor, Tensor] = losses["kernel.support_log_probs"].support_log_probs(
        source, ids_TJ, kernel, unique_run_lengths=unique_run_lengths
    )
    return result


def this_shard(losses: Losses, logits_TV: Tensor) -> tuple[Tensor, Any]:
    """This rank's columns of the logits, padding included, and the VocabShard."""
    borders = SHARD_STARTS[dist.get_world_size()]
    start, stop = borders[dist.get_rank()], borders[dist.get_rank() + 1]
    padding = torch.full((logits_TV.shape[0], borders[-1] - VOCABULARY), PADDING_LOGIT, dtype=logits_TV.dtype)
    shard = losses["kernel.shard"].VocabShard(start, stop, VOCABULARY)
    return torch.cat([logits_TV, padding], dim=1)[:, start:stop].clone(), shard


def whole_vocabulary(gradient_TW: Tensor, shard: Any) -> Tensor:
    """All ranks' gradients side by side, [T, V]; those of the padding must be 0."""
    padded = SHARD_STARTS[dist.get_world_size()][-1]
    gradient = torch.zeros(gradient_TW.shape[0], padded, dtype=gradient_TW.dtype)
    gradient[:, shard.start : shard.stop] = gradient_TW
    dist.all_reduce(gradient)
    assert torch.equal(gradient[:, VOCABULARY:], torch.zeros_like(gradient[:, VOCABULARY:])), "padding has a gradient"
    return gradient[:, :VOCABULARY]


def log_softmax(logits: list[float]) -> Array:
    z = np.array(logits)
    return z - np.log(np.exp(z).sum())


def assert_close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    error = np.abs(np.asarray(actual, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max()
    assert error <= tolerance, f"largest error {error:.3g} > {tolerance:.3g}"
