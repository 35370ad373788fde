"""The section with the rollouts of a run: which steps and samples it shows, open or folded, within a bounded size.

This module does not render a rollout (see `rollout_view`) and does not choose them (see `rollout_choice`). Invariant:
the page says how many rollouts there are and which of them it shows.
"""

from __future__ import annotations

from html import escape

from tropd_mcore.evaluation.rollout_choice import Choice, choose
from tropd_mcore.evaluation.rollout_texts import RolloutTexts
from tropd_mcore.evaluation.rollout_view import LEGEND, rollout_html
from tropd_mcore.evaluation.run_records import RunRecords, StepTokens

MOST_TOKENS = 60_000
"""Most tokens with values on a page, about 150 bytes each. The rollouts that show values share them evenly."""
LEAST_TOKENS = 200
"""Tokens shown of each rollout, even if there are many rollouts."""
PLAIN_SAMPLES = 12
"""Most rollouts per step that are shown without token values."""
PLAIN_TOKENS = 1000
"""Most tokens of each rollout without token values."""


def rollouts_section(run: RunRecords, texts: RolloutTexts, *, named: bool) -> str:
    """Return the section with the rollouts of `run`, or the reason why there are none.

    `named`: the page shows several runs, so the title names this one.
    """
    title = f"Rollouts{f' of {escape(run.name)}' if named else ''}"
    if not run.tokens:
        text = (
            "No step has both its token values and its rollouts: monitor.token_samples or run.keep_rollouts is off, "
            "or the files were removed."
        )
        return f'<section><h2>{title}</h2><p class="note">{text}</p></section>'
    parts = [LEGEND, f'<p class="note">{escape(_which(run))}</p>']
    if texts.problem:
        parts.append(f'<p class="warning">{escape(texts.problem[0].upper() + texts.problem[1:])}.</p>')
    if all(tokens.verdicts is None for tokens in run.tokens) and texts.verifier is not None and texts.renderer:
        parts.append(
            '<p class="note">The run did not store its verdicts. Those below were computed for this page, with the '
            "verifier of the run's configuration.</p>"
        )
    choices = [choose(tokens) for tokens in run.tokens]
    shown = sum(len(choice.drawn) + len(choice.others) + (choice.richest is not None) for choice in choices)
    most = max(LEAST_TOKENS, MOST_TOKENS // max(1, shown))
    open_steps = {0, len(run.tokens) // 2, len(run.tokens) - 1}
    for place, (tokens, choice) in enumerate(zip(run.tokens, choices, strict=True)):
        parts.append(_step(tokens, choice, texts, most, is_open=place in open_steps))
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def _which(run: RunRecords) -> str:
    """The sentences that say which steps and samples are shown."""
    steps = ", ".join(str(tokens.step) for tokens in run.tokens)
    return (
        f"Shown: {len(run.tokens)} of {run.steps_with_tokens} steps with token values ({steps}), spread evenly from "
        "the first to the last. The first rollouts of each step are drawn by a fixed rule that ignores their content. "
        "One with many outliers may follow and is labelled. The others are folded below."
    )


def _step(tokens: StepTokens, choice: Choice, texts: RolloutTexts, most: int, *, is_open: bool) -> str:
    figures = [rollout_html(tokens, sample, texts, label="drawn", most=most) for sample in choice.drawn]
    if choice.richest is not None:
        label = "most outliers of those with token values"
        figures.append(rollout_html(tokens, choice.richest, texts, label=label, most=most))
    parts = [_grid(figures)]
    if choice.others:
        others = [rollout_html(tokens, sample, texts, most=most) for sample in choice.others]
        parts.append(_fold(f"{len(others)} more with token values", _grid(others)))
    if choice.plain:
        samples = _spread(choice.plain, PLAIN_SAMPLES)
        plain = [rollout_html(tokens, sample, texts, most=PLAIN_TOKENS) for sample in samples]
        which = f"{len(plain)} more" if len(plain) == len(choice.plain) else f"{len(plain)} of {len(choice.plain)} more"
        parts.append(_fold(f"{which} without token values", _grid(plain)))
    summary = f"Step {tokens.step} <small>{escape(_tally(tokens))}</small>"
    return f'<details class="step"{" open" if is_open else ""}><summary>{summary}</summary>{"".join(parts)}</details>'


def _tally(tokens: StepTokens) -> str:
    """Number of rollouts of the step, and how many were judged right."""
    count = f"{len(tokens.rollouts)} rollouts"
    judged = [verdict for verdict in tokens.verdicts or [] if verdict is not None]
    return f"{count}, {sum(judged)} of {len(judged)} judged right" if judged else count


def _spread(values: list[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spread."""
    if len(values) <= most:
        return values
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def _grid(figures: list[str]) -> str:
    return f'<div class="rollouts">{"".join(figures)}</div>'


def _fold(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"
