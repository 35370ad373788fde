"""The samples of each prompt, and the mini-batches of a rollout batch, each with its own optimizer step.

Invariants: pure functions of the order of the rollouts; the samples of a prompt stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tropd_mcore.errors import ConfigError
from tropd_mcore.types import Rollout


def prompt_indices(rollouts: Sequence[Rollout]) -> npt.NDArray[np.int64]:
    """Return one number per rollout, int64 [S]. The samples of a prompt have the same number."""
    _, indices = np.unique([rollout.prompt_id for rollout in rollouts], return_inverse=True)
    return indices.astype(np.int64)


def mini_batches(rollouts: Sequence[Rollout], count: int) -> list[range]:
    """Return `count` consecutive ranges of the rollouts. Their numbers of prompts differ by at most one.

    Raises ConfigError if there are fewer than `count` prompts.
    """
    if count == 1:
        return [range(len(rollouts))]
    ids = [rollout.prompt_id for rollout in rollouts]
    starts = [index for index, prompt_id in enumerate(ids) if index == 0 or prompt_id != ids[index - 1]]
    if len(starts) < count:
        raise ConfigError(
            [
                f"objective.policy_gradient.mini_batches = {count} but the step has {len(starts)} prompts; lower it or "
                "raise rollout.prompts_per_step"
            ]
        )
    edges = [starts[len(starts) * part // count] for part in range(count)] + [len(rollouts)]
    return [range(start, stop) for start, stop in pairwise(edges)]
