"""The fused loss: output layer (or given logits), loss and gradients, computed over chunks of tokens.

It serves losses that are sums over tokens of functions of a few log-probs (the *support*), the entropy and optionally
one divergence over the whole vocabulary (`TokenLoss`). The gradient is computed in the forward pass, while the logits
of the chunk exist. So nothing is computed twice (6 T D W operations: logits, dH, dW) and no logits outlive their chunk.
Invariants: the loss sum and the numbers that decide it are bit-identical on all ranks of the group; no host sync.

Shapes: T tokens, C tokens of a chunk, W width of this rank's vocabulary shard, R <= W its real columns, J support ids
per token, D hidden, N ranks, M numbers of a dense term (a divergence over the whole vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tropd_mcore.kernel.backend import Kernel, RowGradient, finite_where_live, grad_of_used_slots, rows_with_gradient
from tropd_mcore.kernel.exchange import Exchange, merge_stats, start_exchange, support_log_probs_of
from tropd_mcore.kernel.force import dense_at_support, force_of
from tropd_mcore.kernel.gradients import GradientBuffer, WeightGradient, assert_is_one
from tropd_mcore.kernel.group import all_reduce
from tropd_mcore.kernel.shard import chunks, math_dtype
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_log_probs import check_arguments, support_log_probs
from tropd_mcore.kernel.surroundings import (
    begin_backward,
    refuse_a_repeated_forward,
    refuse_forward_mode,
    shield,
    without_autocast,
)
from tropd_mcore.kernel.token_losses import SummedLoss, TokenLosses

WeightGradientMode = Literal["deferred", "folded", "recompute"]


class TokenLoss(Protocol):
    """The loss of some rows from numbers that are replicated over the ranks. Differentiable in the first three."""

    def __call__(self, logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        """Return one loss per row."""
        ...


class FullVocabTerm(Protocol):
    """A divergence over the whole vocabulary, in addition to the log-probs of the support."""

    def partials(self, logits_CW: Tensor, rows: slice) -> Tensor:
        """This shard's statistics, [C, M] in the math dtype. The chunk's all-reduce sends them, one slot per rank."""
        ...

    def value(self, stats_CN3: Tensor, partials_CNM: Tensor, lse_C: Tensor, logits_CW: Tensor, rows: slice) -> Tensor:
        """The divergence of each row, [C], nats, bit-identical on all ranks."""
        ...

    def gradient(self, logits_CW: Tensor, grad_C: Tensor, rows: slice) -> Tensor:
        """grad_C times its derivative in the scaled logits of the real columns, [C, R] in the math dtype."""
        ...


def support_loss(
    source: LogitSource,
    ids_TJ: Tensor,
    token_loss: TokenLoss,
    kernel: Kernel,
    *,
    unique_run_lengths: tuple[int, ...],
    weight_gradient: WeightGradientMode = "deferred",
    reduce_hidden_gradient: bool = True,
    full_vocab_term: FullVocabTerm | None = None,
    measure_force: bool = False,
) -> SummedLoss:
    """The loss of all rows, differentiable in the source's tensors.

    Equals, with all shards side by side, the padding cut off and `scale` the function of `Scaling`,

        logp_TV = log_softmax(scale(hidden_TD @ weight_VD.T))          # or of the given logits
        entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
        token_loss(logp_TV.gather(1, ids_TJ), entropy_T, divergence_T, all rows)

    but holds one chunk of logits at a time. Its gradient is the one that autograd derives from these lines. Forward:
    one SUM all-reduce of [C, (3 + M) N + J] numbers per chunk. Backward: only the SUM all-reduce of dH.

    Args: ids_TJ int64, global, the same on every rank; NO_ENTRY (-1) marks an unused slot. unique_run_lengths: lengths
    of the runs of slots in which no id appears twice; equal ids in different runs add up. reduce_hidden_gradient: sum
    dH over the ranks; False if the caller's gather does it (sequence parallelism). weight_gradient, for an
    `OutputLayer`: when dW, kept in float32, is multiplied by the factor that arrives in the backward pass (see
    `WeightGradient`). `deferred` keeps dW in its own buffer and scales it in the backward pass. `folded` adds it to
    main_grad in the forward pass and checks that the factor is 1. `recompute` computes all gradients in the backward
    pass from recomputed logits (8 T D W operations).

    measure_force: also return each token's force (`kernel.force`) as the column `force`; NaN without gradients. A dense
    term then needs one more all-reduce of [C, J] numbers per chunk.

    With given logits, every mode computes the gradient in the backward pass, which saves a pass to apply the factor. It
    is written over the logits if nobody else needs them (`GivenLogits.may_be_overwritten`). With a dense term it is
    computed in the forward pass, in a buffer of the logits' size.

    Raises LossInputError as `support_log_probs` does, and if `folded` is run again inside a backward pass.

    Source: docs/method.md, the gradient of every term; docs/kernel.md.
    """
    check_arguments(source, ids_TJ, kernel, unique_run_lengths)
    assert full_vocab_term is None or weight_gradient != "recompute", "a dense term is made in the forward pass only"
    if weight_gradient == "recompute" or (full_vocab_term is None and isinstance(source, GivenLogits)):
        logp_TJ, entropy_T = support_log_probs(
            source, ids_TJ, kernel, unique_run_lengths=unique_run_lengths, reduce_hidden_gradient=reduce_hidden_gradient
        )
        with without_autocast(ids_TJ.device):
            whole = token_loss(logp_TJ, entropy_T, None, slice(0, source.tokens))
            if measure_force:
                whole = _with_force(whole, _force_before_backward(whole, ids_TJ, logp_TJ, entropy_T))
            return SummedLoss(whole.loss_sum, whole.token_count, whole.columns, whole.loss_T)
    pieces: list[TokenLosses] = []
    call = _Call(
        source=source,
        ids_TJ=ids_TJ,
        token_loss=token_loss,
        kernel=kernel,
        unique_run_lengths=unique_run_lengths,
        folded=weight_gradient == "folded",
        reduce_hidden_gradient=reduce_hidden_gradient,
        full_vocab_term=full_vocab_term,
        measure_force=measure_force,
        with_gradients=torch.is_grad_enabled(),
        pieces=pieces,
    )
    with without_autocast(ids_TJ.device):
        loss_sum = _SupportLoss.apply(*source.tensors, call)
    if not pieces:
        pieces.append(_loss_of_nothing(call))
    counts = [piece.token_count for piece in pieces]
    names = pieces[0].columns
    return SummedLoss(
        loss_sum=loss_sum,
        token_count=torch.stack(counts).sum(),
        columns={name: torch.cat([piece.columns[name] for piece in pieces]) for name in names},
    )


@dataclass(frozen=True)
class _Call:
    """The arguments of `support_loss`, and the list that collects the result of each chunk."""

    source: LogitSource
    ids_TJ: Tensor
    token_loss: TokenLoss
    kernel: Kernel
    unique_run_lengths: tuple[int, ...]
    folded: bool
    reduce_hidden_gradient: bool
    full_vocab_term: FullVocabTerm | None
    measure_force: bool
    with_gradients: bool
    """False if autograd is off, which a `Function` cannot see from inside"""
    pieces: list[TokenLosses]


@dataclass(frozen=True)
class _Chunk:
    """A chunk whose all-reduce has started."""

    rows: slice
    logits_CW: Tensor
    exchange: Exchange


# The loss of a token is a function l(log p_1, ..., log p_J, H, D) of replicated numbers: H the entropy, D the
# divergence. Autograd differentiates l alone: g_j = dl/dlog p_j, g_H = dl/dH, g_D = dl/dD. From there to the logits z:
#     dlog p_j/dz'_v = [v = ids_j] - p_v   and   dH/dz'_v = -p_v (log p_v + H)   with z' the scaled logits, so
#     dl/dz'_v = -p_v sum_j g_j + sum_j g_j [v = ids_j] - g_H p_v (log p_v + H) + g_D dD/dz'_v.
# Then dz = dl/dz' dz'/dz, dhidden = dz @ weight and dweight = dz.T @ hidden. All are linear in the factor that arrives
# in the backward pass, so the forward pass computes them for the factor 1 and the backward pass scales them.
class _SupportLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, weight_WD: Tensor | None, call: _Call) -> Tensor:
        """`first` is the hidden states, or the logits if there is no weight."""
        source, kernel = call.source, call.kernel
        needs_first = call.with_gradients and ctx.needs_input_grad[0]
        needs_weight = call.with_gradients and ctx.needs_input_grad[1]

        # Where the gradients go.
        first_gradient = weight_gradient = None
        if needs_first:
            # Never written over given logits: the rest of the caller's forward pass may still read them.
            first_gradient = torch.empty_like(first)
        if needs_weight:
            assert isinstance(source, OutputLayer)
            weight_gradient = WeightGradient(source.weight_WD, folded=call.folded)
            if weight_gradient.adds_in_forward:
                refuse_a_repeated_forward("loss.weight_gradient=folded")

        loss_sum = torch.zeros((), dtype=math_dtype(first), device=first.device)
        room = GradientBuffer(source, kernel.backend, first_gradient) if needs_first or needs_weight else None
        for chunk in _chunks_under_way(call):
            # Pass 1 and the all-reduce of this chunk have been started; this waits for them and computes its loss.
            row, piece = _loss_of_chunk(call, chunk, with_gradient=room is not None)
            call.pieces.append(piece)
            loss_sum += piece.loss_T.detach().sum()
            if room is None:
                continue
            assert row is not None and row.live_C is not None
            # Pass 2: dz from the logits. An output layer's logits may be overwritten by it and are gone afterwards.
            dz_CW = room.of(chunk.logits_CW, chunk.rows)
            kernel.backend.write_gradient(chunk.logits_CW, row, kernel.shard, kernel.scaling, dz_CW)
            # The two products: dhidden is this shard's part of a sum over the ranks, dweight is this rank's own.
            if first_gradient is not None and weight_WD is not None:
                torch.mm(dz_CW, weight_WD, out=first_gradient[chunk.rows])
            if weight_gradient is not None:
                weight_gradient.add(dz_CW, finite_where_live(first[chunk.rows], row.live_C))
        # Kept on ctx and not as saved tensors: until the backward pass hands them out, nobody else reads or moves them.
        ctx.first_gradient, ctx.weight_gradient = first_gradient, weight_gradient
        ctx.folded, ctx.group = call.folded, kernel.group
        ctx.reduce = call.reduce_hidden_gradient and weight_WD is not None
        return loss_sum

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        begin_backward(ctx, factor)
        first_gradient, weight_gradient = ctx.first_gradient, ctx.weight_gradient
        ctx.first_gradient = ctx.weight_gradient = None  # handed out below; a second backward pass was refused above
        with without_autocast(factor.device):
            if first_gradient is not None:
                if ctx.folded:
                    assert_is_one(factor)  # on the device, no host sync
                else:
                    first_gradient.mul_(factor)
                # The one all-reduce of the backward pass. It runs on all ranks of the group, also for T = 0 rows.
                if ctx.reduce:
                    all_reduce(first_gradient, ctx.group)
            return first_gradient, weight_gradient.finish(factor) if weight_gradient is not None else None, None


def _chunks_under_way(call: _Call) -> Iterator[_Chunk]:
    """Yield the chunks in order, each after pass 1 and the start of its all-reduce.

    With overlap, the next chunk is started before a chunk is yielded. Chunk i + 1 then needs a second buffer, because
    the logits of chunk i are still to be read. All ranks of the group have the same T and so the same number of
    all-reduces in the same order; T = 0 rows run none.
    """
    source, kernel = call.source, call.kernel
    buffers = [source.buffer(kernel.chunk_tokens) for _ in range(2 if kernel.overlap else 1)]
    started: _Chunk | None = None
    for index, rows in enumerate(chunks(source.tokens, kernel.chunk_tokens)):
        # Pass 1: logits of this shard, then per row (m, s, u) and the support logits that this shard owns.
        logits_CW = source.logits(rows, out=buffers[index % len(buffers)])
        stats_CM, owned_CJ = kernel.backend.stats_and_support(
            logits_CW, call.ids_TJ[rows], kernel.shard, kernel.scaling
        )
        if call.full_vocab_term is not None:
            stats_CM = torch.cat([stats_CM, call.full_vocab_term.partials(logits_CW, rows)], dim=1)
        # The one all-reduce of the chunk.
        exchange = start_exchange(stats_CM, owned_CJ, kernel.group, overlap=kernel.overlap)
        previous, started = started, _Chunk(rows, logits_CW, exchange)
        if not kernel.overlap:
            yield started
        elif previous is not None:
            yield previous
    if kernel.overlap and started is not None:
        yield started


def _loss_of_chunk(call: _Call, chunk: _Chunk, *, with_gradient: bool) -> tuple[RowGradient | None, TokenLosses]:
    """The loss of a chunk, and the numbers from which `write_gradient` computes dz (None without gradients)."""
    rows, kernel = chunk.rows, call.kernel
    ids_CJ = call.ids_TJ[rows]
    # Merge the shards: logsumexp, entropy, log-probs and divergence of each row, bit-identical on all ranks.
    slots_CNM, value_CJ = chunk.exchange.wait()
    stats_CN3 = slots_CNM[:, :, :3]
    lse_C, entropy_C = merge_stats(stats_CN3)
    logp_CJ = support_log_probs_of(value_CJ, lse_C, ids_CJ, kernel.shard)
    divergence_C = None
    if call.full_vocab_term is not None:
        divergence_C = call.full_vocab_term.value(stats_CN3, slots_CNM[:, :, 3:], lse_C, chunk.logits_CW, rows)

    # The loss of the rows, and by autograd its derivatives g_j, g_H and g_D: a graph of [C, J] numbers that ends here.
    inputs = [logp_CJ, entropy_C] + ([divergence_C] if divergence_C is not None else [])
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    with torch.set_grad_enabled(with_gradient), shield():
        for number in inputs:
            number.requires_grad_(with_gradient)
        piece = call.token_loss(logp_CJ, entropy_C, divergence_C, rows)
        if with_gradient and piece.loss_T.requires_grad:
            found = torch.autograd.grad(piece.loss_sum, inputs, allow_unused=True)
    if not with_gradient:
        return None, _with_force(piece, None) if call.measure_force else piece
    # The coefficients of pass 2.
    grad_logp_CJ, grad_entropy_C, grad_divergence_C = (*found, None)[:3]
    grad_logp_CJ = grad_of_used_slots(grad_logp_CJ, ids_CJ, logp_CJ)
    dense_CR = None
    if call.full_vocab_term is not None and grad_divergence_C is not None:
        dense_CR = call.full_vocab_term.gradient(chunk.logits_CW, grad_divergence_C, rows)
    row = RowGradient(
        ids_CJ=ids_CJ,
        grad_logp_CJ=grad_logp_CJ,
        grad_entropy_C=grad_entropy_C,
        lse_C=lse_C.detach(),
        entropy_C=entropy_C.detach(),
        unique_run_lengths=call.unique_run_lengths,
        dense_CR=dense_CR,
        live_C=rows_with_gradient(grad_logp_CJ, grad_entropy_C, grad_divergence_C),
    )
    if call.measure_force:
        dense_CJ = None
        if dense_CR is not None:
            dense_CJ = dense_at_support(dense_CR, ids_CJ, kernel.shard, kernel.group)
        force_C = force_of(ids_CJ, logp_CJ.detach(), grad_logp_CJ, entropy_C.detach(), grad_entropy_C, dense_CJ)
        piece = _with_force(piece, force_C)
    return row, piece


def _force_before_backward(whole: TokenLosses, ids_TJ: Tensor, logp_TJ: Tensor, entropy_T: Tensor) -> Tensor | None:
    """The force of each token of a loss whose gradient is computed in the backward pass; None without gradients.

    The graph from the log-probs to the loss is differentiated twice, here and in the backward pass.
    """
    if not (whole.loss_T.requires_grad and logp_TJ.requires_grad):
        return None
    grad_logp_TJ, grad_entropy_T = torch.autograd.grad(
        whole.loss_sum, [logp_TJ, entropy_T], retain_graph=True, allow_unused=True
    )
    grad_logp_TJ = grad_of_used_slots(grad_logp_TJ, ids_TJ, logp_TJ)
    return force_of(ids_TJ, logp_TJ.detach(), grad_logp_TJ, entropy_T.detach(), grad_entropy_T)


def _with_force(losses: TokenLosses, force_T: Tensor | None) -> TokenLosses:
    if force_T is None:
        force_T = torch.full_like(losses.loss_T.detach(), torch.nan)
    return replace(losses, columns={**losses.columns, "force": force_T})


def _loss_of_nothing(call: _Call) -> TokenLosses:
    """The loss of zero rows, called for the names of its columns. No collective, because no rank has rows."""
    nothing = call.ids_TJ.new_zeros(0, dtype=torch.float32)
    divergence = nothing if call.full_vocab_term is not None else None
    piece = call.token_loss(nothing.new_zeros(call.ids_TJ.shape), nothing, divergence, slice(0, 0))
    return _with_force(piece, None) if call.measure_force else piece
