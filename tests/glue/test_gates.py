"""The sampler gate: each bound refuses alone, on the sampled tokens only, and its message names the likely cause."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.glue.stubs import make_config
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError
from tropd_mcore.train.gates import BFLOAT16_BOUNDS, FLOAT32_BOUNDS, check_sampler_logprobs, sampler_bounds
from tropd_mcore.types import TokenTable

TOKENS = 1000


def bounded(p99: float = 0.1, largest: float = 1.0) -> Config:
    return make_config(gates={"sampler_logprob_p99": p99, "sampler_logprob_max": largest})


def table(*differences: tuple[int, int, float], off: int = 0) -> TokenTable:
    """Tokens first ... last - 1 differ by so many nats, in both directions; the first `off` tokens were not sampled."""
    behav = -np.linspace(0.1, 3.0, TOKENS)
    old, on = behav.copy(), np.ones(TOKENS, dtype=bool)
    for first, last, difference in differences:
        old[first:last] = behav[first:last] + difference * np.where(np.arange(first, last) % 2, 1.0, -1.0)
    on[:off] = False
    return TokenTable({"on": on, "old_logp": old.astype(np.float32), "behav_logp": behav.astype(np.float32)})


def refused(found: TokenTable, config: Config) -> str:
    with pytest.raises(GateError) as caught:
        check_sampler_logprobs(found, config)
    return str(caught.value)


def test_the_gate_refuses_where_the_percentile_alone_is_above_its_bound() -> None:
    message = refused(table((0, 50, 0.5)), bounded())
    assert "5.0e-01 nats (99th percentile)" in message and f"over {TOKENS} tokens" in message
    assert "allowed 1e-01 and 1e+00" in message and "5.0% of the tokens" in message


def test_the_gate_refuses_where_the_maximum_alone_is_above_its_bound() -> None:
    message = refused(table((7, 8, 2.0)), bounded())
    assert "2.0e+00 (maximum)" in message and "0.1% of the tokens" in message


def test_the_gate_accepts_inside_both_bounds_and_returns_the_percentile() -> None:
    assert check_sampler_logprobs(table(), bounded()) == 0.0
    found = check_sampler_logprobs(table((0, TOKENS, 0.0625), (3, 5, 0.9)), bounded())
    assert found == pytest.approx(0.0625, abs=1e-5)


def test_the_sign_of_a_difference_does_not_matter() -> None:
    below = table()
    below.columns["old_logp"][:50] -= 0.5
    above = table()
    above.columns["old_logp"][:50] += 0.5
    refused(below, bounded())
    refused(above, bounded())


def test_only_tokens_that_were_sampled_are_compared() -> None:
    everything = table((0, 900, 5.0))
    assert "over 1000 tokens" in refused(everything, bounded())
    assert check_sampler_logprobs(table((0, 900, 5.0), off=900), bounded()) == 0.0
    assert "over 100 tokens" in refused(table((0, 901, 5.0), off=900), bounded())


def test_a_step_without_sampled_tokens_has_nothing_to_compare() -> None:
    assert check_sampler_logprobs(table((0, TOKENS, 9.0), off=TOKENS), bounded()) is None


@pytest.mark.parametrize(
    ("student", "server", "expected"),
    [
        ("float32", None, FLOAT32_BOUNDS),
        ("float32", "float32", FLOAT32_BOUNDS),
        ("float32", "bfloat16", BFLOAT16_BOUNDS),
        ("bfloat16", None, BFLOAT16_BOUNDS),
        ("bfloat16", "float32", BFLOAT16_BOUNDS),
        ("bfloat16", "bfloat16", BFLOAT16_BOUNDS),
    ],
)
def test_default_bounds_are_tight_only_between_two_float32_engines(
    student: str, server: str | None, expected: tuple[float, float]
) -> None:
    config = make_config(student={"dtype": student}, rollout={"server": {"dtype": server}})
    assert sampler_bounds(config) == expected
    p99, largest = expected
    refused(table((0, 50, 2.0 * p99)), config)
    refused(table((0, 1, 2.0 * largest)), config)
    check_sampler_logprobs(table((0, 50, 0.9 * p99), (60, 61, 0.9 * largest)), config)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"sampler_logprob_p99": 0.5}, (0.5, FLOAT32_BOUNDS[1])),
        ({"sampler_logprob_max": 7.0}, (FLOAT32_BOUNDS[0], 7.0)),
        ({"sampler_logprob_p99": 0.5, "sampler_logprob_max": 7.0}, (0.5, 7.0)),
    ],
)
def test_a_bound_that_is_given_replaces_its_own_default_alone(
    gates: dict[str, Any], expected: tuple[float, float]
) -> None:
    assert sampler_bounds(make_config(gates=gates)) == expected


def test_the_documented_default_bounds_are_those_in_force() -> None:
    assert FLOAT32_BOUNDS == (1e-4, 1e-2) and BFLOAT16_BOUNDS == (0.25, 2.0)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (600, "other weights, another temperature (rollout.temperature) or another chat template in the server"),
        (100, "another dtype (rollout.server.dtype, student.dtype) or a tensor that was converted wrongly"),
        (1, "single tokens only: special tokens, or padded vocabulary columns in one of the two softmaxes"),
    ],
)
def test_the_cause_follows_from_the_share_of_wrong_tokens(wrong: int, cause: str) -> None:
    message = refused(table((0, wrong, 2.0)), bounded())
    assert cause in message and message.startswith("gates.sampler_logprob: ")
    assert message.endswith("Bounds: gates.sampler_logprob_p99, gates.sampler_logprob_max")
