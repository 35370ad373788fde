"""Log-probs and candidates from a sharded vocabulary, computed as in the loss: for scoring, ratios, custom losses.

The loss itself is in `loss`. Legend: *T the token shape, W vocabulary columns of this rank, J ids, K candidates.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel import support_log_probs as kernel_log_probs
from tropd_mcore.kernel import topk as kernel_topk
from tropd_mcore.kernel.surroundings import outside_compile
from tropd_mcore.kernel.topk import TopK
from tropd_mcore.library import checks
from tropd_mcore.library.arguments import OutputLayer, VocabParallel
from tropd_mcore.library.shapes import source_of


@outside_compile
@checks.speaks_as("support_log_probs")
def support_log_probs(
    student: Tensor | OutputLayer,
    ids_TJ: Tensor,
    *,
    vp: VocabParallel,
    unique_runs: tuple[int, ...] | None = None,
    preserve_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (log p of `ids_TJ` [*T, J], entropy [*T]), nats, over the whole vocabulary; differentiable.

    `ids_TJ`: int, equal on all ranks of the group; -1 = unused slot, with log-prob 0. `unique_runs`: lengths of runs of
    the J slots in which no id appears twice; longer runs make the backward pass cheaper. None = all of length 1. An id
    outside the vocabulary gives NaN. The gradient of an `OutputLayer` is computed in the backward pass, from logits
    that are computed again. Raises LossInputError.
    """
    checks.refuse_vp(vp)
    source, shape, options = source_of(student, preserve_logits)
    ids = _ids(ids_TJ, shape)
    runs = (1,) * ids.shape[1] if unique_runs is None else unique_runs
    if sum(runs) != ids.shape[1]:
        raise LossInputError(
            f"support_log_probs: unique_runs={runs} do not add up to the {ids.shape[1]} ids of a token"
        )
    kernel = vp.kernel(source.width, source.tensors[0].device, overlap=False)
    reduce = options.get("reduce_hidden_gradient", True)
    logp_TJ, entropy_T = kernel_log_probs.support_log_probs(
        source, ids, kernel, unique_run_lengths=runs, reduce_hidden_gradient=reduce
    )
    return logp_TJ.reshape(*shape, ids.shape[1]), entropy_T.reshape(shape)


@outside_compile
@checks.speaks_as("distributed_topk")
def distributed_topk(source: Tensor | OutputLayer, *, k: int, vp: VocabParallel, ids_TJ: Tensor | None = None) -> TopK:
    """Return the k most probable tokens of each position, and the log-probs of `ids_TJ` from the same pass.

    ids_TK [*T, K] by (logit descending, id ascending), logp_TK not renormalised, tail_mass_T, lse_T, entropy_T [*T],
    logp_TJ [*T, J]. No gradient. Raises LossInputError, also if k exceeds the vocabulary.
    """
    checks.refuse_vp(vp)
    rows, shape, _ = source_of(source, preserve_logits=False)
    kernel = vp.kernel(rows.width, rows.tensors[0].device, overlap=False)
    if not 0 < k <= vp.vocab_size:
        raise LossInputError(f"distributed_topk: k={k}, expected 1 to vocab_size={vp.vocab_size}")
    found = kernel_topk.distributed_topk(
        rows, k=k, kernel=kernel, ids_TJ=None if ids_TJ is None else _ids(ids_TJ, shape)
    )
    numbers: dict[str, Any] = {field.name: getattr(found, field.name) for field in fields(found)}
    shaped = {name: number.reshape(*shape, *number.shape[1:]) for name, number in numbers.items() if number is not None}
    return replace(found, **shaped)


def _ids(ids: Tensor, shape: torch.Size) -> Tensor:
    checks.refuse_tensors(ids_TJ=ids)
    checks.refuse_shape("ids_TJ", ids, shape, extra=1)
    return ids.detach().reshape(shape.numel(), ids.shape[-1]).to(torch.int64)
