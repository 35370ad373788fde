"""A small language model with the loss of the library, in PyTorch's data-parallel wrappers, for `run_on_ranks`.

The loss is called in the forward pass of the root module, where the head's weight is not sharded.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tropd_mcore import OutputLayer, TeacherTopK, VocabParallel, distill_loss, objectives, trust_uniforms

V, D, K, B, S = 37, 8, 4, 2, 5


class Model(nn.Module):
    """Embedding, a layer, and a head that may share the embedding's weight or be frozen."""

    def __init__(self, *, tied: bool, frozen: bool) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.head.weight.requires_grad_(not frozen)

    def forward(self, tokens: Tensor, labels: Tensor, teacher: TeacherTopK, u: Tensor, plain: bool) -> Tensor:
        """The sum of TrOPD's loss, by the library or by a softmax over the whole vocabulary."""
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if not plain:
            layer = OutputLayer(hidden, self.head.weight)
            vp = VocabParallel.single(V, chunk_tokens=3)
            return distill_loss(layer, labels, teacher, objectives.tropd(), vp=vp, trust_u_T=u).loss_sum
        log_p = self.head(hidden).log_softmax(-1)
        logp = log_p.gather(-1, labels[..., None])[..., 0]
        assert teacher.logp_T is not None and teacher.ids_TK is not None and teacher.logp_TK is not None
        r = (teacher.logp_T - logp).detach()
        kl = (teacher.logp_TK.exp() * (teacher.logp_TK - log_p.gather(-1, teacher.ids_TK))).sum(-1)
        return torch.where(u < r.exp(), -r * logp, kl).sum()


def batch(rank: int) -> tuple[Tensor, Tensor, TeacherTopK, Tensor]:
    """The data of one data rank."""
    random = torch.Generator().manual_seed(rank)
    tokens = torch.randint(V, (B, S), generator=random)
    log_q = torch.randn(B, S, V, generator=random, dtype=torch.float64).log_softmax(-1)
    labels, top = tokens.roll(-1, dims=1), log_q.topk(K)
    teacher = TeacherTopK(log_q.gather(-1, labels[..., None])[..., 0], top.indices, top.values)
    return tokens, labels, teacher, trust_uniforms((B, S), seed=rank)


def gradients(wrapper: str, tied: bool, frozen: bool) -> dict[str, Tensor]:
    """Mean over data ranks of the gradients of two micro-batches. `none` means one process with softmaxes."""
    torch.manual_seed(7)
    model = Model(tied=tied, frozen=frozen).double()
    ranks = [dist.get_rank()] if wrapper != "none" else [0, 1]
    module: nn.Module = model
    if wrapper == "ddp":
        module = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        module = fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    for _ in range(2):  # gradients add up
        for rank in ranks:
            (module(*batch(rank), wrapper == "none") / len(ranks)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}
