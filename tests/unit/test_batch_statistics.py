"""Statistics over a batch against loops over samples and tokens, in any order of rows, with degenerate groups.

Shapes: T rows, S samples.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from tropd_mcore.config.objectives.candidates import RethinkingObjective
from tropd_mcore.config.objectives.rewards import (
    EntropyOpdObjective,
    ExopdObjective,
    IwOpdObjective,
    PowerOpdObjective,
    ReopoldObjective,
    TopdObjective,
    VopdObjective,
)
from tropd_mcore.config.objectives.trust_region import OpdObjective, TropdObjective
from tropd_mcore.config.objectives.verified import KdrlObjective, RladObjective
from tropd_mcore.objectives.parts.batch_statistics import (
    BatchRows,
    group_advantage,
    history_weight,
    mixed_return,
    most_uncertain,
    statistic_of,
)

LENGTHS = (5, 1, 7, 3, 9, 2, 4)
PROMPTS = (0, 0, 0, 1, 1, 2, 3)
REWARDS = (1.0, 0.0, 1.0, 0.0, math.nan, 1.0, math.nan)
STATISTICS = {
    "most_uncertain": lambda rows: most_uncertain(rows, fraction=0.3),
    "mixed_return": lambda rows: mixed_return(rows, mixing=0.9, future_mean=True, normalise=True),
    "history_weight": lambda rows: history_weight(rows, gamma=0.5),
    "group_advantage": group_advantage,
}


def batch(seed: int = 0) -> BatchRows:
    """Samples of unequal length, each after a teacher prefix of two rows. Every eighth row is outside the mask."""
    random = np.random.default_rng(seed)
    samples = np.concatenate([np.full(length + 2, sample) for sample, length in enumerate(LENGTHS)])
    tokens = np.concatenate([np.arange(6, 6 + length + 2) for length in LENGTHS])
    count = len(samples)
    on = (tokens >= 8) & (np.arange(count) % 8 != 4)
    rows = BatchRows(
        sample_index_T=samples,
        token_index_T=tokens,
        on_T=on,
        student_entropy_T=random.random(count),
        old_logp_T=-3.0 * random.random(count),
        rollout_logp_T=-3.0 * random.random(count),
        teacher_logp_T=-3.0 * random.random(count),
        prompt_index_S=np.array(PROMPTS),
        reward_S=np.array(REWARDS),
    )
    return in_order(rows, random.permutation(count))


def in_order(rows: BatchRows, order: np.ndarray) -> BatchRows:
    """The same rows in another order."""
    return replace(rows, **{f.name: getattr(rows, f.name)[order] for f in fields(rows) if f.name.endswith("_T")})


def tokens_of(rows: BatchRows, sample: int) -> list[int]:
    """Indices of the on rows of a sample, by token."""
    mine = [row for row in range(len(rows.on_T)) if rows.sample_index_T[row] == sample and rows.on_T[row]]
    return sorted(mine, key=lambda row: int(rows.token_index_T[row]))


@pytest.mark.parametrize("name", STATISTICS)
def test_the_order_of_the_rows_changes_no_bit_of_a_statistic(name: str) -> None:
    rows = batch()
    order = np.random.default_rng(1).permutation(len(rows.on_T))
    np.testing.assert_array_equal(STATISTICS[name](in_order(rows, order)), STATISTICS[name](rows)[order])


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", STATISTICS)
def test_rows_outside_the_mask_get_zero_and_do_not_influence_a_statistic(name: str, fill: float) -> None:
    rows = batch()
    expected = STATISTICS[name](rows)
    dirty = {
        column: np.where(rows.on_T, getattr(rows, column), fill)
        for column in ("student_entropy_T", "old_logp_T", "rollout_logp_T", "teacher_logp_T")
    }
    found = STATISTICS[name](replace(rows, **dirty))
    np.testing.assert_array_equal(found, expected)
    assert not found[~rows.on_T].any()


@pytest.mark.parametrize("name", STATISTICS)
def test_a_batch_without_rows_gives_an_empty_or_zero_statistic(name: str) -> None:
    rows = in_order(batch(), np.array([], dtype=np.int64))
    assert STATISTICS[name](rows).shape == (0,)
    nothing_on = replace(batch(), on_T=np.zeros(len(batch().on_T), dtype=np.bool_))
    assert not STATISTICS[name](nothing_on).any()


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 5), (0.4, 11), (1.0, 27), (1e-9, 1), (0.05, 1)])
def test_the_most_uncertain_tokens_of_the_whole_batch_are_selected(fraction: float, count: int) -> None:
    rows = batch()
    assert rows.on_T.sum() == 27
    selected = most_uncertain(rows, fraction=fraction).astype(bool)
    assert selected.sum() == count
    left_out = rows.on_T & ~selected
    if left_out.any():
        assert rows.student_entropy_T[selected].min() > rows.student_entropy_T[left_out].max()


def test_equal_entropies_are_ordered_by_sample_and_token() -> None:
    rows = batch()
    rows = replace(rows, student_entropy_T=np.where(rows.sample_index_T == 4, 1.0, 0.5))
    selected = most_uncertain(rows, fraction=10 / 27).astype(bool)
    expected = tokens_of(rows, 4) + (tokens_of(rows, 0) + tokens_of(rows, 1) + tokens_of(rows, 2))
    assert set(np.flatnonzero(selected)) == set(expected[:10])


@pytest.mark.parametrize("future_mean", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_mixed_return_equals_a_loop_over_tokens(future_mean: bool, normalise: bool) -> None:
    rows, alpha = batch(2), 0.7
    found = mixed_return(rows, mixing=alpha, future_mean=future_mean, normalise=normalise)
    expected = np.zeros(len(rows.on_T))
    for sample in range(len(LENGTHS)):
        own = tokens_of(rows, sample)
        mixed = [math.log(alpha * math.exp(rows.teacher_logp_T[t] - rows.old_logp_T[t]) + 1 - alpha) for t in own]
        for place, row in enumerate(own):
            later = mixed[place + 1 :]
            expected[row] = mixed[place] + (sum(later) / len(later) if future_mean and later else 0.0)
    if normalise:
        for prompt in set(PROMPTS):
            group = [t for sample in range(len(PROMPTS)) if PROMPTS[sample] == prompt for t in tokens_of(rows, sample)]
            mean = sum(expected[t] for t in group) / len(group)
            deviation = math.sqrt(sum((expected[t] - mean) ** 2 for t in group) / len(group))
            for row in group:
                expected[row] = (expected[row] - mean) / deviation
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_mixed_log_ratio_is_bounded_below_if_the_teacher_excludes_a_token() -> None:
    rows = batch()
    rows = replace(rows, teacher_logp_T=np.full(len(rows.on_T), -math.inf))
    found = mixed_return(rows, mixing=0.9, future_mean=False, normalise=False)
    np.testing.assert_allclose(found[rows.on_T], math.log(0.1), rtol=1e-12)


def test_the_history_weight_falls_from_one_plus_gamma_with_the_advantage_before_the_token() -> None:
    rows, gamma = batch(3), 0.5
    found = history_weight(rows, gamma=gamma)
    for sample in range(len(LENGTHS)):
        own = tokens_of(rows, sample)
        magnitude = [abs(rows.teacher_logp_T[t] - rows.rollout_logp_T[t]) for t in own]
        for place, row in enumerate(own):
            expected = 1 + gamma * (1 - sum(magnitude[:place]) / sum(magnitude))
            assert found[row] == pytest.approx(expected, abs=1e-13)
        if own:
            assert found[own[0]] == 1 + gamma


def test_a_sample_without_any_advantage_has_a_finite_history_weight() -> None:
    rows = batch()
    rows = replace(rows, rollout_logp_T=rows.teacher_logp_T)
    np.testing.assert_array_equal(history_weight(rows, gamma=0.5)[rows.on_T], 1.5)


def test_the_group_advantage_compares_the_judged_samples_of_a_prompt() -> None:
    """Prompt 0 has rewards 1, 0, 1. No other prompt has two judged samples."""
    rows = batch()
    found = group_advantage(rows)
    mean, deviation = 2 / 3, math.sqrt(2 / 9)
    expected = {0: (1 - mean) / deviation, 1: (0 - mean) / deviation, 2: (1 - mean) / deviation}
    for row in range(len(rows.on_T)):
        of_sample = expected.get(int(rows.sample_index_T[row]), 0.0)
        assert found[row] == pytest.approx(of_sample if rows.on_T[row] else 0.0, abs=1e-13)


@pytest.mark.parametrize("rewards", [(1.0,) * 7, (0.0,) * 7, (math.nan,) * 7, (0.1,) * 7])
def test_a_group_with_equal_rewards_has_no_advantage(rewards: tuple[float, ...]) -> None:
    assert not group_advantage(replace(batch(), reward_S=np.array(rewards))).any()


def test_a_group_whose_returns_are_equal_has_no_advantage() -> None:
    rows = batch()
    rows = replace(rows, teacher_logp_T=rows.old_logp_T - 0.3)
    found = mixed_return(rows, mixing=0.9, future_mean=False, normalise=True)
    assert not found.any()


def test_a_teacher_that_differs_only_by_rounding_gives_no_advantage() -> None:
    rows = batch()
    rows = replace(rows, teacher_logp_T=rows.old_logp_T.astype(np.float32).astype(np.float64))
    assert (rows.teacher_logp_T != rows.old_logp_T)[rows.on_T].any()
    assert not mixed_return(rows, mixing=0.9, future_mean=True, normalise=True).any()


def test_a_group_of_a_single_token_has_no_advantage() -> None:
    rows = batch()
    rows = replace(rows, on_T=rows.on_T & (rows.sample_index_T == 1))
    assert rows.on_T.sum() == 1
    assert not mixed_return(rows, mixing=0.9, future_mean=True, normalise=True).any()


def test_a_normalised_group_has_mean_zero_and_standard_deviation_one() -> None:
    rows = batch(5)
    found = mixed_return(rows, mixing=0.9, future_mean=True, normalise=True)
    prompt_T = rows.prompt_index_S[rows.sample_index_T]
    for prompt in set(PROMPTS):
        group = found[(prompt_T == prompt) & rows.on_T]
        assert group.mean() == pytest.approx(0.0, abs=1e-12) and group.std() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("objective", "progress", "name"),
    [
        (EntropyOpdObjective(fraction=0.3), 0.0, "most_uncertain"),
        (ReopoldObjective(stages=2, switch_at=0.5, entropy_fraction=0.3), 0.5, "most_uncertain"),
        (TopdObjective(), 0.0, "mixed_return"),
        (IwOpdObjective(), 0.0, "history_weight"),
        (KdrlObjective(), 0.0, "group_advantage"),
        (RladObjective(), 0.0, "group_advantage"),
        (ReopoldObjective(stages=2, switch_at=0.5), 0.49, None),
        (ReopoldObjective(), 0.9, None),
        (ExopdObjective(), 0.0, None),
        (VopdObjective(), 0.0, None),
        (PowerOpdObjective(), 0.0, None),
        (RethinkingObjective(), 0.0, None),
        (OpdObjective(), 0.0, None),
        (TropdObjective(), 0.0, None),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_each_objective_gets_its_statistic_with_its_own_constants(
    objective: object, progress: float, name: str | None
) -> None:
    statistic = statistic_of(objective, progress)  # type: ignore[arg-type]
    if name is None:
        assert statistic is None
        return
    assert objective.needs_statistic  # type: ignore[arg-type]
    assert statistic is not None
    np.testing.assert_array_equal(statistic(batch()), STATISTICS[name](batch()))
