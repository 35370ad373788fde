"""Checks before the first optimizer step: each refuses to train on numbers that cannot be right, and says why.

The arithmetic of layout, batch and sequence is checked with the configuration (`config.checks`), vocabularies in
`teacher.vocabulary`, memory by `mcore.pipeline`; here is what needs the first rollouts.
"""

import numpy as np

from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError
from tropd_mcore.types import TokenTable

FLOAT32_BOUNDS = (1e-4, 1e-2)
"""(99th percentile, maximum) between two float32 engines, nats. Measured: 8e-6 and 1e-4 (docs/numerics.md)."""
BFLOAT16_BOUNDS = (0.25, 2.0)
"""The same where one of the engines rounds to bfloat16 (docs/numerics.md)."""


def sampler_bounds(config: Config) -> tuple[float, float]:
    """(99th percentile, maximum) allowed of |sampler - trainer| log-prob, nats."""
    exact = {config.student.dtype, config.rollout.server.dtype or config.student.dtype} == {"float32"}
    p99, largest = FLOAT32_BOUNDS if exact else BFLOAT16_BOUNDS
    gates = config.gates
    return gates.sampler_logprob_p99 or p99, gates.sampler_logprob_max or largest


def check_sampler_logprobs(table: TokenTable, config: Config) -> float | None:
    """Compare trainer and sampler on the sampled tokens of the first rollouts; returns the 99th percentile, nats.

    Returns None where no sampled token was scored, so that there is nothing to compare. Raises `GateError` with the
    size of the difference and the likely cause.
    """
    on = table["on"].astype(bool)
    if not on.any():
        return None
    difference = np.abs(table["old_logp"][on].astype(np.float64) - table["behav_logp"][on].astype(np.float64))
    p99, largest = float(np.quantile(difference, 0.99)), float(difference.max())
    p99_bound, largest_bound = sampler_bounds(config)
    if p99 <= p99_bound and largest <= largest_bound:
        return p99
    share = float((difference > p99_bound).mean())
    if share > 0.5:
        cause = "other weights, another temperature (rollout.temperature) or another chat template in the server"
    elif share > 0.01:
        cause = "another dtype (rollout.server.dtype, student.dtype) or a tensor that was converted wrongly"
    else:
        cause = "single tokens only: special tokens, or padded vocabulary columns in one of the two softmaxes"
    raise GateError(
        f"gates.sampler_logprob: sampler and trainer log-probs differ by {p99:.1e} nats (99th percentile) and "
        f"{largest:.1e} (maximum) over {int(on.sum())} tokens; allowed {p99_bound:.0e} and {largest_bound:.0e}; "
        f"{share:.1%} of the tokens are above the first. Likely cause: {cause}. Bounds: gates.sampler_logprob_p99, "
        "gates.sampler_logprob_max"
    )
