"""The two passes over the logits by Triton kernels: one launch per pass, each reading the logits once.

It does not run on a CPU, except under Triton's interpreter (TRITON_INTERPRET=1), which runs the kernels in numpy to
check them. No temporary memory of the logits' size, no host sync. The first call compiles; later calls can be captured
in a CUDA graph.

Shapes as in `backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import RowGradient
from tropd_mcore.kernel.shard import Scaling, VocabShard, math_dtype
from tropd_mcore.sentinels import LEAST_LOGIT

BLOCK_COLUMNS = 4096
"""Columns that a program holds in registers at a time: the widest block that compiles for sm_90 to at most 100
registers per thread, so that two programs share an SM. Their loads in flight (2 x 16 KiB in float32) cover bandwidth x
latency of an H200's SM (4.8 TB/s x 0.7 us / 132 = 25 KB). Computed, not measured."""
WARPS = 8
"""Warps of a program: 16 columns of a block per thread, in loads of 16 bytes."""
MERGE_PAIRS = 2048
"""Pairs of support slots that are compared at a time to find equal ids: 8 per thread."""


class TritonBackend:
    """CUDA tensors: logits in bfloat16, float16, float32 or float64 with contiguous columns, C and J from 0."""

    name = "triton"
    shrinks_in_place = True

    def __init__(self, *, block_columns: int = BLOCK_COLUMNS) -> None:
        """Raises ConfigError if triton is not installed. block_columns: a power of two."""
        assert block_columns & (block_columns - 1) == 0, f"a block of {block_columns} columns is no power of two"
        try:
            from triton import JITFunction

            from tropd_mcore.kernel import triton_kernels
        except ModuleNotFoundError as error:
            problem = f"loss.backend=triton needs the package {error.name}; install it or set loss.backend=eager"
            raise ConfigError([problem]) from error
        self._kernels = triton_kernels
        self._needs_cuda = isinstance(triton_kernels.write_gradient_kernel, JITFunction)
        self._block_columns = block_columns

    def stats_and_support(
        self, logits_CW: Tensor, ids_CJ: Tensor, shard: VocabShard, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        self._check(logits_CW)
        rows, slots = ids_CJ.shape
        stats_C3 = logits_CW.new_empty(rows, 3, dtype=math_dtype(logits_CW))
        owned_CJ = stats_C3.new_empty(rows, slots)
        if rows:
            self._kernels.stats_and_support_kernel[(rows,)](
                logits_CW,
                ids_CJ.contiguous(),
                stats_C3,
                owned_CJ,
                logits_CW.stride(0),
                shard.start,
                shard.width,
                shard.real_width,
                slots,
                TEMPERATURE=scaling.temperature,
                SOFTCAP=scaling.softcap,
                EMPTY_MAX=LEAST_LOGIT,
                BLOCK=self._block(shard.width),
                SLOT_BLOCK=_power_of_two(slots),
                num_warps=WARPS,
                num_stages=1,
            )
        return stats_C3, owned_CJ

    def write_gradient(
        self, logits_CW: Tensor, row: RowGradient, shard: VocabShard, scaling: Scaling, out_CW: Tensor
    ) -> None:
        """See `Backend`."""
        self._check(logits_CW)
        rows, slots = row.ids_CJ.shape
        assert out_CW.shape == logits_CW.shape and (out_CW.stride(1) == 1 or shard.width <= 1)
        assert row.grad_logp_CJ.dtype == math_dtype(logits_CW), f"gradients in {row.grad_logp_CJ.dtype}"
        if not rows:
            return
        slot_block = _power_of_two(slots)
        self._kernels.write_gradient_kernel[(rows,)](
            logits_CW,
            out_CW,
            row.ids_CJ.contiguous(),
            row.grad_logp_CJ.contiguous(),
            row.lse_C.contiguous(),
            row.entropy_C.contiguous(),
            row.grad_entropy_C.contiguous() if row.grad_entropy_C is not None else None,
            row.dense_CR.contiguous() if row.dense_CR is not None else None,
            row.live_C.to(torch.int8) if row.live_C is not None else None,
            logits_CW.stride(0),
            out_CW.stride(0),
            shard.start,
            shard.width,
            shard.real_width,
            slots,
            TEMPERATURE=scaling.temperature,
            SOFTCAP=scaling.softcap,
            MERGE=len(row.unique_run_lengths) > 1,
            BLOCK=self._block(shard.width),
            SLOT_BLOCK=slot_block,
            SLOT_TILE=min(slot_block, max(1, MERGE_PAIRS // slot_block)),
            num_warps=WARPS,
            num_stages=1,  # danger: loads of a later block must not pass this store, which may be over the logits
        )

    def _check(self, logits_CW: Tensor) -> None:
        assert logits_CW.stride(1) == 1 or logits_CW.shape[1] <= 1, "the columns of the logits are not contiguous"
        if self._needs_cuda and not logits_CW.is_cuda:
            found = logits_CW.device.type
            raise ConfigError(
                [f"loss.backend=triton needs CUDA tensors, found {found}; set loss.backend=auto or eager"]
            )

    def _block(self, width: int) -> int:
        return min(self._block_columns, _power_of_two(width))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(0, number - 1).bit_length()
