"""Plausibility checks of the values in SGLang's answers. `wire` checks their shapes first.

This module does not check that values are correct; that is measured against the trainer (`train.gates`) or the
teacher's folder. Invariant: values that pass could come from a softmax over the served vocabulary and from the
requested continuation.

Shapes: N tokens, K entries of the top-k. Log-probs are in nats.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from tropd_mcore.errors import AnswerError
from tropd_mcore.foreign_text import one_line
from tropd_mcore.types import FloatArray, IntArray

LOGP_SLACK = 1e-3
"""Largest log-prob above 0, nats. A float32 log-softmax rounds to 1e-6."""
MASS_SLACK = 1e-2
"""Largest excess of the top-k mass over 1. With log-probs rounded to bfloat16, the mass is about 1.002."""
AGREEMENT_SLACK = 1e-2
"""Largest difference, in nats, between a token's log-prob and its entry in the top-k. Both are the same number."""
SHOWN_IDS = 8


def token_ids(values: list[object], vocab_size: int, *, field: str) -> IntArray:
    """Return the ids as int32 [N]. Raises AnswerError if there are none or one is no integer in [0, vocab_size)."""
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value < vocab_size:
            raise AnswerError(
                f"SGLang answered {one_line(repr(value), 60)} in {field}[{index}]; expected a token id in "
                f"[0, {vocab_size}), the vocabulary of the served model"
            )
    if not values:
        raise AnswerError(f"SGLang answered no token in {field}; expected at least one")
    return np.array(values, dtype=np.int32)


def check_prompt_length(reported: object, sent: int) -> None:
    """Raise AnswerError if the server reports a different number of prompt tokens than were sent."""
    if reported is not None and reported != sent:
        raise AnswerError(
            f"SGLang answered meta_info.prompt_tokens {one_line(repr(reported), 60)}; {sent} were sent: the prompt was "
            "cut"
        )


def check_log_probs(logp_N: FloatArray, *, field: str) -> None:
    """Raise AnswerError if a log-prob is above 0."""
    above = np.flatnonzero(logp_N > LOGP_SLACK)
    if len(above):
        raise AnswerError(
            f"SGLang answered log-prob {logp_N[above[0]]:+.3g} in {field}[{above[0]}]; expected at most 0"
        )


def check_end(output_ids: IntArray, reason: str, matched: object, *, longest: int, end_ids: Collection[int]) -> None:
    """Raise AnswerError if the continuation did not end as `reason` says.

    `matched` is the token that the server reports as its stop. If SGLang cannot sample a token (NaN logits), it writes
    an end token instead and reports a text in `matched`. `end_ids` are the stop tokens of the request; if it has none,
    the server's own stop tokens apply.
    """
    count, last = len(output_ids), int(output_ids[-1])
    if count > longest or (reason == "length" and count != longest):
        raise AnswerError(
            f"SGLang answered {count} tokens that ended by {reason!r}; expected {longest} (max_new_tokens) of a "
            "continuation that ended by length, and at most that many otherwise"
        )
    if reason == "stop":
        if matched is not None and matched != last:
            raise AnswerError(
                f"SGLang stopped at {one_line(repr(matched), 60)} but the last token is {last}; expected the same token"
            )
        if end_ids and last not in end_ids:
            raise AnswerError(
                f"SGLang answered a continuation that stopped at token {last}; expected one of "
                f"{_some(end_ids)} (rollout.end_tokens), or an end by length"
            )
    check_goes_on(output_ids, end_ids=end_ids)


def check_goes_on(output_ids: IntArray, *, end_ids: Collection[int]) -> None:
    """Raise AnswerError if there is an end token before the last token."""
    early = np.flatnonzero(np.isin(output_ids[:-1], list(end_ids))) if end_ids else np.zeros(0, np.int64)
    if len(early):
        raise AnswerError(
            f"SGLang answered {len(output_ids) - 1 - early[0]} more tokens after the end token "
            f"{output_ids[early[0]]} in output_ids[{early[0]}]; expected the continuation to end there"
        )


def is_over(output_ids: IntArray, *, longest: int, end_ids: Collection[int]) -> bool:
    """Return whether a continuation that was aborted had ended by itself before the abort reached it."""
    return len(output_ids) >= longest or int(output_ids[-1]) in end_ids


def check_candidates(topk_ids_NK: IntArray, topk_logp_NK: FloatArray, vocab_size: int) -> None:
    """Raise AnswerError unless each row has K different ids of the vocabulary with a total probability of at most 1."""
    outside = topk_ids_NK[(topk_ids_NK < 0) | (topk_ids_NK >= vocab_size)]
    if len(outside):
        raise AnswerError(
            f"SGLang answered candidate {int(outside[0])} in the top log-probs; expected ids in [0, {vocab_size})"
        )
    ordered = np.sort(topk_ids_NK, axis=-1)
    twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
    if len(twice):
        raise AnswerError(f"SGLang answered candidate {int(twice[0])} twice for one token; expected different ids")
    above = topk_logp_NK[topk_logp_NK > LOGP_SLACK]
    if len(above):
        raise AnswerError(f"SGLang answered log-prob {float(above[0]):+.3g} in the top log-probs; expected at most 0")
    mass_N = np.exp(topk_logp_NK.astype(np.float64)).sum(axis=-1)
    heavy = np.flatnonzero(mass_N > 1.0 + MASS_SLACK)
    if len(heavy):
        raise AnswerError(
            f"SGLang answered {topk_ids_NK.shape[1]} candidates of probability {mass_N[heavy[0]]:.3f} together for one "
            "token; expected at most 1"
        )


def check_agreement(ids_N: IntArray, logp_N: FloatArray, topk_ids_NK: IntArray, topk_logp_NK: FloatArray) -> None:
    """Raise AnswerError if a token's log-prob disagrees with the top-k candidates.

    If the token is a candidate, both log-probs must be equal. If it is not, its log-prob must not exceed the smallest
    candidate's.
    """
    same_NK = topk_ids_NK == ids_N[:, None]
    among_N = same_NK.any(axis=-1)
    as_candidate_N = np.where(same_NK, topk_logp_NK, 0.0).sum(axis=-1)
    wrong_N = np.where(
        among_N,
        np.abs(as_candidate_N - logp_N) > AGREEMENT_SLACK,
        logp_N > topk_logp_NK.min(axis=-1, initial=0.0) + AGREEMENT_SLACK,
    )
    wrong = np.flatnonzero(wrong_N)
    if len(wrong):
        row = wrong[0]
        raise AnswerError(
            f"SGLang answered log-prob {logp_N[row]:.3g} for token {ids_N[row]}, but its top log-probs say "
            + (f"{as_candidate_N[row]:.3g}" if among_N[row] else f"at most {topk_logp_NK[row].min():.3g}")
            + "; expected the same number"
        )


def _some(ids: Collection[int]) -> str:
    """The smallest ids as text, at most SHOWN_IDS of them."""
    shown = ", ".join(map(str, sorted(ids)[:SHOWN_IDS]))
    return f"[{shown}]" if len(ids) <= SHOWN_IDS else f"[{shown}, ...]"
