"""The passes over the logits as loops that torch.compile makes: no temporaries of the size of a chunk.

Faster than `eager` on a CPU by a factor of two (docs/kernel.md); on a GPU a stand-in for `triton`. Shapes as in
`backend`. Invariant: one compilation a variant (dtype, softcap, which terms there are), not one a number of rows.
"""

from __future__ import annotations

import inspect
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo
from torch import Tensor
from torch.utils._triton import has_triton

from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import RowGradient
from tropd_mcore.kernel.eager import empty_shard_stats
from tropd_mcore.kernel.shard import Scaling, VocabShard, local_ids, math_dtype, support_logits
from tropd_mcore.sentinels import LEAST_LOGIT

P = ParamSpec("P")
R = TypeVar("R")

VARIANTS = 256
"""Bound on the compilations of a pass in one process. A training job needs about four, the conformance matrix more than
64: gradients over the logits and beside them are two variants."""


class CompiledBackend:
    """CPU with a C++ compiler, or CUDA with Triton; raises ConfigError without.

    The first use of a variant compiles for some seconds.
    """

    name = "compile"
    shrinks_in_place = False
    """The compiler does not know that a narrower row may be written over the row it is made from"""

    def __init__(self, device: torch.device) -> None:
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            raise ConfigError([f"loss.backend=compile needs torch 2.13 or newer, found {torch.__version__}; use eager"])
        if device.type == "cpu":
            _require_compiler()
        elif not has_triton():
            raise ConfigError(["loss.backend=compile needs Triton and a GPU that it supports; use eager"])
        self._stats = _compiled(_shard_stats)
        self._dense = _compiled(_write_dense)
        self._support = _compiled(_support_gradient)

    @torch.no_grad()
    def stats_and_support(
        self, logits_CW: Tensor, ids_CJ: Tensor, shard: VocabShard, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        owned_CJ = support_logits(logits_CW, ids_CJ, shard, scaling)
        if shard.real_width == 0 or logits_CW.shape[0] == 0:
            return empty_shard_stats(owned_CJ), owned_CJ
        return self._stats(logits_CW.detach()[:, : shard.real_width], scaling.temperature, scaling.softcap), owned_CJ

    @torch.no_grad()
    def write_gradient(
        self, logits_CW: Tensor, row: RowGradient, shard: VocabShard, scaling: Scaling, out_CW: Tensor
    ) -> None:
        """See `Backend`.

        The columns of the support are made apart, from logits that are read before they are overwritten, and replace
        what the dense pass wrote there: nothing is added after the rounding to a narrower dtype.
        """
        real = shard.real_width
        out_CW[:, real:] = 0.0
        if real == 0 or logits_CW.shape[0] == 0:
            return
        live_C = row.live_C if row.live_C is not None else torch.ones_like(row.lse_C, dtype=torch.bool)
        factors = (live_C, row.lse_C, row.entropy_C, row.grad_logp_CJ.sum(dim=1), row.grad_entropy_C)
        local_CJ, here_CJ = local_ids(row.ids_CJ, shard)
        support_CJ = self._support(
            logits_CW.detach().gather(1, local_CJ),
            *factors,
            row.dense_CR.gather(1, local_CJ) if row.dense_CR is not None else None,
            local_CJ,
            row.grad_logp_CJ.masked_fill(~here_CJ, 0.0),
            scaling.temperature,
            scaling.softcap,
        )
        in_place = out_CW.data_ptr() == logits_CW.data_ptr()
        out_CR = out_CW.detach()[:, :real]
        logits_CR = out_CR if in_place else logits_CW.detach()[:, :real]
        self._dense(logits_CR, *factors, row.dense_CR, scaling.temperature, scaling.softcap, out_CR)
        row_C1 = torch.arange(len(out_CR), device=out_CR.device)[:, None]
        # Not scatter_, which on a CPU copies the whole of a bfloat16 matrix to float32.
        out_CR.index_put_((row_C1, local_CJ), support_CJ.to(out_CR.dtype))


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function as one graph for any number of rows."""
    compiled: Callable[P, R] = torch.compile(  # type: ignore[call-overload]  # its stub lacks the last two arguments
        function, fullgraph=True, dynamic=True, isolate_recompiles=True, recompile_limit=VARIANTS
    )
    return compiled


def _shard_stats(logits_CR: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """(m, s, u), [C, 3]. The maximum is taken before the scaling, which is increasing, so that it is made once.

    On a CPU the sums are kept in float64: the compiled loop adds thousands of numbers one after the other.
    """
    dtype = math_dtype(logits_CR)
    sums = torch.float64 if logits_CR.device.type == "cpu" else dtype
    max_C = _scaled(logits_CR.amax(dim=1), temperature, softcap)
    shifted_CR = _scaled(logits_CR, temperature, softcap) - max_C[:, None]
    exp_CR = shifted_CR.exp()
    sum_C, moment_C = exp_CR.sum(dim=1, dtype=sums), (exp_CR * shifted_CR).sum(dim=1, dtype=sums)
    return torch.stack([max_C, sum_C.to(dtype), moment_C.to(dtype)], dim=1)


def _write_dense(
    logits_CR: Tensor,
    live_C: Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    row_sum_C: Tensor,
    grad_entropy_C: Tensor | None,
    dense_CR: Tensor | None,
    temperature: float,
    softcap: float | None,
    out_CR: Tensor,
) -> None:
    """The gradient without the support, to `out_CR`, which may be the logits."""
    scaled_CR = _scaled(logits_CR, temperature, softcap)
    grad_CR = _dense_gradient(scaled_CR, lse_C, entropy_C, row_sum_C, grad_entropy_C, dense_CR)
    out_CR.copy_(torch.where(live_C[:, None], _chain(grad_CR, scaled_CR, temperature, softcap), 0.0))


def _support_gradient(
    logits_CJ: Tensor,
    live_C: Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    row_sum_C: Tensor,
    grad_entropy_C: Tensor | None,
    dense_CJ: Tensor | None,
    local_CJ: Tensor,
    owned_CJ: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """The whole gradient of the columns `local_CJ`, each with the sum over all slots that name it, [C, J]."""
    scaled_CJ = _scaled(logits_CJ, temperature, softcap)
    grad_CJ = _dense_gradient(scaled_CJ, lse_C, entropy_C, row_sum_C, grad_entropy_C, dense_CJ)
    same_CJJ = local_CJ[:, :, None] == local_CJ[:, None, :]
    sparse_CJ = torch.where(same_CJJ, owned_CJ[:, None, :], 0.0).sum(dim=2)
    return torch.where(live_C[:, None], _chain(grad_CJ + sparse_CJ, scaled_CJ, temperature, softcap), 0.0)


def _dense_gradient(
    scaled_CX: Tensor,
    lse_C: Tensor,
    entropy_C: Tensor,
    row_sum_C: Tensor,
    grad_entropy_C: Tensor | None,
    dense_CX: Tensor | None,
) -> Tensor:
    """-p (sum_j g_j + g_H (log p + H)) + dense of any columns X."""
    logp_CX = scaled_CX - lse_C[:, None]
    factor_CX = row_sum_C[:, None]
    if grad_entropy_C is not None:
        factor_CX = factor_CX + grad_entropy_C[:, None] * (logp_CX + entropy_C[:, None])
    grad_CX = -logp_CX.exp() * factor_CX
    return grad_CX if dense_CX is None else grad_CX + dense_CX


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """`Scaling.apply_`, not in place, in the math dtype; -inf becomes LEAST_LOGIT."""
    scaled = logits.to(math_dtype(logits)).clamp_min(LEAST_LOGIT)
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    return scaled / temperature


def _chain(grad: Tensor, scaled: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """`Scaling.chain_`, not in place."""
    if softcap is not None:
        grad = grad * (1.0 - (scaled * (temperature / softcap)).square())
    return grad / temperature


def _require_compiler() -> None:
    """Stop where the loops could not be built."""
    if torch._dynamo.config.disable:
        raise ConfigError(
            ["loss.backend=compile cannot run where torch.compile is off, as it is for Megatron on a CPU; use eager"]
        )
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(["loss.backend=compile needs a C++ compiler (g++) and none was found; use eager"]) from error
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise ConfigError([f"loss.backend=compile needs Python's headers and {header} does not exist; use eager"])
