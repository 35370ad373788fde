"""Packing: every supervised token is a row exactly once, whatever the layout, and the slices tile the packs."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waits import on_device, waits
from tropd_mcore.config.schema import LossConfig
from tropd_mcore.data.groups import mini_batches, prompt_indices
from tropd_mcore.data.packing import pack
from tropd_mcore.data.placement import bin_pack
from tropd_mcore.data.supervision import IgnoredTokens, ignored_tokens
from tropd_mcore.errors import ConfigError
from tropd_mcore.types import Rollout

MAX_SAMPLE = 5 + 9 + 17
VOCABULARY = 20
"""Few ids, so that an ignored one occurs in most samples, and often more than once."""


def make_rollout(index: int, prompt: int, prefix: int, response: int, carries: bool) -> Rollout:
    generator = np.random.default_rng(index)

    def ids(count: int) -> np.ndarray:
        return generator.integers(1, VOCABULARY, count).astype(np.int32)

    return Rollout(
        sample_id=f"000003/p{index}/0",
        prompt_id=f"p{index}",
        prompt_ids=ids(prompt),
        prefix_ids=ids(prefix),
        response_ids=ids(response),
        rollout_logp=-generator.random(response, dtype=np.float32),
        trust_u=generator.random(response, dtype=np.float32),
        policy_version="3",
        finish_reason="stop",
        carries_prefix_loss=carries,
        answer=None,
    )


@st.composite
def steps_to_pack(draw):
    sizes = draw(
        st.lists(
            st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 17), st.booleans()), min_size=0, max_size=9
        )
    )
    dp, cp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    multiple = 2 * cp * tp
    smallest = -(-(MAX_SAMPLE + 2 * cp) // multiple) * multiple
    return {
        "rollouts": [make_rollout(index, *size) for index, size in enumerate(sizes)],
        "tokens_per_micro_batch": draw(st.integers(smallest, 4 * smallest)),
        "dp_size": dp,
        "cp_size": cp,
        "tp_size": tp,
        "micro_batch_multiple": draw(st.integers(1, 2)),
        "aggregation": draw(st.sampled_from(["token_mean", "sequence_mean"])),
        "prefix_denominator": draw(st.sampled_from(["joint", "separate"])),
        "ignored": IgnoredTokens(
            always=draw(st.frozensets(st.integers(1, VOCABULARY - 1), max_size=3)),
            first=draw(st.frozensets(st.integers(1, VOCABULARY - 1), max_size=3)),
        ),
        "mini_batches": draw(st.sampled_from([(), parts_of(len(sizes))])),
        "device": "cpu",
    }


def parts_of(samples: int) -> list[range]:
    """Three uneven mini-batches, some of which may be empty."""
    return [range(0, samples // 2), range(samples // 2, samples - samples // 5), range(samples - samples // 5, samples)]


def pack_all(case: dict) -> dict:
    """{(dp_rank, cp_rank): PackedStep} of every rank."""
    ranks = [(dp, cp) for dp in range(case["dp_size"]) for cp in range(case["cp_size"])]
    return {(dp, cp): pack(**case, dp_rank=dp, cp_rank=cp) for dp, cp in ranks}


def expected_rows(case: dict) -> Counter:
    """(sample, token index, on, off) of every supervised token, by a loop over tokens."""
    rows: Counter = Counter()
    for sample, rollout in enumerate(case["rollouts"]):
        prompt, prefix = len(rollout.prompt_ids), len(rollout.prefix_ids)
        seen: set[int] = set()
        for token in range(prompt, prompt + prefix + len(rollout.response_ids)):
            on = token >= prompt + prefix
            token_id = int(rollout.token_ids[token])
            first = on and token_id in case["ignored"].first and token_id not in seen
            if on:
                seen.add(token_id)
            if (on or rollout.carries_prefix_loss) and token_id not in case["ignored"].always and not first:
                rows[sample, token, on, not on] += 1
    return rows


def zigzag(length: int, cp_size: int, cp_rank: int) -> list[int]:
    """Positions of one sample that a context rank holds, by asking each position for its chunk."""
    chunk = length / (2 * cp_size)
    return [i for i in range(length) if cp_size == 1 or int(i // chunk) in (cp_rank, 2 * cp_size - 1 - cp_rank)]


@settings(max_examples=150, deadline=None)
@given(steps_to_pack())
def test_every_supervised_token_is_a_row_exactly_once_over_all_ranks(case):
    found: Counter = Counter()
    for packed in pack_all(case).values():
        for micro in packed.micro_batches:
            columns = (micro.sample_index_T, micro.token_index_T, micro.student_mask_T, micro.prefix_mask_T)
            found.update(zip(*(column.tolist() for column in columns), strict=True))
    expected = expected_rows(case)
    assert found == expected
    assert {packed.global_token_count for packed in pack_all(case).values()} == {expected.total()}


@settings(max_examples=100, deadline=None)
@given(steps_to_pack())
def test_each_row_predicts_its_token_and_has_its_sampler_values(case):
    for packed in pack_all(case).values():
        for micro in packed.micro_batches:
            for row in range(len(micro.rows_T)):
                rollout = case["rollouts"][micro.sample_index_T[row]]
                token = int(micro.token_index_T[row])
                start = len(rollout.prompt_ids) + len(rollout.prefix_ids)
                assert micro.target_ids_T[row] == rollout.token_ids[token]
                assert micro.input_ids_P[micro.rows_T[row]] == rollout.token_ids[token - 1]
                assert micro.position_ids_P[micro.rows_T[row]] == token - 1
                on = token >= start
                assert micro.rollout_logp_T[row] == (rollout.rollout_logp[token - start] if on else 0)
                assert micro.trust_u_T[row] == (rollout.trust_u[token - start] if on else 0)


@settings(max_examples=100, deadline=None)
@given(steps_to_pack())
def test_packs_have_one_length_and_context_slices_tile_them(case):
    ranks = pack_all(case)
    lengths = {packed.pack_length for packed in ranks.values()}
    counts = {len(packed.micro_batches) for packed in ranks.values()}
    assert len(lengths) == len(counts) == 1
    (pack_length,), (count,) = lengths, counts
    assert count >= 1 and count % case["micro_batch_multiple"] == 0
    assert pack_length % (2 * case["cp_size"] * case["tp_size"]) == 0
    assert pack_length <= case["tokens_per_micro_batch"]
    for dp_rank in range(case["dp_size"]):
        for index in range(count):
            parts = [ranks[dp_rank, cp].micro_batches[index] for cp in range(case["cp_size"])]
            boundaries = parts[0].cu_seqlens.tolist()
            assert boundaries[0] == 0 and boundaries[-1] == pack_length and boundaries == sorted(set(boundaries))
            assert parts[0].max_seqlen == max(np.diff(boundaries))
            seen = np.zeros(pack_length, dtype=int)
            for cp_rank, part in enumerate(parts):
                assert part.cu_seqlens.tolist() == boundaries
                expected = [
                    (start, position)
                    for start, stop in pairwise(boundaries)
                    for position in zigzag(stop - start, case["cp_size"], cp_rank)
                ]
                assert part.position_ids_P.tolist() == [position for _, position in expected]
                assert part.rows_T.tolist() == sorted(set(part.rows_T.tolist()))
                seen[[start + position for start, position in expected]] += 1
            assert (seen == 1).all()


def means_of_ones_and_twos(case: dict) -> list[float]:
    """For each mini-batch: sum of weight * value over its number of rows, with value 1 on on rows and 2 on off rows,
    scaled by sample + 1."""
    ranks = list(pack_all(case).values())
    means = []
    for part in range(len(ranks[0].mini_batches)):
        total, count = 0.0, 0
        for packed in ranks:
            for micro in packed.micro_batches[packed.mini_batches[part]]:
                value = (micro.student_mask_T.double() + 2 * micro.prefix_mask_T.double()) * (micro.sample_index_T + 1)
                total += float((micro.weight_T.double() * value).sum())
                count += len(micro.rows_T)
        means.append(total / max(count, 1))
    return means


@settings(max_examples=100, deadline=None)
@given(steps_to_pack())
def test_row_weights_turn_the_sum_over_each_mini_batch_into_the_configured_mean(case):
    rows = expected_rows(case)
    found = means_of_ones_and_twos(case)
    parts = case["mini_batches"] or [range(len(case["rollouts"]))]
    assert len(found) == len(parts)
    for part, mean in zip(parts, found, strict=True):
        on = [[1.0 * (s + 1) for row in rows if row[0] == s and row[2]] for s in part]
        off = [[2.0 * (s + 1) for row in rows if row[0] == s and row[3]] for s in part]
        joint = [both[0] + both[1] for both in zip(on, off, strict=True)]
        expected = 0.0
        for samples in [joint] if case["prefix_denominator"] == "joint" else [on, off]:
            samples = [values for values in samples if values]
            if samples and case["aggregation"] == "sequence_mean":
                expected += sum(sum(values) / len(values) for values in samples) / len(samples)
            elif samples:
                expected += sum(map(sum, samples)) / sum(map(len, samples))
        assert mean == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(steps_to_pack())
def test_no_pack_has_samples_of_two_mini_batches(case):
    parts = case["mini_batches"] or [range(len(case["rollouts"]))]
    for packed in pack_all(case).values():
        assert [index for part in packed.mini_batches for index in range(len(packed.micro_batches))[part]] == list(
            range(len(packed.micro_batches))
        )
        for part, samples in zip(packed.mini_batches, parts, strict=True):
            for micro in packed.micro_batches[part]:
                assert set(micro.sample_index_T.tolist()) <= set(samples)


def of_prompts(*names: str) -> list[Rollout]:
    made = [make_rollout(index, 3, 0, 5, False) for index in range(len(names))]
    return [dataclasses.replace(rollout, prompt_id=name) for rollout, name in zip(made, names, strict=True)]


def test_mini_batches_are_whole_groups_in_the_order_of_the_samples():
    rollouts = of_prompts("a", "a", "b", "b", "b", "c", "d", "d", "e", "a")
    assert mini_batches(rollouts, 1) == [range(0, 10)]
    assert mini_batches(rollouts, 2) == [range(0, 6), range(6, 10)]
    assert mini_batches(rollouts, 4) == [range(0, 2), range(2, 6), range(6, 8), range(8, 10)]
    assert mini_batches(rollouts, 6) == [range(0, 2), range(2, 5), range(5, 6), range(6, 8), range(8, 9), range(9, 10)]
    with pytest.raises(ConfigError, match=r"mini_batches = 7 but the step has 6 prompts"):
        mini_batches(rollouts, 7)


def test_all_samples_of_a_repeated_prompt_are_one_group():
    assert prompt_indices(of_prompts("b", "b", "a", "b")).tolist() == [1, 1, 0, 1]


def test_tokens_to_ignore_are_looked_up_and_every_unknown_one_is_named():
    known = {"<": 4, "think": 9}
    found = ignored_tokens(LossConfig(ignore_tokens=("<",), ignore_first_of=("think", "<")), known.get)
    assert found == IgnoredTokens(always=frozenset({4}), first=frozenset({4, 9}))
    with pytest.raises(ConfigError) as caught:
        ignored_tokens(LossConfig(ignore_tokens=("<", "x y"), ignore_first_of=("z",)), known.get)
    assert [problem.split(" is not")[0] for problem in caught.value.problems] == [
        "loss.ignore_tokens: 'x y'",
        "loss.ignore_first_of: 'z'",
    ]


def options(**changes) -> dict:
    base = {
        "tokens_per_micro_batch": 64,
        "dp_size": 1,
        "dp_rank": 0,
        "cp_size": 1,
        "cp_rank": 0,
        "tp_size": 1,
        "aggregation": "token_mean",
        "prefix_denominator": "joint",
        "device": "cpu",
    }
    return base | changes


def test_the_token_mean_gives_every_row_a_weight_of_exactly_one():
    packed = pack([make_rollout(i, 3, 4, 11, i == 0) for i in range(3)], **options())
    for micro in packed.micro_batches:
        assert torch.equal(micro.weight_T, torch.ones_like(micro.weight_T))


def test_a_sample_over_the_budget_names_the_key_and_the_size_it_needs():
    with pytest.raises(ConfigError, match=r"batch\.tokens_per_micro_batch = 16 is too small .* of 18 tokens"):
        pack([make_rollout(0, 3, 4, 11, True)], **options(tokens_per_micro_batch=16))
    with pytest.raises(ConfigError, match="set it to at least 24"):
        pack([make_rollout(0, 3, 4, 11, True)], **options(tokens_per_micro_batch=18, cp_size=2, tp_size=2))
    pack([make_rollout(0, 3, 4, 11, True)], **options(tokens_per_micro_batch=24, cp_size=2, tp_size=2))


def test_a_rank_without_samples_gets_packs_of_padding_without_rows():
    packed = pack([make_rollout(0, 3, 0, 5, False)], **options(dp_size=2, dp_rank=1))
    (micro,) = packed.micro_batches
    assert packed.pack_length == 8 and micro.cu_seqlens.tolist() == [0, 8]
    assert micro.rows_T.numel() == 0 and micro.target_ids_T.dtype == torch.int64


def test_samples_are_spread_evenly_over_the_data_ranks():
    lengths = [10] * 12
    placed = bin_pack(lengths, budget=90, ranks=4)
    assert [sum(map(len, rank)) for rank in placed] == [3, 3, 3, 3]


def test_placement_falls_back_to_first_fit_if_spreading_exceeds_the_budget():
    lengths = [6, 6, 4, 4, 4]  # two packs of 12 hold them only as 6+6 and 4+4+4
    assert bin_pack(lengths, budget=12, ranks=1) == [[[0, 1], [2, 3, 4]]]


def test_placement_depends_only_on_the_lengths():
    lengths = [7, 3, 9, 9, 1, 4, 4, 2]
    assert bin_pack(lengths, budget=12, ranks=2) == bin_pack(list(lengths), budget=12, ranks=2)


def test_the_samples_of_a_rank_are_found_with_one_wait_for_the_device():
    """The liar: a loop over a tensor, which waits once per row."""
    rollouts = [make_rollout(index, 3, 0, 5, False) for index in range(9)]
    packed = pack(rollouts, **options(tokens_per_micro_batch=16, dp_size=2))
    assert len(packed.micro_batches) > 1
    moved = dataclasses.replace(
        packed,
        micro_batches=[
            dataclasses.replace(each, sample_index_T=on_device(each.sample_index_T)) for each in packed.micro_batches
        ],
    )
    expected = {index for each in packed.micro_batches for index in each.sample_index_T.tolist()}
    assert moved.samples == expected and len(expected) > 3
    assert waits() == {"cpu": 1}
    assert {int(row) for each in moved.micro_batches for row in each.sample_index_T} == expected
    assert sum(waits().values()) > len(expected), "a loop is noticed"
    assert dataclasses.replace(packed, micro_batches=[]).samples == set()
