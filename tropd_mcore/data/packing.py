"""Packs the rollouts of one step: whole samples into packs, packs into this rank's micro-batches.

This module neither scores nor computes the loss. A row is a position whose prediction has a loss. Invariants: the plan
is a pure function of the rollouts and the layout, so every rank computes the same plan. A supervised token is a row of
exactly one (data, context) rank. The shift by one is done here, before the context-parallel split. Every pack of the
step has the same length on every rank. No pack has samples of two optimizer steps.

Legend: P positions on this context rank, T rows on this rank, N rows of the whole step, S samples of a pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from tropd_mcore.data.placement import bin_pack
from tropd_mcore.data.supervision import IgnoredTokens, Supervised, supervised
from tropd_mcore.errors import ConfigError
from tropd_mcore.types import MicroBatch, Rollout

PADDING_ID = 0
"""Token id of padding positions. Any valid id works, because nothing attends to them and no row reads them."""

NOTHING_IGNORED = IgnoredTokens()


@dataclass(frozen=True)
class PackedStep:
    """One data-parallel rank's part of a step."""

    micro_batches: list[MicroBatch]
    pack_length: int
    """Positions of each pack over all context ranks; the same on all ranks of the step."""
    global_token_count: int
    """Rows of the step over all ranks: N, the denominator of a single update if the teacher scored every sample."""
    mini_batches: list[slice]
    """Range of micro-batches of each mini-batch, in order."""

    @property
    def samples(self) -> set[int]:
        """Indices of the rollouts that have rows in these packs. Waits for the device once."""
        if not self.micro_batches:
            return set()
        found = torch.cat([micro_batch.sample_index_T for micro_batch in self.micro_batches])
        return set(np.unique(found.cpu().numpy()).tolist())


@dataclass(frozen=True)
class RowWeights:
    """Factor of the loss of on rows (response) and off rows (prefix), per rollout. The trainer divides the sum by N."""

    on: npt.NDArray[np.float64]
    off: npt.NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[RowWeights]) -> RowWeights:
        """Concatenate the weights of consecutive parts."""
        return cls(np.concatenate([part.on for part in parts]), np.concatenate([part.off for part in parts]))


def pack(
    rollouts: Sequence[Rollout],
    *,
    tokens_per_micro_batch: int,
    dp_size: int,
    dp_rank: int,
    cp_size: int,
    cp_rank: int,
    tp_size: int,
    aggregation: str,
    prefix_denominator: str,
    device: torch.device | str,
    micro_batch_multiple: int = 1,
    mini_batches: Sequence[range] = (),
    ignored: IgnoredTokens = NOTHING_IGNORED,
) -> PackedStep:
    """Pack the rollouts of a step and return the micro-batches of one (data, context) rank.

    `tokens_per_micro_batch` bounds the length of a pack over all context ranks. If cp_size > 1, each sample is padded
    to a multiple of 2 * cp_size (zigzag slices). One padding sample fills each pack up to `pack_length`, a multiple of
    2 * cp_size * tp_size. Every data rank gets the same number of packs, a multiple of `micro_batch_multiple` (the
    pipeline size for interleaved schedules). Packs may be empty (padding only, T = 0). `mini_batches` are consecutive
    ranges of all rollouts; each is packed and weighted separately (empty: all rollouts are one mini-batch). `ignored`
    tokens are no rows. Raises ConfigError if the longest sample does not fit. Source: docs/method.md, 7.
    """
    assert all(len(rollout.prompt_ids) > 0 for rollout in rollouts), "a response token needs a token before it"
    sample_multiple = 2 * cp_size if cp_size > 1 else 1
    multiple = pack_multiple(cp_size, tp_size)
    lengths = [_round_up(len(rollout.token_ids), sample_multiple) for rollout in rollouts]
    budget = tokens_per_micro_batch // multiple * multiple
    _check_longest(rollouts, lengths, budget, multiple, tokens_per_micro_batch)

    mini_batches = mini_batches or [range(len(rollouts))]
    assert [sample for part in mini_batches for sample in part] == list(range(len(rollouts))), (
        "mini-batches do not cover the rollouts"
    )
    tokens = [supervised(rollout, ignored) for rollout in rollouts]
    packs = [
        _place_part(part, lengths, budget=budget, ranks=dp_size, multiple=micro_batch_multiple) for part in mini_batches
    ]
    longest_pack = max(
        sum(lengths[sample] for sample in samples) for part in packs for rank in part for samples in rank
    )
    pack_length = _round_up(max(longest_pack, 1), multiple)
    weights = [
        row_weights([tokens[sample] for sample in part], aggregation=aggregation, prefix_denominator=prefix_denominator)
        for part in mini_batches
    ]
    step = _Step(rollouts, tokens, RowWeights.joined(weights), lengths, pack_length)
    mine = [part[dp_rank] for part in packs]
    micro_batches = [step.micro_batch(samples, cp_size, cp_rank).on(device) for part in mine for samples in part]
    ends = np.cumsum([0, *map(len, mine)]).tolist()
    count = sum(int(mask.response.sum() + mask.prefix.sum()) for mask in tokens)
    return PackedStep(micro_batches, pack_length, count, [slice(*edges) for edges in pairwise(ends)])


def _place_part(part: range, lengths: list[int], *, budget: int, ranks: int, multiple: int) -> list[list[list[int]]]:
    """`bin_pack` of the samples of one mini-batch, as indices into the rollouts of the step."""
    placed = bin_pack([lengths[sample] for sample in part], budget=budget, ranks=ranks, multiple=multiple)
    return [[[part[sample] for sample in samples] for samples in rank] for rank in placed]


def row_weights(tokens: Sequence[Supervised], *, aggregation: str, prefix_denominator: str) -> RowWeights:
    """Return the factors that turn `sum / N` into the configured mean, given each sample's supervised tokens.

    `token_mean` + `joint`: 1. `separate`: the mean over on rows plus the mean over off rows. `sequence_mean`: the mean
    over samples (with rows) of the mean over their rows. Counts are taken before rows are left out because the teacher
    failed on them. Source: docs/method.md, 7.
    """
    on_counts = np.array([mask.response.sum() for mask in tokens], dtype=np.float64)
    off_counts = np.array([mask.prefix.sum() for mask in tokens], dtype=np.float64)
    parts = [on_counts, off_counts] if prefix_denominator == "separate" else [on_counts + off_counts]
    rows = float(on_counts.sum() + off_counts.sum())
    factors = []
    for counts in parts:
        if aggregation == "sequence_mean":
            samples = np.count_nonzero(counts)
            factors.append(rows / np.maximum(samples * counts, 1))
        else:
            factors.append(np.full(len(tokens), rows / max(counts.sum(), 1.0)))
    return RowWeights(on=factors[0], off=factors[-1])


def pack_multiple(cp_size: int, tp_size: int) -> int:
    """Return the number that divides every pack length: two zigzag slices per context rank, split over tensor ranks."""
    return 2 * cp_size * tp_size


def context_positions(cu_seqlens: npt.NDArray[np.int32], cp_size: int, cp_rank: int) -> npt.NDArray[np.int64]:
    """Return the positions of a pack that one context rank holds, int64 [P].

    Each sample is cut into 2 * cp_size equal slices. Rank r holds slices r and 2 * cp_size - 1 - r (zigzag), the order
    that Megatron's rotary embedding and packed attention expect.
    """
    if cp_size == 1:
        return np.arange(cu_seqlens[-1], dtype=np.int64)
    slices = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        length, remainder = divmod(stop - start, 2 * cp_size)
        assert remainder == 0, f"sample of {stop - start} positions is no multiple of 2 * cp = {2 * cp_size}"
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            slices.append(np.arange(start + index * length, start + (index + 1) * length, dtype=np.int64))
    return np.concatenate(slices)


def one_sample(
    tokens: npt.NDArray[np.int64], rows: int, device: torch.device, *, cp_size: int = 1, cp_rank: int = 0
) -> MicroBatch:
    """Return this context rank's part of a pack with one sample, whose first `rows` positions are rows.

    `tokens`, int64 [pack length + 1]: the tokens of the pack, and the token that its last position would predict.
    """
    pack_length = len(tokens) - 1
    boundaries = np.array([0, pack_length], dtype=np.int32)
    positions = context_positions(boundaries, cp_size, cp_rank)
    rows_T = np.flatnonzero(positions < rows)
    predicted_T = positions[rows_T] + 1
    zeros = torch.zeros(len(rows_T), dtype=torch.int64, device=device)
    return MicroBatch(
        input_ids_P=torch.from_numpy(tokens[positions]).to(device),
        position_ids_P=torch.from_numpy(positions).to(device),
        cu_seqlens=torch.from_numpy(boundaries).to(device),
        max_seqlen=pack_length,
        rows_T=torch.from_numpy(rows_T).to(device),
        target_ids_T=torch.from_numpy(tokens[predicted_T]).to(device),
        student_mask_T=torch.ones_like(zeros, dtype=torch.bool),
        prefix_mask_T=torch.zeros_like(zeros, dtype=torch.bool),
        rollout_logp_T=zeros.float(),
        trust_u_T=zeros.float(),
        weight_T=torch.ones_like(zeros, dtype=torch.float32),
        sample_index_T=zeros,
        token_index_T=torch.from_numpy(predicted_T).to(device),
    )


@dataclass
class _PackArrays:
    """Host arrays of one pack over all context ranks. Every column is indexed by position."""

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    target_ids: npt.NDArray[np.int64]
    on: npt.NDArray[np.bool_]
    off: npt.NDArray[np.bool_]
    rollout_logp: npt.NDArray[np.float32]
    trust_u: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    sample_index: npt.NDArray[np.int64]
    token_index: npt.NDArray[np.int64]

    @classmethod
    def padding(cls, length: int) -> _PackArrays:
        """Padding only: no position is supervised."""
        return cls(
            input_ids=np.full(length, PADDING_ID, dtype=np.int64),
            position_ids=np.zeros(length, dtype=np.int64),
            target_ids=np.zeros(length, dtype=np.int64),
            on=np.zeros(length, dtype=np.bool_),
            off=np.zeros(length, dtype=np.bool_),
            rollout_logp=np.zeros(length, dtype=np.float32),
            trust_u=np.zeros(length, dtype=np.float32),
            weight=np.zeros(length, dtype=np.float32),
            sample_index=np.zeros(length, dtype=np.int64),
            token_index=np.zeros(length, dtype=np.int64),
        )

    def write(self, start: int, index: int, rollout: Rollout, tokens: Supervised, weights: RowWeights) -> None:
        """Write one sample to positions [start, start + length). The token at `start + i` predicts token i + 1."""
        token_ids = rollout.token_ids
        length = len(token_ids)
        prefix_start = len(rollout.prompt_ids)
        response_start = prefix_start + len(rollout.prefix_ids)
        self.input_ids[start : start + length] = token_ids
        predicting = slice(start, start + length - 1)
        self.target_ids[predicting] = token_ids[1:]
        self.token_index[predicting] = np.arange(1, length)
        self.sample_index[predicting] = index
        on = slice(start + response_start - 1, start + length - 1)
        self.on[on] = tokens.response
        self.rollout_logp[on] = rollout.rollout_logp
        self.trust_u[on] = rollout.trust_u
        self.weight[on] = weights.on[index]
        off = slice(start + prefix_start - 1, start + response_start - 1)
        self.off[off] = tokens.prefix
        self.weight[off] = weights.off[index]


@dataclass(frozen=True)
class _HostMicroBatch:
    arrays: _PackArrays
    cu_seqlens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]

    def on(self, device: torch.device | str) -> MicroBatch:
        """Take this context rank's positions, keep the supervised ones as rows, and copy to the device."""
        arrays = self.arrays
        supervised = (arrays.on | arrays.off)[self.positions]
        at = self.positions[supervised]

        def tensor(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        return MicroBatch(
            input_ids_P=tensor(arrays.input_ids[self.positions]),
            position_ids_P=tensor(arrays.position_ids[self.positions]),
            cu_seqlens=tensor(self.cu_seqlens),
            max_seqlen=int(np.diff(self.cu_seqlens).max()),
            rows_T=tensor(np.flatnonzero(supervised).astype(np.int64)),
            target_ids_T=tensor(arrays.target_ids[at]),
            student_mask_T=tensor(arrays.on[at]),
            prefix_mask_T=tensor(arrays.off[at]),
            rollout_logp_T=tensor(arrays.rollout_logp[at]),
            trust_u_T=tensor(arrays.trust_u[at]),
            weight_T=tensor(arrays.weight[at]),
            sample_index_T=tensor(arrays.sample_index[at]),
            token_index_T=tensor(arrays.token_index[at]),
        )


@dataclass(frozen=True)
class _Step:
    """All samples of a step, one entry per sample, and the length of its packs."""

    rollouts: Sequence[Rollout]
    tokens: list[Supervised]
    weights: RowWeights
    lengths: list[int]
    pack_length: int

    def micro_batch(self, samples: list[int], cp_size: int, cp_rank: int) -> _HostMicroBatch:
        """The pack of `samples`, filled up by one padding sample."""
        sizes = [self.lengths[sample] for sample in samples]
        if (padding := self.pack_length - sum(sizes)) > 0:
            sizes.append(padding)
        cu_seqlens = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        arrays = _PackArrays.padding(self.pack_length)
        arrays.position_ids[:] = np.concatenate([np.arange(size) for size in sizes])
        for start, sample in zip(cu_seqlens, samples, strict=False):  # the padding sample has no rollout
            arrays.write(int(start), sample, self.rollouts[sample], self.tokens[sample], self.weights)
        return _HostMicroBatch(arrays, cu_seqlens, context_positions(cu_seqlens, cp_size, cp_rank))


def _check_longest(
    rollouts: Sequence[Rollout], lengths: list[int], budget: int, multiple: int, configured: int
) -> None:
    if not lengths or (longest := max(lengths)) <= budget:
        return
    rollout = rollouts[lengths.index(longest)]
    parts = (
        f"{len(rollout.prompt_ids)} prompt + {len(rollout.prefix_ids)} prefix + {len(rollout.response_ids)} response"
    )
    raise ConfigError(
        [
            f"batch.tokens_per_micro_batch = {configured} is too small for sample {rollout.sample_id} of "
            f"{len(rollout.token_ids)} tokens ({parts}); set it to at least {_round_up(longest, multiple)}, "
            "or lower rollout.max_new_tokens"
        ]
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
