"""Which tokens of a rollout are supervised.

Not for whether the teacher could score them (`TeacherScores.scored_T`). Invariant: only tokens that student or teacher
produced are supervised, never the prompt's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.schema import LossConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.types import IntArray, Rollout

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class IgnoredTokens:
    """Token ids that are left out of the loss."""

    always: frozenset[int] = frozenset()
    """Wherever they stand."""
    first: frozenset[int] = frozenset()
    """Where they stand for the first time in a response."""


@dataclass(frozen=True)
class Supervised:
    """The supervised tokens of one rollout."""

    response: Mask
    """one entry a token of `response_ids`"""
    prefix: Mask
    """one entry a token of `prefix_ids`; False throughout unless the sample carries the prefix loss"""


def ignored_tokens(loss: LossConfig, token_id: Callable[[str], int | None]) -> IgnoredTokens:
    """Return the ids of loss.ignore_tokens and loss.ignore_first_of; `token_id` knows the vocabulary.

    Raises ConfigError naming every text that is not one token.
    """
    found: dict[str, frozenset[int]] = {}
    problems: list[str] = []
    for key, texts in (("ignore_tokens", loss.ignore_tokens), ("ignore_first_of", loss.ignore_first_of)):
        ids = {text: token_id(text) for text in texts}
        problems += [
            f"loss.{key}: {text!r} is not one token of the student's vocabulary; give an entry of its tokenizer.json "
            "or a text that is a single token"
            for text, index in ids.items()
            if index is None
        ]
        found[key] = frozenset(index for index in ids.values() if index is not None)
    if problems:
        raise ConfigError(problems)
    return IgnoredTokens(always=found["ignore_tokens"], first=found["ignore_first_of"])


def supervised(rollout: Rollout, ignored: IgnoredTokens) -> Supervised:
    """Return the tokens of `rollout` that take part in the loss."""
    response = ~_among(rollout.response_ids, ignored.always)
    for index in ignored.first:
        response[np.flatnonzero(rollout.response_ids == index)[:1]] = False
    prefix = ~_among(rollout.prefix_ids, ignored.always)
    return Supervised(response, prefix if rollout.carries_prefix_loss else np.zeros_like(prefix))


def _among(ids: IntArray, chosen: frozenset[int]) -> Mask:
    return np.isin(ids, np.array(sorted(chosen), dtype=np.int64))
