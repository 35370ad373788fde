"""Rollouts as HTML: every token with its text, coloured and marked by what the loss made of it.

Not for metrics. Invariant: a token's kind shows without colour too: prefix dotted below, outlier waved below and bold,
not scored struck through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from tropd_mcore.evaluation.run_records import StepTokens
from tropd_mcore.types import Rollout

TokenTexts = Callable[[Sequence[int]], list[str]]
"""ids -> the text of each"""

SHOWN_TOKENS = 600
"""Tokens of a rollout that are shown; longer ones are cut with a note."""
STRONG_LOG_RATIO = 3.0
"""|log-ratio| in nats at which a token has its full colour."""

LEGEND = (
    '<p class="legend">'
    '<span class="token prompt">prompt</span> <span class="token prefix">teacher prefix</span> '
    '<span class="token trusted" style="--strength:.6">trusted</span> '
    '<span class="token outlier" style="--strength:.8">outlier</span> '
    '<span class="token unscored">not scored</span>'
    "<span>A stronger colour is a larger |log-ratio|; point at a token for its numbers. "
    "Of the samples that were kept, those with the most outliers are shown.</span></p>"
)


@dataclass(frozen=True)
class _Row:
    """What the token table says of one token."""

    trusted: float
    log_ratio: float
    old_logp: float
    teacher_logp: float
    on: bool


def rollout_html(tokens: StepTokens, sample: int, token_texts: TokenTexts) -> str:
    """Return one rollout of `tokens`: the prompt, the prefix and the response, token by token."""
    rollout = tokens.rollouts[sample]
    rows = _rows(tokens, sample)
    start = len(rollout.prompt_ids)
    prefix_end = start + len(rollout.prefix_ids)
    ids = rollout.token_ids.tolist()[: start + SHOWN_TOKENS]
    texts = token_texts(ids)
    parts = []
    for index, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
        if index < start:
            parts.append(_span("prompt", text))
        elif index < prefix_end:
            parts.append(_span("prefix", text, _numbers(token_id, rows.get(index))))
        else:
            parts.append(_response_token(token_id, text, rows.get(index)))
    left = len(rollout.token_ids) - len(ids)
    cut = f'<span class="note"> … {left} more tokens</span>' if left else ""
    shown = f"<pre>{''.join(parts)}{cut}</pre>"
    return f'<figure class="rollout"><figcaption>{_caption(rollout)}</figcaption>{shown}</figure>'


def samples_to_show(tokens: StepTokens, count: int) -> list[int]:
    """Return at most `count` of the samples whose token values were kept: those with the most outliers first."""
    table = tokens.table
    on = table["on"].astype(bool)
    kept, sample_of_row = np.unique(table["sample_index"], return_inverse=True)
    outliers = np.bincount(sample_of_row[on], weights=1.0 - table["trusted"][on].astype(float), minlength=len(kept))
    return [int(kept[index]) for index in np.argsort(-outliers, kind="stable")[:count]]


def _rows(tokens: StepTokens, sample: int) -> dict[int, _Row]:
    """{index in `Rollout.token_ids`: row}"""
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


def _response_token(token_id: int, text: str, row: _Row | None) -> str:
    if row is None or not row.on:
        return _span("unscored", text, f"id {token_id}, not scored by the teacher")
    kind = "trusted" if row.trusted >= 0.5 else "outlier"
    strength = min(1.0, 0.15 + abs(row.log_ratio) / STRONG_LOG_RATIO)
    return _span(kind, text, _numbers(token_id, row), f' style="--strength:{strength:.2f}"')


def _numbers(token_id: int, row: _Row | None) -> str:
    if row is None:
        return f"id {token_id}, no loss here"
    trust = f", trust {row.trusted:g}" if row.on else ""
    return (
        f"id {token_id}{trust}, log-ratio {row.log_ratio:+.3f}, log p {row.old_logp:.3f}, log q {row.teacher_logp:.3f}"
    )


def _span(kind: str, text: str, title: str = "", attributes: str = "") -> str:
    shown = escape(text).replace("\n", '<span class="newline">⏎</span>\n')
    hint = f' title="{escape(title, quote=True)}"' if title else ""
    return f'<span class="token {kind}"{hint}{attributes}>{shown}</span>'


def _caption(rollout: Rollout) -> str:
    ended = "ended by itself" if rollout.finish_reason == "stop" else "cut by the token budget"
    answer = f", right answer {escape(rollout.answer)}" if rollout.answer is not None else ""
    return (
        f"<b>{escape(rollout.sample_id)}</b> · prefix {len(rollout.prefix_ids)} tokens, "
        f"response {len(rollout.response_ids)} tokens, {ended}{answer}"
    )
