"""The trust uniforms are a pure function of (seed, step, sample id)."""

import numpy as np

from tropd_mcore.rollout.uniforms import trust_uniforms


def test_trust_uniforms_are_determined_by_seed_step_and_sample():
    reference = trust_uniforms(1234, 7, "000007/a/0", 50)
    assert np.array_equal(reference, trust_uniforms(1234, 7, "000007/a/0", 50))
    for other in [(1235, 7, "000007/a/0"), (1234, 8, "000007/a/0"), (1234, 7, "000007/a/1"), (12347, 7, "000007/a/0")]:
        assert not np.array_equal(reference, trust_uniforms(*other, 50))


def test_a_longer_draw_of_uniforms_starts_with_the_shorter_one():
    assert np.array_equal(trust_uniforms(1, 2, "x", 99)[:41], trust_uniforms(1, 2, "x", 41))


def test_uniforms_are_float32_in_the_half_open_interval_with_the_right_mean():
    values = trust_uniforms(0, 0, "s", 100_000)
    assert values.dtype == np.float32 and values.shape == (100_000,)
    assert values.min() >= 0.0 and values.max() < 1.0
    assert abs(values.mean() - 0.5) < 0.005


def test_the_trust_uniforms_are_the_same_on_every_machine():
    golden = [0.3235182762145996, 0.8206230998039246, 0.5062808394432068]
    assert trust_uniforms(1234, 0, "000000/p/0", 3).tolist() == golden


def test_the_uniforms_of_zero_tokens_are_an_empty_array():
    assert trust_uniforms(0, 0, "s", 0).shape == (0,)
