"""Decides which tokens of a rollout are supervised, and which of the samples that share a prefix carries its loss.

Which rows the teacher scored is in `TeacherScores.scored_T`. Invariants: only tokens of the student or the teacher are
supervised, never the prompt's. A prefix is supervised only if the objective has a term for it, and then in one sample
of its group, the carrier. A group is a run of samples that share a prompt and a prefix. If a step has the same prompt
twice, there is one carrier for each time it was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

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
    """At every position."""
    first: frozenset[int] = frozenset()
    """At their first position in a response."""


@dataclass(frozen=True)
class Supervised:
    """The supervised tokens of one rollout."""

    response: Mask
    """one entry per token of `response_ids`"""
    prefix: Mask
    """one entry per token of `prefix_ids`; all False unless the sample carries the prefix loss"""


def ignored_tokens(loss: LossConfig, token_id: Callable[[str], int | None]) -> IgnoredTokens:
    """Return the ids of loss.ignore_tokens and loss.ignore_first_of. `token_id` maps a text to its id.

    Raises ConfigError with every text that is not one token.
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
    """Return the tokens of `rollout` that have a loss."""
    response = ~_among(rollout.response_ids, ignored.always)
    for index in ignored.first:
        response[np.flatnonzero(rollout.response_ids == index)[:1]] = False
    prefix = ~_among(rollout.prefix_ids, ignored.always)
    return Supervised(response, prefix if rollout.carries_prefix_loss else np.zeros_like(prefix))


def with_carriers(rollouts: Sequence[Rollout], *, prefix_loss: bool) -> list[Rollout]:
    """Return the rollouts with the carriers that the objective needs, wherever the rollouts were sampled.

    Without a `prefix_loss` there are no carriers. With it, a group keeps its stored carriers, so scores on disk still
    belong to it. In a group that was sampled for an objective without a prefix loss, the first sample becomes the
    carrier.
    """
    if not prefix_loss:
        return _carried_by(rollouts, set())
    carriers = _carriers(rollouts)
    firsts = {group[0] for group in _groups(rollouts) if carriers.isdisjoint(group)}
    return _carried_by(rollouts, carriers | firsts)


def hand_over(rollouts: Sequence[Rollout], lost: Collection[int]) -> list[Rollout] | None:
    """Return the rollouts with each prefix loss moved to a sample that is not `lost`; None if nothing moves.

    `lost` are the indices of samples without teacher scores. The first sample of the group that has scores and is no
    carrier takes over. If there is none, the carrier stays, and its rows have no loss because the teacher failed on
    them.
    """
    before = _carriers(rollouts)
    after = set(before)
    for group in _groups(rollouts):
        free = [index for index in group if index not in lost and index not in before]
        for carrier, heir in zip([index for index in group if index in before and index in lost], free, strict=False):
            after.remove(carrier)
            after.add(heir)
    return None if after == before else _carried_by(rollouts, after)


def _groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The indices of each run of samples that share a prompt and a prefix. Samples without a prefix are in no group."""

    def shared(index: int) -> tuple[str, bytes]:
        return rollouts[index].prompt_id, rollouts[index].prefix_ids.tobytes()

    return [list(group) for (_, prefix), group in groupby(range(len(rollouts)), shared) if prefix]


def _carriers(rollouts: Sequence[Rollout]) -> set[int]:
    return {index for index, rollout in enumerate(rollouts) if rollout.carries_prefix_loss}


def _carried_by(rollouts: Sequence[Rollout], carriers: Collection[int]) -> list[Rollout]:
    return [
        rollout if rollout.carries_prefix_loss == (index in carriers)
        else replace(rollout, carries_prefix_loss=index in carriers)
        for index, rollout in enumerate(rollouts)
    ]  # fmt: skip


def _among(ids: IntArray, chosen: frozenset[int]) -> Mask:
    return np.isin(ids, np.array(sorted(chosen), dtype=np.int64))
