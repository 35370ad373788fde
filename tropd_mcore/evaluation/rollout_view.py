"""One rollout as HTML: every token with its text, coloured and marked by its kind in the loss, and the verdict.

This module does not choose rollouts (see `rollout_choice`, `rollouts_section`). Invariant: a token's kind is visible
without colour: prefix = dotted underline, outlier = wavy underline and bold, not scored = struck through, part of a
character = a dot.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

import numpy as np

from tropd_mcore.evaluation.rollout_texts import Answer, RolloutTexts
from tropd_mcore.evaluation.run_records import StepTokens
from tropd_mcore.types import Rollout

Verdict = Literal["right", "wrong", "no answer", "cut", "not judged"]

OPEN_TOKENS = 600
"""Number of visible tokens of a rollout; the middle of a longer one is folded."""
STRONG_LOG_RATIO = 3.0
"""|log-ratio| in nats at which a token has its full colour."""
STRENGTHS = 10
"""Shades of a colour (classes s0, s1, ... of the style sheet)."""
LONGEST_ANSWER = 80
"""Characters of an answer in the caption."""

LEGEND = (
    '<p class="legend">'
    '<span class="token prompt">prompt</span> <span class="token prefix">teacher prefix</span> '
    '<span class="token trusted s6">trusted</span> '
    '<span class="token outlier s8">outlier</span> '
    '<span class="token unscored">not scored</span> '
    '<span class="token part"></span> <span>one of several tokens of the character that follows</span>'
    "<span>A stronger colour is a larger |r|, the log-ratio. Point at a token for its numbers.</span></p>"
)


@dataclass(frozen=True)
class _Span:
    """One displayed token."""

    kind: str
    """CSS classes"""
    text: str
    title: str = ""
    """Its numbers, shown under the pointer"""


@dataclass(frozen=True)
class _Row:
    """The values of one token in the token table."""

    trusted: float
    log_ratio: float
    old_logp: float
    teacher_logp: float
    on: bool


def rollout_html(tokens: StepTokens, sample: int, texts: RolloutTexts, *, label: str = "", most: int) -> str:
    """Return one rollout with its caption: prompt, prefix and response, at most `most` tokens.

    Tokens are coloured if their values were kept. The middle of a long rollout is folded. If the rollout has more than
    `most` tokens, the middle is left out, with a note.
    """
    rollout = tokens.rollouts[sample]
    ids = rollout.token_ids.tolist()
    head, tail = _ends(len(ids), most)
    left_out = len(ids) - head - tail
    places = [*range(head), *range(len(ids) - tail, len(ids))]
    pieces = texts.texts(ids[:head]) + (texts.texts(ids[len(ids) - tail :]) if tail else [])
    rows = _rows(tokens, sample)
    known = sample in tokens.kept
    spans = [
        _token(rollout, place, ids[place], text, rows if known else None)
        for place, text in zip(places, pieces, strict=True)
    ]
    caption = _caption(tokens, sample, texts, label)
    return (
        f'<figure class="rollout"><figcaption>{caption}</figcaption>'
        f'<div class="text">{_folded(spans, head, left_out)}</div></figure>'
    )


def verdict_of(tokens: StepTokens, sample: int, answer: Answer | None) -> Verdict:
    """Return the verdict on a sample: the one stored in training, otherwise the one from `answer`."""
    stored = tokens.verdicts[sample] if tokens.verdicts is not None else None
    right = stored if stored is not None else answer.right if answer is not None else None
    if right is None:
        return "not judged"
    if right:
        return "right"
    if answer is not None and answer.found is not None:
        return "wrong"
    if tokens.rollouts[sample].finish_reason == "length":
        return "cut"
    return "no answer" if answer is not None else "wrong"


def _ends(count: int, most: int) -> tuple[int, int]:
    """How many tokens at the start and at the end are shown."""
    if count <= most:
        return count, 0
    return most - most // 2, most // 2


def _folded(spans: list[_Span], head: int, left_out: int) -> str:
    """The spans as HTML; the middle of a long rollout is folded."""
    gap = f'<span class="note"> … {left_out} tokens are not on this page … </span>' if left_out else ""
    if len(spans) <= OPEN_TOKENS:
        return f"{_html(spans[:head])}{gap}{_html(spans[head:])}"
    begin, end = OPEN_TOKENS // 2, len(spans) - OPEN_TOKENS // 2
    cut = min(max(head, begin), end) if left_out else end
    middle = f"{_html(spans[begin:cut])}{gap}{_html(spans[cut:end])}"
    return (
        f"{_html(spans[:begin])}<details><summary>{end - begin + left_out} tokens in between</summary>{middle}"
        f"</details>{_html(spans[end:])}"
    )


def _html(spans: list[_Span]) -> str:
    """The spans as HTML. Neighbours of the same kind without numbers become one element."""
    parts = []
    for (kind, title), group in groupby(spans, key=lambda span: (span.kind, span.title)):
        texts = [span.text for span in group]
        pieces = texts if title else ["".join(texts)]
        hint = f' title="{escape(title, quote=True)}"' if title else ""
        for text in pieces:
            shown = escape(text).replace("\n", '<span class="newline">⏎</span>\n')
            parts.append(f'<span class="token {kind}{"" if text else " part"}"{hint}>{shown}</span>')
    return "".join(parts)


def _rows(tokens: StepTokens, sample: int) -> dict[int, _Row]:
    """{index in `Rollout.token_ids`: row} for the tokens that the teacher scored."""
    table = tokens.table
    rows = np.flatnonzero(table["sample_index"] == sample)
    return {
        int(table["token_index"][row]): _Row(
            trusted=float(table["trusted"][row]),
            log_ratio=float(table["log_ratio"][row]),
            old_logp=float(table["old_logp"][row]),
            teacher_logp=float(table["teacher_logp"][row]),
            on=bool(table["on"][row]),
        )
        for row in rows
        if table["on"][row] or table["off"][row]
    }


def _token(rollout: Rollout, place: int, token_id: int, text: str, rows: dict[int, _Row] | None) -> _Span:
    """One token. `rows` is None if the rollout has no token values; then only prompt and prefix can be told apart."""
    start = len(rollout.prompt_ids)
    if place < start:
        return _Span("prompt", text)
    row = None if rows is None else rows.get(place)
    if place < start + len(rollout.prefix_ids):
        return _Span("prefix", text, "" if rows is None else _numbers(token_id, row))
    if rows is None:
        return _Span("plain", text)
    if row is None or not row.on:
        return _Span("unscored", text, f"id {token_id}, not scored by the teacher")
    kind = "trusted" if row.trusted >= 0.5 else "outlier"
    strength = min(1.0, 0.15 + abs(row.log_ratio) / STRONG_LOG_RATIO)
    return _Span(f"{kind} s{min(STRENGTHS - 1, int(STRENGTHS * strength))}", text, _numbers(token_id, row))


def _numbers(token_id: int, row: _Row | None) -> str:
    if row is None:
        return f"id {token_id}, no loss here"
    trust = f", trust {row.trusted:g}" if row.on else ""
    return (
        f"id {token_id}{trust}, log-ratio {row.log_ratio:+.3f}, log p {row.old_logp:.3f}, log q {row.teacher_logp:.3f}"
    )


def _caption(tokens: StepTokens, sample: int, texts: RolloutTexts, label: str) -> str:
    rollout = tokens.rollouts[sample]
    answer = texts.answer(rollout)
    verdict = verdict_of(tokens, sample, answer)
    chip = f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>' if verdict != "not judged" else ""
    ended = "ended by itself" if rollout.finish_reason == "stop" else "cut by the token budget"
    facts = [
        *_answers(rollout, answer),
        f"prefix {len(rollout.prefix_ids)} tokens, response {len(rollout.response_ids)} tokens",
        ended,
        f"weights {escape(rollout.policy_version)}",
    ]
    why = f'<span class="label">{escape(label)}</span>' if label else ""
    return f"<b>{escape(rollout.sample_id)}</b> {why} {chip}<br>{' · '.join(facts)}"


def _answers(rollout: Rollout, answer: Answer | None) -> list[str]:
    """The answer that was read and the expected one."""
    found = []
    if answer is not None:
        found.append("no answer found" if answer.found is None else f"answered <q>{_short(answer.found)}</q>")
    if rollout.answer is not None:
        found.append(f"expected <q>{_short(rollout.answer)}</q>")
    return found


def _short(text: str) -> str:
    return escape(text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]} …")
