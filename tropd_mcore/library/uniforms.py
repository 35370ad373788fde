"""Uniforms for the Bernoulli gate: the same on every rank and device, drawn outside the loss.

A loss that drew its own uniforms would draw different ones when activation checkpointing runs it again, because
checkpointing does not restore the caller's generators. Stored rollouts have their own uniforms (`rollout.uniforms`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.group import OneRank
from tropd_mcore.library.arguments import VocabParallel

_FIRST, _SECOND, _STEP = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
"""Multipliers of a 32-bit integer hash and the golden ratio: odd numbers below 2^32, products of two fit in 64 bits."""
_MASK = 0xFFFFFFFF


def trust_uniforms(
    shape: Sequence[int],
    *,
    seed: int | None = None,
    token_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    vp: VocabParallel | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return float32 uniforms in [0, 1), [*T].

    `seed`: the uniform is a hash of (seed, number of the token), the same bits on every rank and device. Use another
    seed in each step. `token_ids` are the numbers of the tokens; default 0, 1, 2, ... Under data or context parallelism
    give each token of the whole batch a different number. `generator`: drawn on rank 0 of vp.group and broadcast,
    because the state of a generator may differ between ranks.

    Raises LossInputError unless exactly one of seed and generator is given.
    """
    shape = torch.Size(shape)
    if (seed is None) == (generator is None):
        raise LossInputError("trust_uniforms: pass seed=, another one each step, or generator=, and not both")
    if generator is not None:
        return _drawn(shape, generator, vp, device)
    assert seed is not None
    if token_ids is None:
        token_ids = torch.arange(shape.numel(), device=device).reshape(shape)
    if token_ids.shape != shape:
        raise LossInputError(f"trust_uniforms: token_ids have shape {tuple(token_ids.shape)}, expected {tuple(shape)}")
    ids = token_ids.to(device=device or token_ids.device, dtype=torch.int64)
    key = _hashed_number(seed & _MASK) ^ _hashed_number((seed >> 32) & _MASK ^ _STEP)
    bits = _hashed(_hashed((ids & _MASK) ^ key) ^ _hashed((ids >> 32) & _MASK) ^ (key * _STEP & _MASK))
    return (bits >> 8).to(torch.float32) * 2.0**-24


def _drawn(
    shape: torch.Size, generator: torch.Generator, vp: VocabParallel | None, device: torch.device | str | None
) -> Tensor:
    if vp is None:
        raise LossInputError("trust_uniforms: generator= needs vp=, over whose group the draw of rank 0 is broadcast")
    uniforms = torch.rand(shape, generator=generator, device=generator.device).to(device or generator.device)
    if not isinstance(vp.group, OneRank) and vp.group.size() > 1:
        dist.broadcast(uniforms, group=vp.group, group_src=0)
    return uniforms


def _hashed(number: Tensor) -> Tensor:
    """A bijection of 32-bit integers, stored in int64; each input bit changes about half of the output bits."""
    number = ((number ^ (number >> 16)) * _FIRST) & _MASK
    number = ((number ^ (number >> 15)) * _SECOND) & _MASK
    return number ^ (number >> 16)


def _hashed_number(number: int) -> int:
    number = ((number ^ (number >> 16)) * _FIRST) & _MASK
    number = ((number ^ (number >> 15)) * _SECOND) & _MASK
    return number ^ (number >> 16)
