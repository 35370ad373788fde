"""The program of a situation of `tests.autograd_situations`: a leaf tensor, and a loss of values computed from it.

This is not a test. The loss is the one under test, in one of its forms, or a plain PyTorch loss in float64.

Shapes: T tokens, V vocabulary, D hidden, J support ids, W vocabulary shard of one rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tropd_mcore.kernel.backend import Backend, Kernel
from tropd_mcore.kernel.choose import backend as choose_backend
from tropd_mcore.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses

TOKENS, VOCABULARY, HIDDEN, SLOTS, CHUNK = 7, 40, 6, 4, 3
TEMPERATURE = 0.7
MASKED_ROWS = (1, 4)
FORMS: dict[str, dict[str, Any]] = {
    "logits": {"given": True},
    "logits, preserve": {"given": True, "preserve": True},
    "logits, full vocabulary": {"given": True, "dense": True},
    "logits, full vocabulary, preserve": {"given": True, "dense": True, "preserve": True},
    "fused, deferred": {"mode": "deferred"},
    "fused, deferred, main_grad": {"mode": "deferred", "main_grad": True},
    "fused, folded, main_grad": {"mode": "folded", "main_grad": True},
    "fused, recompute": {"mode": "recompute"},
    "fused, recompute, main_grad": {"mode": "recompute", "main_grad": True},
    "fused, deferred, full vocabulary": {"mode": "deferred", "dense": True},
    "fused, folded, full vocabulary, main_grad": {"mode": "folded", "dense": True, "main_grad": True},
}
"""Every way to make a gradient: form, mode, and where dW goes."""


@dataclass(frozen=True)
class Setting:
    """One form of the loss on one backend, or the truth."""

    backend: str = "eager"
    given: bool = False
    preserve: bool = False
    mode: Any = "deferred"
    main_grad: bool = False
    dense: bool = False
    device: str = "cpu"


def backend_of(setting: Setting) -> Backend:
    """The backend by its name; Triton also on a CPU, where its interpreter runs it."""
    if setting.backend == "triton":
        from tropd_mcore.kernel.triton_backend import TritonBackend

        return TritonBackend()
    return choose_backend(setting.backend, torch.device(setting.device))


class Numbers:
    """The fixed inputs of a case, equal on every rank. The situation starts from the leaf."""

    def __init__(self, setting: Setting) -> None:
        random = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(setting.device)

        self.logits_TV = 2.0 * normal(TOKENS, VOCABULARY)
        self.hidden_TD, self.weight_VD = normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN)
        self.teacher_TV = 2.0 * normal(TOKENS, VOCABULARY)
        self.a_TJ, self.b_TJ = normal(TOKENS, SLOTS), normal(TOKENS, SLOTS)
        self.c_T, self.d_T = normal(TOKENS), normal(TOKENS)
        ids = [torch.randperm(VOCABULARY, generator=random)[:SLOTS] for _ in range(TOKENS)]
        self.ids_TJ = torch.stack(ids).to(setting.device)
        self.ids_TJ[2, 0] = self.ids_TJ[2, 2]  # an id of both runs


class Program:
    """The program of a situation: a leaf, and a loss of the values that the situation computes from the leaf."""

    def __init__(self, setting: Setting, *, truth: bool) -> None:
        self.setting, self.truth, self.numbers = setting, truth, Numbers(setting)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        edges = [VOCABULARY * part // ranks + (part if part < ranks else 0) for part in range(ranks + 1)]
        self.shard = VocabShard(edges[rank], edges[rank + 1], VOCABULARY)
        if truth:
            self.shard = VocabShard(0, VOCABULARY, VOCABULARY)
        start = self.numbers.logits_TV if setting.given else self.numbers.hidden_TD
        self.leaf = start.clone().requires_grad_(True)
        self.weight = self.numbers.weight_VD[self.shard.start : self.shard.stop].clone().requires_grad_(True)
        if setting.main_grad and not truth:
            self.weight.main_grad = torch.zeros_like(self.weight, requires_grad=False)  # type: ignore[attr-defined]
        self.live_T = torch.ones(TOKENS, dtype=torch.bool, device=setting.device)
        self.value: Tensor | None = None

    def mask(self) -> None:
        """Leave some rows out of the loss."""
        self.live_T[list(MASKED_ROWS)] = False

    def loss(self, z: Tensor) -> Tensor:
        """The loss of logits [T, V] or hidden states [T, D], for the rows in `z`: the first rows of the case."""
        return self.rows_loss(z, slice(0, len(z)))

    def rows_loss(self, z: Tensor, at: slice) -> Tensor:
        """The loss of some rows of the case."""
        if self.truth:
            return self._plain(z, at)
        kernel = Kernel(
            self.shard,
            dist.group.WORLD,  # type: ignore[arg-type]
            backend_of(self.setting),
            Scaling(TEMPERATURE),
            CHUNK,
        )
        source: LogitSource = OutputLayer(z, self.weight)
        if self.setting.given:
            whole = self.shard.width == VOCABULARY
            shard_TW = z if whole else z[:, self.shard.start : self.shard.stop]
            source = GivenLogits(shard_TW, preserve=self.setting.preserve)
        dense = None
        if self.setting.dense:
            teacher_TW = self.numbers.teacher_TV[at, self.shard.start : self.shard.stop]
            dense = FullVocabulary(GivenLogits(teacher_TW), kernel, teacher_shard=self.shard, divergence="fkl")
        output = support_loss(
            source,
            self.numbers.ids_TJ[at],
            functools.partial(self._token_loss, at),
            kernel,
            unique_run_lengths=(1, SLOTS - 1),
            weight_gradient=self.setting.mode,
            full_vocab_term=dense,
        )
        return output.loss_sum

    def _token_loss(
        self, at: slice, logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice
    ) -> TokenLosses:
        """Not linear, so that its graph saves tensors; masked rows have no influence."""
        here = slice(at.start + rows.start, at.start + rows.stop)
        numbers, live_C = self.numbers, self.live_T[here]
        dtype = logp_CJ.dtype
        a, b, c, d = (n[here].to(dtype) for n in (numbers.a_TJ, numbers.b_TJ, numbers.c_T, numbers.d_T))
        logp_CJ = torch.where(live_C[:, None], logp_CJ, 0.0)
        loss_C = (a * logp_CJ).sum(dim=1) + (b * logp_CJ.square()).sum(dim=1)
        loss_C = loss_C + c * torch.where(live_C, entropy_C, 0.0)
        if divergence_C is not None:
            loss_C = loss_C + d * torch.where(live_C, divergence_C, 0.0).square()
        return TokenLosses(loss_C, live_C)

    def _plain(self, z: Tensor, at: slice) -> Tensor:
        """The same by log_softmax over the whole vocabulary, on the live rows only."""
        numbers, live = self.numbers, self.live_T[at].nonzero()[:, 0]
        logits = z[live] if self.setting.given else F.linear(z[live], self.weight)
        scaled = logits / TEMPERATURE
        logp = scaled.log_softmax(-1)
        possible = logp.masked_fill(scaled.isneginf(), 0.0)
        picked = logp.gather(1, numbers.ids_TJ[at][live])
        entropy = -(logp.exp() * possible).sum(1)
        a, b, c, d = (n[at][live] for n in (numbers.a_TJ, numbers.b_TJ, numbers.c_T, numbers.d_T))
        loss = (a * picked).sum() + (b * picked.square()).sum() + (c * entropy).sum()
        if self.setting.dense:
            teacher = numbers.teacher_TV[at][live].log_softmax(-1)
            gap = teacher.masked_fill(teacher.isneginf(), 0.0) - possible
            loss = loss + (d * (teacher.exp() * gap).sum(1).square()).sum()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """The gradients after the backward pass, for the whole vocabulary."""
        found: dict[str, Tensor] = {} if self.value is None else {"value": self.value}
        if self.leaf.grad is not None:
            gradient = self.leaf.grad.clone()
            if self.setting.given and not self.truth and dist.get_world_size() > 1:
                dist.all_reduce(gradient)
            found["leaf"] = gradient
        if not self.setting.given:
            weight = getattr(self.weight, "main_grad", self.weight.grad)
            if weight is not None:
                start = self.shard.start
                found["weight"] = F.pad(weight, (0, 0, start, VOCABULARY - self.shard.stop))
        return found
