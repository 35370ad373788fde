"""Finds the part of a response that may hold the answer: outside thinking blocks, and only in finished responses.

This module does not check the answer (`verify`). Invariant: the returned text is outside every closed thinking block.
For an unfinished response, text is returned only if verifier.unfinished allows it.
"""

from __future__ import annotations

import numpy as np

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.types import IntArray, Rollout


def answer_part(verifier: VerifierConfig, response: str, *, finished: bool, opened: bool) -> str | None:
    """Return the text of `response` in which the answer is searched; None if the response counts as without an answer.

    `finished`: the response ended by itself, not at its token budget. `opened`: the prompt opened a thinking block.
    """
    said, is_open = response, False
    if verifier.thinking is not None:
        said, is_open = outside_of_blocks(response, *verifier.thinking, opened=opened)
    unfinished = is_open or not finished
    return None if unfinished and verifier.unfinished == "wrong" else said


def outside_of_blocks(text: str, opening: str, closing: str, *, opened: bool) -> tuple[str, bool]:
    """Return `text` without its closed blocks, and whether a block is open at its end (its content is returned too).

    A closing mark without an opening one closes a block that began before the text. An opening mark inside a block is
    plain text.
    """
    said: list[str] = []
    rest, inside = text, opened
    while True:
        before, mark, after = rest.partition(closing if inside else opening)
        if not inside:
            _, stray, behind = before.rpartition(closing)
            if stray:
                said, before = [], behind
            said.append(before)
        if not mark:
            return "".join([*said, rest] if inside else said), inside
        rest, inside = after, not inside


def read_answer(verifier: VerifierConfig, renderer: Renderer, rollout: Rollout) -> str | None:
    """`answer_part` of a rollout's tokens. The teacher's prefix is part of the response. The end of the prompt tells
    whether a block is open.

    A response that rollout.truncate has cut counts as cut by its token budget.
    """
    ids = np.concatenate([rollout.prefix_ids, rollout.response_ids])
    return read_answer_ids(verifier, renderer, rollout.prompt_ids, ids, finished=rollout.finish_reason == "stop")


def read_answer_ids(
    verifier: VerifierConfig, renderer: Renderer, prompt_ids: IntArray, answer_ids: IntArray, *, finished: bool
) -> str | None:
    """`answer_part` of the tokens that follow a prompt."""
    response = renderer.decode(answer_ids, keep=verifier.thinking or ())
    opened = verifier.thinking is not None and renderer.ends_with(prompt_ids, verifier.thinking[0])
    return answer_part(verifier, response, finished=finished, opened=opened)
