"""What the verifier says of the rollouts of a step: for the metrics, and for objectives that learn from it.

Not for how an answer is judged (`data.verify`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tropd_mcore.config.derived import learns_from_verifier
from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.verify import judge
from tropd_mcore.errors import DataError
from tropd_mcore.types import Prompt, Rollout

Verdict = bool | None
"""Whether prefix and response together end in the prompt's answer; None where nothing is judged."""


def judge_rollouts(rollouts: Sequence[Rollout], renderer: Renderer, config: Config) -> list[Verdict]:
    """Return one verdict a rollout; host work only.

    Raises DataError where the objective learns from verdicts and a prompt has no answer.
    """
    if config.verifier.kind == "none":
        return [None] * len(rollouts)
    if learns_from_verifier(config.objective):
        check_answers(rollouts, config)
    return [
        judge(config.verifier, renderer.decode(np.concatenate([rollout.prefix_ids, rollout.response_ids])), answer)
        if (answer := rollout.answer) is not None
        else None
        for rollout in rollouts
    ]


def check_answers(asked: Sequence[Prompt] | Sequence[Rollout], config: Config) -> None:
    """Raise DataError naming the first of the prompts (or rollouts of prompts) that has no answer."""
    missing = sorted({entry.prompt_id for entry in asked if entry.answer is None})
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"objective.kind={config.objective.kind} learns from a verifier, but prompt {missing[0]!r}{more} has no "
            f"`answer`; add it in data.prompts={config.data.prompts}, or choose another objective"
        )


def accuracy(verdicts: Sequence[Verdict]) -> float | None:
    """Return the fraction of right ones among those that were judged; None where none was."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None


def rewards(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Return 1, 0, or NaN where nothing was judged, float64 [S]."""
    return np.array([float("nan") if verdict is None else float(verdict) for verdict in verdicts], dtype=np.float64)
