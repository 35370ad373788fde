"""Core attention for the CPU platform: causal, grouped queries, packed samples of any lengths, context parallel.

It is slow at long context: with context parallelism it gathers K and V and uses one dense mask. Invariant: the result
equals causal attention inside each sample, whatever the packing and the number of context ranks.

Legend: P positions on this context rank, H heads, G key/value heads, E head width.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tropd_mcore.data.packing import context_positions


class CpuAttention(MegatronModule):
    """Takes the input of Megatron's DotProductAttention, and also packed (`thd`) and context-parallel input."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert config.attention_dropout == 0.0 and not attention_dropout, "attention dropout is not implemented"
        assert config.window_size is None, "sliding windows are not implemented"
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention.

        Packed: [P, H, E] with [P, G, E] -> [P, H * E]. Otherwise [P, B, H, E] with [P, B, G, E] -> [P, B, H * E].
        """
        assert attention_mask is None and attention_bias is None, "the mask follows from the packing"
        cp_size = self.cp_group.size()
        if packed_seq_params is None:
            boundaries = [0, query.shape[0] * cp_size]
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        else:
            boundaries = packed_seq_params.cu_seqlens_q.tolist()
            query, key, value = (x.permute(1, 0, 2).unsqueeze(0) for x in (query, key, value))
        attend = _attend_locally if cp_size == 1 else self._attend_across_context
        out = attend(query, key, value, boundaries, self.scale)
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out if packed_seq_params is None else out.squeeze(1)

    def _attend_across_context(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], scale: float
    ) -> Tensor:
        """Return [B, H, P, E]: gather K and V of all context ranks, then mask by sample and position.

        The dense mask has P rows and one column per position of all context ranks.
        """
        key, value = (_gather_positions(x, self.cp_group) for x in (key, value))
        size, rank = self.cp_group.size(), self.cp_group.rank()
        sample_of, place_of = _places(boundaries, size, rank)
        ranks = [_places(boundaries, size, other) for other in range(size)]
        key_sample = torch.cat([sample for sample, _ in ranks])
        key_place = torch.cat([place for _, place in ranks])
        allowed = (sample_of[:, None] == key_sample) & (key_place <= place_of[:, None])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=True)


def _attend_locally(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], scale: float) -> Tensor:
    """Return [B, H, P, E]: one causal call per sample, which needs no mask and does no work between samples."""
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        for start, stop in pairwise(boundaries)
        if stop > start
    ]
    return torch.cat(outputs, dim=2)


def _gather_positions(x: Tensor, group: Any) -> Tensor:
    """[B, G, P, E] of this rank -> [B, G, cp * P, E]. Backward sums all ranks' gradients of this rank's positions."""
    gathered = gather_from_sequence_parallel_region(
        x.permute(2, 0, 1, 3).contiguous(), tensor_parallel_output_grad=True, group=group
    )
    return gathered.permute(1, 2, 0, 3)


def _places(boundaries: list[int], size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return (sample, position in the sample) of each position that a context rank holds, int64 [P] each."""
    starts = np.asarray(boundaries, dtype=np.int32)
    positions = context_positions(starts, size, rank)
    samples = np.searchsorted(starts, positions, side="right") - 1
    return torch.from_numpy(samples), torch.from_numpy(positions - starts[samples])
