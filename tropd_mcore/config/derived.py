"""Values that follow from the configuration alone.

Not for anything that needs data, a model or a process. Invariant: pure functions of the config (and the step).
"""

from __future__ import annotations

import math

from tropd_mcore.config.schema import Config, GuidanceConfig, ObjectiveConfig, ParallelConfig, TropdObjective
from tropd_mcore.errors import ConfigError


def active_guidance(config: Config) -> GuidanceConfig | None:
    """Return the guidance section where the objective has one that is enabled, else None."""
    objective = config.objective
    return objective.guidance if isinstance(objective, TropdObjective) and objective.guidance.enabled else None


def alpha(step: int, config: Config) -> float:
    """Return the guided fraction of the teacher response at `step` (from 0), in [0, 1]; 0 without guidance.

    Source: TrOPD section 3.3 (annealed to zero with a cosine); docs/method.md, 6.
    """
    guidance = active_guidance(config)
    if guidance is None:
        return 0.0
    if guidance.schedule == "constant":
        return 1.0
    total = guidance.total_steps or config.run.steps
    progress = min(step, total) / total
    if guidance.schedule == "linear":
        return 1.0 - progress
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def prefix_length(response_length: int, step: int, config: Config, *, longest_response: int) -> int:
    """Return the number of teacher tokens that one prompt's samples continue.

    `response_length` and `longest_response` count tokens without EOS. The result leaves `min_continuation` tokens of
    the response to the student, and under a shared budget at least as many new tokens. Source: docs/method.md, 5 and 6.
    """
    guidance = active_guidance(config)
    if guidance is None:
        return 0
    share = alpha(step, config)
    if guidance.length_mode == "proportional":
        wanted = math.floor(share * response_length)
    else:
        wanted = min(math.floor(share * longest_response), response_length)
    allowed = response_length - guidance.min_continuation
    if guidance.continuation_budget == "shared":
        allowed = min(allowed, config.rollout.max_new_tokens - guidance.min_continuation)
    return max(0, min(wanted, allowed))


def support_size(objective: ObjectiveConfig) -> int:
    """Return k, the number of teacher candidates a token that are scored (objective.outlier.topk; of `opd`: .topk)."""
    return objective.outlier.topk if isinstance(objective, TropdObjective) else objective.topk


def longest_sample(config: Config, *, longest_prompt: int, longest_response: int) -> int:
    """Return the most tokens a sample of this run can have: prompt + teacher prefix + new tokens.

    `longest_prompt` and `longest_response` are of the data, in tokens.
    """
    guidance = active_guidance(config)
    prefix = prefix_length(longest_response, 0, config, longest_response=longest_response)
    shared = guidance is not None and guidance.continuation_budget == "shared"
    return longest_prompt + config.rollout.max_new_tokens + (0 if shared else prefix)


def ranks_per_node(parallel: ParallelConfig, nodes: int) -> int:
    """Return how many ranks each of `nodes` machines starts; without parallel.data, the fewest that fill them evenly.

    Raises ConfigError where the ranks do not divide over the machines.
    """
    model = parallel.tensor * parallel.pipeline * parallel.context
    ranks = math.lcm(model, max(nodes, 1)) if parallel.data is None else model * parallel.data
    if nodes < 1 or ranks % nodes:
        raise ConfigError([f"parallel: tp*pp*cp*dp = {ranks} ranks do not divide over {nodes} machines"])
    return ranks // nodes
