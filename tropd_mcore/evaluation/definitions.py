"""Definitions of the report's terms, shown on the page itself. They are the same as in docs/method.md.

Explanations of single charts are in `chart_catalogue`.
"""

from __future__ import annotations

from html import escape

_WORDS = (
    ("p, q", "p is the student, q is the teacher: the probability that each gives to the next token."),
    (
        "log-ratio r",
        "r = log q(x) - log p(x) of a token x, in nats. If r is negative, the teacher gives the token less probability "
        "than the student does. The mean of -r over the student's tokens is the reverse KL divergence.",
    ),
    (
        "trusted",
        "A token that the student sampled and that passed the trust gate. It passes with probability min(q/p, 1). The "
        "student learns from its r.",
    ),
    (
        "outlier",
        "A token that the student sampled and that did not pass the gate: the teacher gives it much less probability. "
        "Here the student learns the teacher's distribution (forward KL over the teacher's k best tokens).",
    ),
    (
        "prefix",
        "A token of the teacher's answer. The student continues this answer, and learns the token with weight beta.",
    ),
    (
        "TV",
        "Total variation distance of p and q, from 0 (equal) to 1 (nothing in common): the mean of 1 - min(q/p, 1).",
    ),
    ("entropy H", "How undecided a model is about the next token, in nats. 0: it is certain."),
    ("nat", "The unit of natural logarithms. 1 nat is a factor of 2.72 in probability."),
)
"""(word, what it means)"""

DEFINITIONS = (
    '<details class="words"><summary>What the words mean: trusted, outlier, prefix, p, q, r, TV, H</summary><dl>'
    + "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _WORDS)
    + '</dl><p class="note">These are the words of TrOPD; other objectives use those that apply to them. '
    "The equations are in docs/method.md.</p></details>"
)
"""HTML of the definitions."""
