"""The CPU platform: its replacements behave as on a GPU, and it is refused if it must not be used."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import megatron.core
import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tests.dist import platform_ranks
from tests.dist.layouts import Case
from tests.dist.platform_ranks import HEADS, KEY_HEADS, WIDTH
from tests.ranks import run_on_ranks
from tropd_mcore.config.schema import RunConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.parallel import collective_timeout
from tropd_mcore.mcore.platform import choose
from tropd_mcore.mcore.platform.cpu import CpuPlatform
from tropd_mcore.mcore.platform.cuda import CudaPlatform

UNEVEN = [0, 4, 16, 20, 28]
"""Lengths 4, 12, 4 and 8: each divisible by 2 * 2 context ranks."""


def test_platform_auto_means_cpu_without_a_gpu() -> None:
    assert choose("auto").name == "cpu"


def test_cuda_without_a_gpu_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"platform\.kind = cuda: torch sees no GPU"):
        choose("cuda")


def test_cpu_beside_a_gpu_is_refused_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"platform\.kind = cpu: torch sees a GPU"):
        choose("cpu")


def test_an_unvalidated_megatron_version_is_refused_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    with pytest.raises(
        ConfigError, match=r"platform\.kind = cpu: validated with megatron-core 0\.16\.x, found 0\.17\.0"
    ):
        choose("cpu")


@pytest.mark.parametrize("kind", [CpuPlatform, CudaPlatform])
def test_fusion_defaults_are_fields_of_the_model_config(kind: type[CpuPlatform | CudaPlatform]) -> None:
    """The cuda module can be imported and queried without a GPU, but not used."""
    platform = kind.__new__(kind)
    assert set(platform.config_defaults()) <= {field.name for field in dataclasses.fields(TransformerConfig)}


def test_every_process_group_waits_as_long_as_the_job_says() -> None:
    """Megatron's default is 30 minutes, which a publication of weights or a rollout phase can exceed."""
    limit = timedelta(hours=5)
    for name, found in run_on_ranks(platform_ranks.timeouts, 2, limit)[0].items():
        assert found == limit, name


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, timedelta(hours=2)),
        ({"stall_timeout_s": 5400.0}, timedelta(hours=2)),
        ({"stall_timeout_s": 7200.0}, timedelta(hours=2.5)),
        ({"collective_timeout_s": 3601.0}, timedelta(seconds=3601)),
        ({"collective_timeout_s": 90000.0, "stall_timeout_s": 80000.0}, timedelta(hours=25)),
    ],
    ids=str,
)
def test_a_collective_may_take_longer_than_a_stall(settings: dict[str, float], limit: timedelta) -> None:
    assert collective_timeout(RunConfig(dir=Path("run"), **settings)) == limit


def test_cuda_literals_run_on_the_cpu_also_in_backward() -> None:
    found = run_on_ranks(platform_ranks.cuda_literals, 1)[0]
    assert torch.equal(found.pop("gradient"), torch.full((3,), 2.0))
    assert found == {
        "factory": "cpu",
        "device object": "cpu",
        "current device": "cpu",
        "method is identity": True,
        "type": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", "torch.LongTensor"],
        "cast": "torch.float64",
        "is_available": False,
        "cpu stays": "cpu",
    }


def test_random_states_differ_between_tensor_ranks_only_inside_the_fork() -> None:
    zero, one = run_on_ranks(platform_ranks.random_states, 2, Case(tensor=2))
    assert torch.equal(zero["outside"], one["outside"])
    assert not torch.equal(zero["inside"], one["inside"])
    assert not torch.equal(zero["inside"], zero["inside again"])
    assert torch.equal(zero["outside"], zero["undisturbed"]), "drawing inside moves the state outside"


def test_adam_equals_torch_adamw_also_after_a_restart() -> None:
    for ours, theirs in platform_ranks.adam_and_torch(steps=6, restart_at=3):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def test_norm_equals_its_formula_and_says_whether_its_gradient_is_partial() -> None:
    random = torch.Generator().manual_seed(2)
    x, weight = torch.randn(4, 9, generator=random), torch.randn(9, generator=random)
    wide = x.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for sequence_parallel in (False, True):
        found, tagged = platform_ranks.norm(x, weight, 1e-3, sequence_parallel)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        assert tagged is sequence_parallel


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_attention_and_its_gradients_equal_a_loop_over_tokens(packed: bool, world_size: int) -> None:
    boundaries = UNEVEN if packed else [0, UNEVEN[-1]]
    random = torch.Generator().manual_seed(4)
    sizes = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}
    tensors = {name: torch.randn(boundaries[-1], heads, WIDTH, generator=random) for name, heads in sizes.items()}
    tensors["weight"] = torch.randn(boundaries[-1], HEADS * WIDTH, generator=random)
    expected = attention_oracle(boundaries, tensors)
    for answer in run_on_ranks(platform_ranks.attention, world_size, boundaries, tensors, packed):
        mine = answer.pop("positions")
        for name, found in answer.items():
            torch.testing.assert_close(found.double(), expected[name][mine], rtol=1e-5, atol=1e-5, msg=name)


def attention_oracle(boundaries: list[int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64, one query token and head at a time."""
    query, key, value = (tensors[name].double().requires_grad_(True) for name in ("query", "key", "value"))
    rows = []
    for start, stop in pairwise(boundaries):
        for token in range(start, stop):
            heads = []
            for head in range(HEADS):
                shared = head // (HEADS // KEY_HEADS)
                scores = key[start : token + 1, shared] @ query[token, head] / np.sqrt(WIDTH)
                heads.append(torch.softmax(scores, dim=0) @ value[start : token + 1, shared])
            rows.append(torch.cat(heads))
    out = torch.stack(rows)
    (out * tensors["weight"].double()).sum().backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return {"out": out.detach(), "query": query.grad, "key": key.grad, "value": value.grad}
