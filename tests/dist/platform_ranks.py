"""Code that the ranks of `test_platform` run on the activated CPU platform. Not a test module."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tests.dist.layouts import Case, build, layout_of
from tropd_mcore.mcore.parallel import RankEnvironment, destroy, initialize
from tropd_mcore.mcore.platform import choose
from tropd_mcore.mcore.platform.cpu_adam import CpuFusedAdam
from tropd_mcore.mcore.platform.cpu_attention import CpuAttention
from tropd_mcore.mcore.platform.cpu_norm import CpuRMSNorm
from tropd_mcore.mcore.platform.deterministic import make_deterministic

HEADS, KEY_HEADS, WIDTH = 6, 2, 5


class _NamesCudaInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.full((1,), 2.0, device="cuda").cuda()


def cuda_literals() -> dict[str, Any]:
    platform = choose("cpu")
    platform.activate()
    platform.activate()
    x = torch.ones(3, requires_grad=True)
    _NamesCudaInBackward.apply(x).sum().backward()
    return {
        "factory": str(torch.zeros(2, device="cuda:0").device),
        "device object": str(torch.empty(2, device=torch.device("cuda")).device),
        "current device": str(torch.cuda.current_device()),
        "method is identity": (x.cuda() is x),
        "type": [torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16, torch.int64)],
        "cast": str(torch.zeros(1).type(torch.float64).dtype),
        "gradient": x.grad,
        "is_available": torch.cuda.is_available(),
        "cpu stays": str(torch.zeros(2, device="cpu").device),
    }


def random_states(case: Case) -> dict[str, Tensor]:
    """Draws inside and outside the tensor-parallel state, twice."""
    with layout_of(case):
        tracker = tensor_parallel.get_cuda_rng_tracker()
        first = torch.rand(4)
        with tracker.fork():
            inside = torch.rand(4)
        second = torch.rand(4)
        with tracker.fork():
            inside_again = torch.rand(4)
    with layout_of(case):
        undisturbed = torch.rand(8)
    return {
        "outside": torch.cat([first, second]),
        "undisturbed": undisturbed,
        "inside": inside,
        "inside again": inside_again,
    }


def attention(boundaries: list[int], tensors: dict[str, Tensor], packed: bool) -> dict[str, Tensor]:
    """Output and input gradients of this context rank. `tensors` cover the whole pack, `weight` weighs the output."""
    choose("cpu").activate()
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = zigzag_positions(boundaries, size, rank)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=KEY_HEADS,
        kv_channels=WIDTH, attention_dropout=0.0, context_parallel_size=size,
    )  # fmt: skip
    module = CpuAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=dist.group.WORLD))
    inputs = {name: tensors[name][mine].clone().requires_grad_(True) for name in ("query", "key", "value")}
    params = None
    shaped = dict(inputs)
    if packed:
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        longest = int(cu_seqlens.diff().max())
        params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )  # fmt: skip
    else:
        shaped = {name: tensor[:, None] for name, tensor in inputs.items()}
    out = module(*shaped.values(), attention_mask=None, packed_seq_params=params).reshape(len(mine), -1)
    (out * tensors["weight"][mine]).sum().backward()
    gradients = {name: tensor.grad for name, tensor in inputs.items()}
    return {"positions": torch.tensor(mine), "out": out.detach(), **gradients}


def zigzag_positions(boundaries: list[int], size: int, rank: int) -> list[int]:
    """Positions of the pack on one context rank: chunks `rank` and, from the end, `rank` of each sample."""
    found: list[int] = []
    for start, stop in pairwise(boundaries):
        if size == 1:
            found += range(start, stop)
            continue
        chunk = (stop - start) // (2 * size)
        found += range(start + rank * chunk, start + (rank + 1) * chunk)
        found += range(stop - (rank + 1) * chunk, stop - rank * chunk)
    return found


def adam_and_torch(steps: int, restart_at: int) -> list[tuple[Tensor, Tensor]]:
    """Parameters after each step of (CpuFusedAdam rebuilt from its state at one step, torch.optim.AdamW)."""
    random = torch.Generator().manual_seed(1)
    start, other = torch.randn(7, 3, generator=random), torch.randn(5, generator=random)
    ours, theirs = ([start.clone().requires_grad_(), other.clone().requires_grad_()] for _ in range(2))
    keywords: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    adam, adamw = CpuFusedAdam(ours, **keywords), torch.optim.AdamW(theirs, **keywords)
    found = []
    for step in range(steps):
        if step == restart_at:
            state = adam.state_dict()
            assert state["param_groups"][0]["step"] == step, "the step belongs to the group"
            assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
            adam = CpuFusedAdam(ours, **keywords)
            adam.load_state_dict(state)
        for mine, his in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=random)
            his.grad = mine.grad.clone()
        adam.step()
        adamw.step()
        found += [(mine.detach().clone(), his.detach().clone()) for mine, his in zip(ours, theirs, strict=True)]
    return found


def norm(x: Tensor, weight: Tensor, eps: float, sequence_parallel: bool) -> tuple[Tensor, bool]:
    config = SimpleNamespace(normalization="RMSNorm", params_dtype=x.dtype, sequence_parallel=sequence_parallel)
    module = CpuRMSNorm(config, x.shape[-1], eps)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module(x).detach(), module.weight.sequence_parallel  # type: ignore[attr-defined]


def timeouts(limit: timedelta) -> dict[str, timedelta]:
    """Longest wait of each process group that a layout makes, with the one that Megatron writes checkpoints with."""
    environment = RankEnvironment(dist.get_rank(), dist.get_world_size(), local_rank=0)
    layout = initialize(Case().parallel, choose("cpu"), seed=1, environment=environment, timeout=limit)
    groups = {name: getattr(layout.groups, name) for name in ("tp", "pp", "dp", "cp", "dp_cp", "control")}
    groups["gloo of dp_cp"] = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
    found = {name: group._get_backend(torch.device("cpu")).options._timeout for name, group in groups.items()}
    destroy(layout)
    return found


def deterministic_lookup(folder: Path, ids: Tensor, back: Tensor, deterministic: bool) -> dict[str, Any]:
    """Mode and gradient of a model's embedding, where the switch of platform.deterministic is set or not."""
    case = Case()
    if deterministic:
        make_deterministic({})
    try:
        with layout_of(case) as (layout, platform):
            model = build(folder, case, layout, platform, trainable=False)
            embedding = model.modules[0].embedding.word_embeddings
            embedding.weight.requires_grad_()
            embedding(ids).backward(back)
            return {"mode": model.config.deterministic_mode, "gradient": embedding.weight.grad}
    finally:
        torch.use_deterministic_algorithms(False)
