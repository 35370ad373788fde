"""The five numbers that mean "nothing here", and how they relate.

NO_ENTRY (an id) and NO_ENTRY_LOGP (its log-prob) fill unused slots of a stored top-k. When candidates enter an
objective, ABSENT replaces NO_ENTRY_LOGP, so that the log-prob alone marks an unused slot. Inside sums LOGP_FLOOR
replaces ABSENT, because -inf would make NaN. LEAST_LOGIT never leaves the kernel; it replaces logits, not log-probs.
This module imports nothing.
"""

NO_ENTRY = -1
"""Support id of an unused slot. In the kernel its log-prob is 0 and it has no gradient."""

NO_ENTRY_LOGP = -50.0
"""Log-prob beside NO_ENTRY in stored rows that are not scored: finite, with a negligible exponential."""

ABSENT = float("-inf")
"""Teacher log-prob of a candidate that does not count."""

LOGP_FLOOR = -50.0
"""Replaces a log-prob (nats) of -inf: e^-50 = 2e-22 is no mass."""

LEAST_LOGIT = -1e30
"""Replaces a logit of -inf in sums over the vocabulary, and is the maximum over no logits. Its probability is 0 in
float32 and float64. It is finite, because -inf - (-inf) and 0 * inf are NaN."""
