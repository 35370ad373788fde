"""The five numbers that stand for "nothing here", and which of them meet.

NO_ENTRY (an id) and NO_ENTRY_LOGP (its log-prob) fill unused slots of a stored top-k. ABSENT takes the place of
NO_ENTRY_LOGP where candidates enter an objective, so that a slot is known by its log-prob alone; LOGP_FLOOR takes the
place of ABSENT inside sums, where -inf would make NaN. LEAST_LOGIT never leaves the kernel: it stands for logits, not
for log-probs. Needs no library.
"""

NO_ENTRY = -1
"""Support id of an unused slot: its log-prob is 0 in the kernel, and it has no gradient."""

NO_ENTRY_LOGP = -50.0
"""Log-prob beside NO_ENTRY in stored rows that are not scored: finite, and nothing once exponentiated."""

ABSENT = float("-inf")
"""Teacher log-prob of a candidate that does not count."""

LOGP_FLOOR = -50.0
"""Stands for the log-prob (nats) of a candidate that does not count, against -inf: e^-50 = 2e-22 is no mass."""

LEAST_LOGIT = -1e30
"""Takes the place of a logit of -inf in sums over the vocabulary, and of the maximum of no logits. Its probability is 0
in float32 and float64. It is finite, because -inf - (-inf) and 0 * inf are NaN."""
