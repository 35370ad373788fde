"""The objectives whose advantage comes from a verifier, relative to the other samples of the prompt."""

from __future__ import annotations

from torch import Tensor

from tropd_mcore.config.objectives.verified import KdrlObjective, RladObjective
from tropd_mcore.conformance.batch import CaseBatch
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.policy import clipped_surrogate, mismatch_weight, policy_loss
from tropd_mcore.conformance.oracle.statistics import sampled_rows, standard_score, zeros
from tropd_mcore.conformance.oracle.token import Token


def kdrl(objective: KdrlObjective, token: Token, decide: Decisions) -> Tensor:
    """-A log p(x) + beta (log q(x) - log p(x))^2 / 2, A the verifier's advantage (the statistic). Source: KDRL.

    beta moves linearly from beta_start to beta_end over the run.
    """
    beta = objective.beta_start + (objective.beta_end - objective.beta_start) * token.progress
    penalty = 0.5 * (token.log_q - token.log_p) ** 2
    return policy_loss(token, token.statistic, objective.policy_gradient, decide) + beta * penalty


def rlad(objective: RladObjective, token: Token, decide: Decisions) -> Tensor:
    """PPO's clipped surrogate with the ratio p / (p_old^a q^(1 - a)), plus reference_weight (e^d - 1 - d).

    d = log ref(x) - log p(x). Source: RLAD.
    """
    keys = objective.policy_gradient
    anchor = objective.anchor * token.old_log_p + (1.0 - objective.anchor) * token.log_q
    advantage = token.statistic * mismatch_weight(token, keys, decide)
    loss = clipped_surrogate((token.log_p - anchor).exp(), advantage, keys, decide)
    if objective.reference_weight > 0:
        difference = token.reference_log_p - token.log_p
        loss = loss + objective.reference_weight * (difference.exp() - 1.0 - difference)
    return loss


def kdrl_statistic(objective: KdrlObjective, batch: CaseBatch, progress: float, decide: Decisions) -> list[float]:
    """GRPO's advantage."""
    return _group_advantage(batch)


def rlad_statistic(objective: RladObjective, batch: CaseBatch, progress: float, decide: Decisions) -> list[float]:
    """GRPO's advantage."""
    return _group_advantage(batch)


def _group_advantage(batch: CaseBatch) -> list[float]:
    """(reward of the token's sample - mean) / standard deviation, over the samples of its prompt. Source: GRPO."""
    rewards, groups = batch.reward_S.tolist(), batch.group_S.tolist()
    found = zeros(batch)
    for row in sampled_rows(batch):
        sample = int(batch.tokens.sample_T[row])
        peers = [reward for reward, group in zip(rewards, groups, strict=True) if group == groups[sample]]
        found[row] = standard_score(rewards[sample], peers)
    return found
