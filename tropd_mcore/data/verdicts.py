"""The verifier's verdicts on the rollouts of a step, for metrics and for objectives that learn from them.

The check of a single answer is in `data.verify`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.thinking import read_answer
from tropd_mcore.data.verify import is_right
from tropd_mcore.errors import DataError
from tropd_mcore.progress import counted, progress
from tropd_mcore.types import Rollout

log = logging.getLogger(__name__)

Verdict = bool | None
"""Whether prefix and response together end in the prompt's answer; None if the sample is not judged."""


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on the rollouts of a step; empty if the verifier did not run."""

    right: list[Verdict] = field(default_factory=list)
    """One verdict per rollout"""
    unfinished: float | None = None
    """Share of the judged rollouts without an answer, because they were cut or still thinking; None if none was
    judged"""


def verify_rollouts(rollouts: Sequence[Rollout], renderer: Renderer, config: Config) -> Verdicts:
    """Return one verdict per rollout. Host work only.

    Raises DataError if the objective learns from verdicts and a prompt has no answer.
    """
    if config.verifier.kind == "none":
        return Verdicts([None] * len(rollouts))
    if config.objective.learns_from_verifier:
        check_answers(rollouts, config)
    right: list[Verdict] = []
    unfinished = 0
    with progress(log, "verifier", total=len(rollouts), unit="responses judged") as state:
        for rollout in counted(rollouts, state):
            if rollout.answer is None:
                right.append(None)
                continue
            said = read_answer(config.verifier, renderer, rollout)
            unfinished += said is None
            right.append(said is not None and is_right(config.verifier, said, rollout.answer))
    judged = len(right) - right.count(None)
    return Verdicts(right, unfinished / judged if judged else None)


def check_answers(rollouts: Sequence[Rollout], config: Config) -> None:
    """Raise DataError with the first prompt without an answer, which rollouts of another run may have."""
    missing = sorted({rollout.prompt_id for rollout in rollouts if rollout.answer is None})
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"objective.kind={config.objective.kind} learns from a verifier, but prompt {missing[0]!r}{more} has no "
            f"`answer`; add it in data.prompts={config.data.prompts}, or choose another objective"
        )


def accuracy(verdicts: Sequence[Verdict]) -> float | None:
    """Return the fraction of correct answers among the judged samples; None if none was judged."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    return sum(judged) / len(judged) if judged else None


def rewards(verdicts: Sequence[Verdict]) -> np.ndarray:
    """Return 1 (correct), 0 (wrong) or NaN (not judged) per sample, float64 [S]."""
    return np.array([float("nan") if verdict is None else float(verdict) for verdict in verdicts], dtype=np.float64)
