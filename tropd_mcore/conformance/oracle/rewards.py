"""The objectives that train by a reward of the sampled token.

r = log q(x) - log p_old(x); the loss of a token is -A log p(x), or with ratio and clip, for the A of each docstring.
"""

from __future__ import annotations

import math

from torch import Tensor

from tropd_mcore.config.objectives.rewards import (
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    PowerOpdObjective,
    ReopoldObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.conformance.batch import CaseBatch
from tropd_mcore.conformance.oracle.decisions import Decisions
from tropd_mcore.conformance.oracle.policy import policy_loss
from tropd_mcore.conformance.oracle.statistics import (
    log_ratio,
    same_prompt,
    same_sample,
    sampled_rows,
    standard_score,
    zeros,
)
from tropd_mcore.conformance.oracle.token import Token


def reopold(objective: ReopoldObjective, token: Token, decide: Decisions) -> Tensor:
    """A = max(r, floor) on the tokens that the phase trains (statistic 1), else 0. Source: REOPOLD eq. 4 and 7."""
    floored = token.log_ratio if decide.above("floor", token.log_ratio, objective.floor) else objective.floor
    return policy_loss(token, token.statistic * floored, objective.policy_gradient, decide)


def entropy_opd(objective: EntropyOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = r on the selected tokens (statistic 1), else 0."""
    return policy_loss(token, token.statistic * token.log_ratio, objective.policy_gradient, decide)


def exopd(objective: ExopdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = scale (log q - log ref) - (log p_old - log ref). Source: G-OPD."""
    reward = objective.scale * (token.log_q - token.reference_log_p) - (token.old_log_p - token.reference_log_p)
    return policy_loss(token, reward, objective.policy_gradient, decide)


def topd(objective: TopdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = the statistic, which `topd_statistic` computes from log(alpha rho + 1 - alpha)."""
    return policy_loss(token, token.statistic, objective.policy_gradient, decide)


def vopd(objective: VopdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = r + sum p~ log(p~ / q~) over the student's candidates, renormalised, with p before the update as in r."""
    old = {candidate.vocabulary_id: _known(candidate.old_log_p) for candidate in token.own_candidates}
    student_mass = sum(math.exp(log_p) for log_p in old.values())
    teacher_mass = sum(math.exp(candidate.log_q) for candidate in token.own_candidates)
    baseline = 0.0
    for candidate in token.own_candidates:
        log_p = old[candidate.vocabulary_id] - math.log(student_mass)
        baseline += math.exp(log_p) * (log_p - candidate.log_q + math.log(teacher_mass))
    return policy_loss(token, token.log_ratio + baseline, objective.policy_gradient, decide)


def iw_opd(objective: IwOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = (log q - log p_sampler) times a weight that falls along the sample (the statistic). Source: IW-OPD."""
    reward = token.log_q - token.rollout_log_p
    return policy_loss(token, token.statistic * reward, objective.policy_gradient, decide)


def power_opd(objective: PowerOpdObjective, token: Token, decide: Decisions) -> Tensor:
    """A = q^a - p_old^a, a = power."""
    reward = math.exp(token.log_q) ** objective.power - math.exp(token.old_log_p) ** objective.power
    return policy_loss(token, reward, objective.policy_gradient, decide)


def _known(old_log_p: float | None) -> float:
    assert old_log_p is not None, "the student's own candidates come with their log-probs"
    return old_log_p


def reopold_counts(objective: ReopoldObjective, token: Token) -> bool:
    """With two stages, only the tokens that the phase trains; with one, all."""
    return objective.stages == 1 or (token.sampled_by_student and token.statistic > 0)


def entropy_opd_counts(objective: EntropyOpdObjective, token: Token) -> bool:
    """Only the selected tokens, or all, by the key `denominator`."""
    return objective.denominator == "all" or (token.sampled_by_student and token.statistic > 0)


def entropy_opd_statistic(
    objective: EntropyOpdObjective, batch: CaseBatch, progress: float, decide: Decisions
) -> list[float]:
    """1 for the tokens with the highest student entropy, else 0."""
    return _most_uncertain(objective.fraction, batch, decide)


def reopold_statistic(objective: ReopoldObjective, batch: CaseBatch, progress: float, decide: Decisions) -> list[float]:
    """1 for the tokens that the phase trains, else 0."""
    if objective.stages == 1:
        return [1.0] * len(batch.tokens.target_ids_T)
    if progress < objective.switch_at:
        return _above_floor(objective.floor, batch, decide)
    return _most_uncertain(objective.entropy_fraction, batch, decide)


def topd_statistic(objective: TopdObjective, batch: CaseBatch, progress: float, decide: Decisions) -> list[float]:
    """R_t = m_t + mean of m_s over the later tokens s of the sample, m = log(a rho + 1 - a), rho = q / p_old.

    Then z-normalised over the tokens of the prompt's samples. Source: TOP-D.
    """
    alpha = objective.mixing
    mixed = {row: math.log(alpha * math.exp(log_ratio(batch, row)) + 1.0 - alpha) for row in sampled_rows(batch)}
    returns = dict(mixed)
    if objective.future_mean:
        for row, own in mixed.items():
            later = [value for other, value in mixed.items() if same_sample(batch, row, other) and other > row]
            returns[row] = own + (sum(later) / len(later) if later else 0.0)
    found = zeros(batch)
    for row, value in returns.items():
        peers = [other_value for other, other_value in returns.items() if same_prompt(batch, row, other)]
        found[row] = standard_score(value, peers) if objective.normalise else value
    return found


def iw_opd_statistic(objective: IwOpdObjective, batch: CaseBatch, progress: float, decide: Decisions) -> list[float]:
    """1 + gamma (1 - sum_{s < t} |A_s| / sum_s |A_s|) over a sample, A = log q - log p_sampler. Source: IW-OPD."""
    tokens = batch.tokens
    size = {row: abs(float(tokens.teacher_logp_T[row] - tokens.rollout_logp_T[row])) for row in sampled_rows(batch)}
    found = zeros(batch)
    for row in size:
        before = sum(value for other, value in size.items() if same_sample(batch, row, other) and other < row)
        total = sum(value for other, value in size.items() if same_sample(batch, row, other))
        found[row] = 1.0 + objective.gamma * (1.0 - before / total)
    return found


def _above_floor(floor: float, batch: CaseBatch, decide: Decisions) -> list[float]:
    """1 for the tokens whose log-ratio is above the floor. Source: REOPOLD, phase I."""
    found = zeros(batch)
    for row in sampled_rows(batch):
        found[row] = float(decide.above("phase I", log_ratio(batch, row), floor))
    return found


def _most_uncertain(fraction: float, batch: CaseBatch, decide: Decisions) -> list[float]:
    """1 for this fraction of the tokens, those with the highest student entropy. Source: Entropy OPD; REOPOLD eq. 8."""
    entropy = batch.tokens.old_entropy_T.tolist()
    ranked = sorted(sampled_rows(batch), key=lambda row: -entropy[row])
    count = round(fraction * len(ranked))
    middle = (entropy[ranked[count - 1]] + entropy[ranked[count]]) / 2.0
    found = zeros(batch)
    for row in ranked:
        found[row] = float(decide.above("entropy quantile", entropy[row], middle))
    return found
