"""The two passes over the logits as Triton kernels, one program per row; launched by `triton_backend`.

Invariant: no atomics, and sums in a fixed order, so a second run gives the same bits. Importing this module needs
triton. Triton reads annotations as objects, so this module does not postpone their evaluation.

Names: z logit, z' scaled logit (see `Scaling`). Shapes of a row: W columns of the vocabulary shard, the first R of them
real, J support ids. The dtype of the statistics (float32, or float64) is that of the mathematics.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from tropd_mcore import sentinels

LEAST_LOGIT = tl.constexpr(sentinels.LEAST_LOGIT)


@triton.jit
def stats_and_support_kernel(
    logits_ptr,
    ids_ptr,
    stats_ptr,
    support_ptr,
    logits_stride,
    shard_start,
    width,
    real_width,
    slots,
    TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EMPTY_MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
):
    """(m, s, u) of the real columns of a row, [3], and z' of the support ids that are in this shard, [J], else 0.

    From block to block it carries m as one number, and s and u as one number per lane, rescaled to the current m.
    """
    # m = max z', s = sum e^(z'-m), u = sum e^(z'-m) (z'-m), in one read of the row. If a block raises m to m_new, then
    # with c = m - m_new <= 0 and w = e^c the sums so far become
    #     s <- w s   and   u <- sum e^(z'-m_new) (z'-m_new) = w (u + c s).
    math = stats_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride

    # The support: logits of the ids that this shard owns.
    slot = tl.arange(0, SLOT_BLOCK)
    support_column, here = _columns_of(ids_ptr + row * slots, slot, slots, shard_start, real_width)
    # An impossible token keeps its -inf: a loss that needs its log-prob must not be finite.
    support = _scaled(tl.load(logits_ptr + support_column, mask=here, other=0.0).to(math), TEMPERATURE, SOFTCAP)
    tl.store(support_ptr + row * slots + slot, tl.where(here, support, 0.0), mask=slot < slots)

    # Pass 1: running maximum and rescaled sums. EMPTY_MAX is finite, so c * 0 of the first block is 0 and not NaN.
    top = tl.full((), EMPTY_MAX, math)
    sums = tl.zeros((BLOCK,), math)
    moments = tl.zeros((BLOCK,), math)
    for start in range(0, real_width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < real_width
        logit = _finite(tl.load(logits_ptr + column, mask=column < width, other=0.0).to(math))
        scaled = _scaled(logit, TEMPERATURE, SOFTCAP)
        new_top = tl.maximum(top, tl.max(tl.where(real, scaled, EMPTY_MAX), axis=0))
        change = top - new_top
        weight = tl.exp(change)
        shifted = tl.where(real, scaled - new_top, 0.0)
        exp = tl.where(real, tl.exp(shifted), 0.0)
        # u first: it needs the s of the old maximum.
        moments = weight * (moments + change * sums) + exp * shifted
        sums = weight * sums + exp
        top = new_top
    # Sum over the lanes. Every lane is at the same maximum.
    stats_ptr += row * 3
    tl.store(stats_ptr, top)
    tl.store(stats_ptr + 1, tl.sum(sums, axis=0))
    tl.store(stats_ptr + 2, tl.sum(moments, axis=0))


@triton.jit
def write_gradient_kernel(
    logits_ptr,
    out_ptr,
    ids_ptr,
    grad_logp_ptr,
    lse_ptr,
    entropy_ptr,
    grad_entropy_ptr,
    dense_ptr,
    live_ptr,
    logits_stride,
    out_stride,
    shard_start,
    width,
    real_width,
    slots,
    TEMPERATURE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    SLOT_TILE: tl.constexpr,
):
    """Write dL/dz of a row to `out_ptr`: the logits themselves, a narrower row over their first bytes, or other memory.

    grad_entropy_ptr, dense_ptr and live_ptr may be None. A row that is not live gets 0 whatever it holds. MERGE: an id
    may be in more than one slot.

    Why the output may lie over the logits: blocks ascend, so a block of the output covers only columns up to its own,
    and a barrier before its store waits until all threads have loaded those. The support's logits are read before the
    first store, and its complete gradient is stored, once per column, after the last.
    """
    # With G = sum_j g_j over the slots of all shards, this is the gradient of `RowGradient`:
    #     dL/dz'_v = -p_v (G + g_H (log p_v + H)) + dense_v + sum_j g_j [v = ids_j],   p_v = e^(z'_v - lse),
    # and dL/dz = dL/dz' dz'/dz. Rounding to the output's dtype comes once, after all terms are added.
    math = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    out_ptr += row * out_stride
    ids_ptr += row * slots
    grad_logp_ptr += row * slots
    # Coefficients of the row. Without an entropy gradient, g_H is a stand-in that is never read.
    lse = tl.load(lse_ptr + row)
    entropy = tl.load(entropy_ptr + row)
    grad_entropy = lse
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + row)
    if dense_ptr is not None:
        dense_ptr += row * real_width
    live = tl.full((), 1, tl.int1)
    if live_ptr is not None:
        live = tl.load(live_ptr + row) != 0

    # The support's columns: their complete gradient, kept in registers until the end.
    slot = tl.arange(0, SLOT_BLOCK)
    grad_logp = tl.load(grad_logp_ptr + slot, mask=slot < slots, other=0.0)
    grad_sum = tl.sum(grad_logp, axis=0)
    support_column, stored = _columns_of(ids_ptr, slot, slots, shard_start, real_width)
    support_logit = _finite(tl.load(logits_ptr + support_column, mask=stored, other=0.0).to(math))
    support_scaled = _scaled(support_logit, TEMPERATURE, SOFTCAP)
    support_gradient = _dense_gradient(
        support_scaled, lse, entropy, grad_sum, grad_entropy, grad_entropy_ptr is not None
    )
    if dense_ptr is not None:
        support_gradient += tl.load(dense_ptr + support_column, mask=stored, other=0.0)
    if MERGE:
        # An id in several slots: each of them gets the sum, and only the first is stored. Pairs of slots, in tiles.
        for start in range(0, slots, SLOT_TILE):
            other = start + tl.arange(0, SLOT_TILE)
            other_column, other_here = _columns_of(ids_ptr, other, slots, shard_start, real_width)
            other_grad = tl.load(grad_logp_ptr + other, mask=other < slots, other=0.0)
            same = (support_column[:, None] == other_column[None, :]) & other_here[None, :]
            support_gradient += tl.sum(tl.where(same, other_grad[None, :], 0.0), axis=1)
            earlier = tl.sum((same & (other[None, :] < slot[:, None])).to(tl.int32), axis=1)
            stored = stored & (earlier == 0)
    else:
        support_gradient += grad_logp
    support_gradient = tl.where(live, _unscaled(support_gradient, support_scaled, TEMPERATURE, SOFTCAP), 0.0)

    # Pass 2: the dense part of every column, 0 in the padding, written over the logits block by block.
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < real_width
        logit = _finite(tl.load(logits_ptr + column, mask=column < width, other=0.0).to(math))
        scaled = _scaled(logit, TEMPERATURE, SOFTCAP)
        gradient = _dense_gradient(scaled, lse, entropy, grad_sum, grad_entropy, grad_entropy_ptr is not None)
        if dense_ptr is not None:
            gradient += tl.load(dense_ptr + column, mask=real, other=0.0)
        gradient = tl.where(real & live, _unscaled(gradient, scaled, TEMPERATURE, SOFTCAP), 0.0)
        tl.debug_barrier()  # danger: without it a thread could store over logits that another has yet to load
        tl.store(out_ptr + column, gradient.to(out_ptr.dtype.element_ty), mask=column < width)
    # The support's columns replace what the dense part stored there, so nothing is added to rounded numbers.
    tl.debug_barrier()
    tl.store(out_ptr + support_column, support_gradient.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _columns_of(ids_ptr, slot, slots, shard_start, real_width):
    """Column of each slot's id in this shard and whether it is here; column 0 stands in for those that are not."""
    column = tl.load(ids_ptr + slot, mask=slot < slots, other=-1) - shard_start
    here = (slot < slots) & (column >= 0) & (column < real_width)
    return tl.where(here, column, 0).to(tl.int32), here


@triton.jit
def _finite(logit):
    """-inf to LEAST_LOGIT. By a comparison, because the maximum of two numbers would drop a NaN."""
    return tl.where(logit < LEAST_LOGIT, LEAST_LOGIT, logit)


@triton.jit
def _scaled(logit, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr):
    """z to z'. tanh |x| = (1 - e^(-2|x|)) / (1 + e^(-2|x|)): no overflow, error of one rounding step of the softcap."""
    if SOFTCAP is not None:
        decay = tl.exp(tl.abs(logit) * (-2.0 / SOFTCAP))
        capped = (1.0 - decay) / (1.0 + decay) * SOFTCAP
        logit = tl.where(logit < 0.0, -capped, capped)
    return logit * (1.0 / TEMPERATURE)


@triton.jit
def _unscaled(gradient, scaled, TEMPERATURE: tl.constexpr, SOFTCAP: tl.constexpr):
    """dL/dz' to dL/dz, with dz'/dz = (1 - tanh^2(z / softcap)) / temperature."""
    if SOFTCAP is not None:
        tanh = scaled * (TEMPERATURE / SOFTCAP)
        gradient *= 1.0 - tanh * tanh
    return gradient * (1.0 / TEMPERATURE)


@triton.jit
def _dense_gradient(scaled, lse, entropy, grad_sum, grad_entropy, WITH_ENTROPY: tl.constexpr):
    """The part that every column gets from the normaliser and the entropy: -p (sum_j g_j + g_H (log p + H))."""
    logp = scaled - lse
    weight = grad_sum
    if WITH_ENTROPY:
        weight += grad_entropy * (logp + entropy)
    return -weight * tl.exp(logp)
