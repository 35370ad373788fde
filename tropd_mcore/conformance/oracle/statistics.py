"""What a token's loss takes from other tokens: of its sample, its prompt's samples, the whole batch.

Only tokens that the student sampled take part, with their numbers from before the update.
"""

from __future__ import annotations

import math

from tropd_mcore.config.advantage_objectives import (
    EntropyOpdObjective,
    IwOpdObjective,
    KdrlObjective,
    ReopoldObjective,
    RladObjective,
    TopdObjective,
)
from tropd_mcore.config.schema import ObjectiveConfig
from tropd_mcore.conformance.batch import Batch
from tropd_mcore.conformance.oracle.decisions import Decisions


def statistics(objective: ObjectiveConfig, batch: Batch, progress: float, decide: Decisions) -> list[float]:
    """Return one number a token; 1 for the objectives that look at nothing else."""
    if isinstance(objective, EntropyOpdObjective):
        return _most_uncertain(objective.fraction, batch, decide)
    if isinstance(objective, ReopoldObjective) and objective.stages == 2:
        if progress < objective.switch_at:
            return _above_floor(objective.floor, batch, decide)
        return _most_uncertain(objective.entropy_fraction, batch, decide)
    if isinstance(objective, TopdObjective):
        return _mixed_return(objective, batch)
    if isinstance(objective, IwOpdObjective):
        return _early_weight(objective.gamma, batch)
    if isinstance(objective, KdrlObjective | RladObjective):
        return _group_advantage(batch)
    return [1.0] * len(batch.tokens.target_ids_T)


def _above_floor(floor: float, batch: Batch, decide: Decisions) -> list[float]:
    """1 for the tokens whose log-ratio is above the floor. Source: REOPOLD, phase I."""
    found = _zeros(batch)
    for row in _sampled_rows(batch):
        found[row] = float(decide.above("phase I", _log_ratio(batch, row), floor))
    return found


def _most_uncertain(fraction: float, batch: Batch, decide: Decisions) -> list[float]:
    """1 for that share of the tokens which has the highest student entropy. Source: Entropy OPD; REOPOLD eq. 8."""
    entropy = batch.tokens.old_entropy_T.tolist()
    ranked = sorted(_sampled_rows(batch), key=lambda row: -entropy[row])
    count = round(fraction * len(ranked))
    middle = (entropy[ranked[count - 1]] + entropy[ranked[count]]) / 2.0
    found = _zeros(batch)
    for row in ranked:
        found[row] = float(decide.above("entropy quantile", entropy[row], middle))
    return found


def _mixed_return(objective: TopdObjective, batch: Batch) -> list[float]:
    """log(a rho + 1 - a), plus its mean over the later tokens of the sample, z-normalised over the prompt's tokens."""
    alpha = objective.mixing
    mixed = {row: math.log(alpha * math.exp(_log_ratio(batch, row)) + 1.0 - alpha) for row in _sampled_rows(batch)}
    returns = dict(mixed)
    if objective.future_mean:
        for row, own in mixed.items():
            later = [value for other, value in mixed.items() if _same_sample(batch, row, other) and other > row]
            returns[row] = own + (sum(later) / len(later) if later else 0.0)
    found = _zeros(batch)
    for row, value in returns.items():
        peers = [other_value for other, other_value in returns.items() if _same_prompt(batch, row, other)]
        found[row] = _standard_score(value, peers) if objective.normalise else value
    return found


def _early_weight(gamma: float, batch: Batch) -> list[float]:
    """1 + gamma (1 - sum of |A| before / sum of |A|), over a sample, A = log q - log p of the sampler (IW-OPD)."""
    tokens = batch.tokens
    size = {row: abs(float(tokens.teacher_logp_T[row] - tokens.behav_logp_T[row])) for row in _sampled_rows(batch)}
    found = _zeros(batch)
    for row in size:
        before = sum(value for other, value in size.items() if _same_sample(batch, row, other) and other < row)
        total = sum(value for other, value in size.items() if _same_sample(batch, row, other))
        found[row] = 1.0 + gamma * (1.0 - before / total)
    return found


def _group_advantage(batch: Batch) -> list[float]:
    """The reward of the token's sample, z-normalised over the samples of its prompt. Source: GRPO."""
    rewards, groups = batch.reward_S.tolist(), batch.group_S.tolist()
    found = _zeros(batch)
    for row in _sampled_rows(batch):
        sample = int(batch.tokens.sample_T[row])
        peers = [reward for reward, group in zip(rewards, groups, strict=True) if group == groups[sample]]
        found[row] = _standard_score(rewards[sample], peers)
    return found


def _standard_score(value: float, population: list[float]) -> float:
    mean = sum(population) / len(population)
    return (value - mean) / math.sqrt(sum((other - mean) ** 2 for other in population) / len(population))


def _log_ratio(batch: Batch, row: int) -> float:
    return float(batch.tokens.teacher_logp_T[row] - batch.tokens.old_logp_T[row])


def _sampled_rows(batch: Batch) -> list[int]:
    return [row for row, on in enumerate(batch.tokens.on_mask_T.tolist()) if on]


def _same_sample(batch: Batch, row: int, other: int) -> bool:
    return int(batch.tokens.sample_T[row]) == int(batch.tokens.sample_T[other])


def _same_prompt(batch: Batch, row: int, other: int) -> bool:
    group_S, sample_T = batch.group_S, batch.tokens.sample_T
    return int(group_S[sample_T[row]]) == int(group_S[sample_T[other]])


def _zeros(batch: Batch) -> list[float]:
    return [0.0] * len(batch.tokens.target_ids_T)
