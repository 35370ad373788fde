"""The vocabulary columns that a rank owns, and how logits are read: scaling, dtype, chunks.

Shapes: C tokens of a chunk, W width of this rank's vocabulary shard, R <= W its real (not padded) columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd_mcore.sentinels import LEAST_LOGIT


@dataclass(frozen=True)
class VocabShard:
    """This rank owns the columns [start, stop) of the logits; columns >= vocab_size are padding."""

    start: int
    stop: int
    vocab_size: int

    @property
    def width(self) -> int:
        """W, the columns of this rank's logits."""
        return self.stop - self.start

    @property
    def real_width(self) -> int:
        """R, the columns that are vocabulary entries; padding comes after them."""
        return max(0, min(self.stop, self.vocab_size) - self.start)


@dataclass(frozen=True)
class Scaling:
    """The change of a logit z before the softmax: z' = softcap * tanh(z / softcap) / temperature.

    Its derivative is (1 - tanh(z / softcap)^2) / temperature, where tanh(z / softcap) = z' * temperature / softcap.
    """

    temperature: float = 1.0
    softcap: float | None = None
    """None: z' = z / temperature"""

    def apply_(self, logits: Tensor) -> Tensor:
        """z to z', in place."""
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def chain_(self, grad: Tensor, scaled: Tensor) -> Tensor:
        """dL/dz' to dL/dz, in place. `scaled` is z', which is overwritten if there is a softcap."""
        if self.softcap is not None:
            grad.sub_(scaled.mul_(self.temperature / self.softcap).square_().mul_(grad))
        return grad if self.temperature == 1.0 else grad.div_(self.temperature)


def math_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def chunks(rows: int, chunk_tokens: int) -> Iterator[slice]:
    """Yield slices of at most `chunk_tokens` rows. Without rows there are none, on every rank of the group alike."""
    for start in range(0, rows, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, rows))


def scaled_logits(logits_CW: Tensor, shard: VocabShard, scaling: Scaling, out: Tensor | None = None) -> Tensor:
    """z' of the real columns, [C, R] in the math dtype: a copy (in `out` if given) that may be overwritten.

    -inf becomes LEAST_LOGIT; NaN stays.
    """
    real_CR = logits_CW[:, : shard.real_width]
    dtype = math_dtype(logits_CW)
    if real_CR.dtype == dtype:
        copy_CR = torch.clamp(real_CR, min=LEAST_LOGIT, out=out) if out is not None else real_CR.clamp(min=LEAST_LOGIT)
    else:
        copy_CR = (real_CR.to(dtype) if out is None else out.copy_(real_CR)).clamp_(min=LEAST_LOGIT)
    return scaling.apply_(copy_CR)


def local_ids(ids_CJ: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each id in this shard, and whether the id is in this shard; if not, the column is 0."""
    local_CJ = ids_CJ - shard.start
    here_CJ = (local_CJ >= 0) & (local_CJ < shard.real_width)
    return local_CJ.masked_fill(~here_CJ, 0), here_CJ


def support_logits(logits_CW: Tensor, ids_CJ: Tensor, shard: VocabShard, scaling: Scaling) -> Tensor:
    """z' of the ids that are in this shard, 0 for the others, [C, J] in the math dtype.

    -inf stays. So the log-prob of an impossible token is -inf, and a loss that needs it is not finite.
    """
    if shard.real_width == 0:
        return logits_CW.new_zeros(ids_CJ.shape, dtype=math_dtype(logits_CW))
    local_CJ, here_CJ = local_ids(ids_CJ, shard)
    value_CJ = logits_CW.gather(1, local_CJ).to(math_dtype(logits_CW), copy=True)
    return scaling.apply_(value_CJ).masked_fill(~here_CJ, 0.0)
