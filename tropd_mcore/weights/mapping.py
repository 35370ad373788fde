"""Builds the shards of one Megatron parameter from Hugging Face tensors, and back, for any tensor-parallel size.

A shard is a concatenation of slices of Hugging Face tensors (`pieces`), plus zero rows of vocabulary padding. Import
(`to_mcore_shard`) and export (`to_hf`) use the same `pieces` and compute nothing, so a round trip is byte-equal. This
module does not read files (`hf_folder`), list a family's parameters (`families`) or use process groups. Invariant: for
a parameter that is split, the shards of all ranks together hold every element exactly once.

Example: 4 query heads, 2 key/value heads, 2 tensor ranks. Megatron interleaves the QKV rows by key/value group, so the
whole projection is [q0 q1 k0 v0 | q2 q3 k1 v1], and each rank holds one side of the bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import Architecture


class Split(Enum):
    """How tensor parallelism shards a parameter."""

    REPLICATED = "the same tensor on every rank"
    COLUMN = "rows in equal parts (outputs of a linear layer)"
    ROW = "columns in equal parts (inputs of a linear layer)"
    VOCAB = "rows in equal parts of the padded vocabulary"
    QKV = "rows in equal parts, after query, key and value rows are interleaved by key/value group"
    GATE_UP = "each rank has its part of the gate rows, then its part of the up rows"


@dataclass(frozen=True)
class Rule:
    """Maps one Megatron parameter to Hugging Face tensors. `{i}` in a name is the layer index in the whole model."""

    mcore_names: tuple[str, ...]
    """Names of the parameter: one entry per layer spec with a name of its own (local modules, Transformer Engine)."""
    hf_names: tuple[str, ...]
    """Hugging Face tensors of the parameter: one tensor, or (query, key, value), or (gate, up)."""
    hf_shapes: tuple[tuple[int, ...], ...]
    split: Split
    exported: bool = True
    """False for the output layer of a tied model, which is a copy of the embedding on the last pipeline stage."""

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.mcore_names[0]

    def at_layer(self, index: int) -> Rule:
        """Return this rule with `{i}` replaced by `index`."""
        return replace(
            self,
            mcore_names=tuple(name.replace("{i}", str(index)) for name in self.mcore_names),
            hf_names=tuple(name.replace("{i}", str(index)) for name in self.hf_names),
        )


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of the Hugging Face tensor `rule.hf_names[source]`; columns for Split.ROW."""

    source: int
    start: int
    stop: int


class Sliceable(Protocol):
    """A tensor, or a lazy view of a tensor in a file."""

    def __getitem__(self, index: Any) -> Tensor: ...


def pieces(rule: Rule, arch: Architecture, *, tp_rank: int, tp_size: int, padded_vocab: int) -> list[Piece]:
    """Return the slices of Hugging Face tensors that rank `tp_rank` of `tp_size` concatenates, in order.

    Raises ModelError if a size does not divide by `tp_size`.
    """
    dim = 1 if rule.split is Split.ROW else 0
    lengths = [shape[dim] for shape in rule.hf_shapes]
    if rule.split is Split.REPLICATED:
        return [Piece(0, 0, lengths[0])]
    if rule.split is Split.VOCAB:
        # Shards divide the padded vocabulary. Stored rows may end earlier, so the last shards can be short or empty.
        width = _part(padded_vocab, tp_size, rule)
        start, stop = (min(bound, lengths[0]) for bound in (tp_rank * width, (tp_rank + 1) * width))
        return [Piece(0, start, stop)] if stop > start else []
    if rule.split is Split.GATE_UP:
        # Not a plain row split of [gate; up]: rank r needs its rows of both, because SwiGLU multiplies them locally.
        width = _part(lengths[0], tp_size, rule)
        return [Piece(source, tp_rank * width, (tp_rank + 1) * width) for source in (0, 1)]
    # QKV, COLUMN and ROW: put the whole parameter in Megatron's order, then take an equal window of it.
    whole = _interleaved(arch) if rule.split is Split.QKV else [Piece(0, 0, lengths[0])]
    width = _part(sum(lengths), tp_size, rule)
    return _window(whole, tp_rank * width, (tp_rank + 1) * width)


def to_mcore_shard(
    rule: Rule,
    hf_tensors: Mapping[str, Sliceable],
    arch: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
) -> Tensor:
    """Return the shard of rank `tp_rank` in the dtype of `hf_tensors`. Reads only the slices that it needs.

    Shape: the concatenated Hugging Face tensors, divided by tp_size along the split dim. Vocabulary shards are padded
    with zero rows to padded_vocab / tp_size.
    """
    parts = []
    for piece in pieces(rule, arch, tp_rank=tp_rank, tp_size=tp_size, padded_vocab=padded_vocab):
        source = hf_tensors[rule.hf_names[piece.source]]
        span = slice(piece.start, piece.stop)
        parts.append(source[:, span] if rule.split is Split.ROW else source[span])
    if rule.split is Split.VOCAB:
        missing = padded_vocab // tp_size - sum(part.shape[0] for part in parts)
        like = parts[0] if parts else hf_tensors[rule.hf_names[0]][0:0]
        parts.append(like.new_zeros((missing, *like.shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if rule.split is Split.ROW else 0)


def to_hf(rule: Rule, shards: Sequence[Tensor], arch: Architecture) -> dict[str, Tensor]:
    """Return {Hugging Face name: full tensor} from the shards of all tensor ranks in rank order, on their device.

    This is the inverse of `to_mcore_shard`: padding rows are dropped, and a replicated parameter is taken from rank 0.
    Raises ModelError if the shapes of the shards do not match the rule.
    """
    if rule.split is Split.REPLICATED:
        _check_shape(rule, shards[0], rule.hf_shapes[0])
        return {rule.hf_names[0]: shards[0]}
    tp_size = len(shards)
    dim = 1 if rule.split is Split.ROW else 0
    padded_vocab = sum(shard.shape[0] for shard in shards)
    # Every element of `full` is written, because the pieces of all ranks cover each tensor exactly once.
    full = [torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device) for shape in rule.hf_shapes]
    for rank, shard in enumerate(shards):
        plan = pieces(rule, arch, tp_rank=rank, tp_size=tp_size, padded_vocab=padded_vocab)
        if rule.split is not Split.VOCAB:
            _check_shape(rule, shard, _shard_shape(rule, plan, dim))
        offset = 0
        for piece in plan:
            length = piece.stop - piece.start
            full[piece.source].narrow(dim, piece.start, length).copy_(shard.narrow(dim, offset, length))
            offset += length
    return dict(zip(rule.hf_names, full, strict=True))


def _interleaved(arch: Architecture) -> list[Piece]:
    """Return the QKV rows in Megatron's order: for each key/value group its queries, its key, its value."""
    queries = arch.num_heads // arch.num_kv_heads * arch.head_dim
    order = []
    for group in range(arch.num_kv_heads):
        order.append(Piece(0, group * queries, (group + 1) * queries))
        order += [Piece(source, group * arch.head_dim, (group + 1) * arch.head_dim) for source in (1, 2)]
    return order


def _window(whole: list[Piece], start: int, stop: int) -> list[Piece]:
    """Return the part [start, stop) of the concatenation of `whole`; pieces at its ends are shortened."""
    found, offset = [], 0
    for piece in whole:
        length = piece.stop - piece.start
        first, last = max(start - offset, 0), min(stop - offset, length)
        if first < last:
            found.append(Piece(piece.source, piece.start + first, piece.start + last))
        offset += length
    return found


def _part(length: int, tp_size: int, rule: Rule) -> int:
    if length % tp_size:
        raise ModelError(f"{rule.hf_names[0]}: {length} does not divide into {tp_size} tensor-parallel parts")
    return length // tp_size


def _shard_shape(rule: Rule, plan: list[Piece], dim: int) -> tuple[int, ...]:
    shape = list(rule.hf_shapes[0])
    shape[dim] = sum(piece.stop - piece.start for piece in plan)
    return tuple(shape)


def _check_shape(rule: Rule, shard: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(shard.shape) != expected:
        raise ModelError(f"{rule.mcore_names[0]}: expected shape {expected}, found {tuple(shard.shape)}")
