"""The student's average after a resume: the restored average scores, before any further step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.mcore import average as average_module
from tropd_mcore.mcore.average import WeightAverage

CHUNKS, RATE = 2, 0.05
DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def modules(dtype: torch.dtype, seed: int) -> list[nn.Module]:
    """The chunks of a model without Megatron."""
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).to(dtype) for _ in range(CHUNKS)]


def student(seed: int = 0) -> Any:
    chunks = modules(torch.float32, seed)
    return SimpleNamespace(modules=chunks, model_chunks=chunks, arch=None, layout=None, platform=None)


@contextmanager
def stub_models() -> Iterator[None]:
    """Models of the average are random models of the requested dtype."""

    def build(*_: Any, dtype: Dtype, **__: Any) -> Any:
        chunks = [module.requires_grad_(False) for module in modules(DTYPES[dtype], seed=99)]
        return SimpleNamespace(modules=chunks, model_chunks=chunks)

    with mock.patch.object(average_module, "build_model", build):
        yield


def make_average(of: Any, dtype: Dtype) -> WeightAverage:
    with stub_models():
        return WeightAverage(of, ParallelConfig(), dtype=dtype, rate=RATE)


def moved(of: Any, steps: int) -> None:
    with torch.no_grad():
        for module in of.modules:
            for parameter in module.parameters():
                parameter += 0.01 * steps * torch.randn_like(parameter)


def state_of(seed: int) -> dict[str, dict[str, Tensor]]:
    """Float32 numbers as in a checkpoint. None of them is representable in bfloat16."""
    return {
        str(index): {name: value.detach().clone() + 1e-4 for name, value in module.named_parameters()}
        for index, module in enumerate(modules(torch.float32, seed))
    }


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_after_a_resume_the_restored_average_scores(dtype: Dtype) -> None:
    average = make_average(student(), dtype)
    saved = state_of(seed=7)
    average.load_state(saved)
    for index, module in enumerate(average.model.modules):
        names = {name for name, _ in module.named_parameters()}
        assert names == saved[str(index)].keys()
        for name, value in module.named_parameters():
            assert value.dtype is DTYPES[dtype]
            assert torch.equal(value, saved[str(index)][name].to(value.dtype)), name


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_resumed_average_continues_from_its_float32_numbers(dtype: Dtype) -> None:
    learner = student()
    average = make_average(learner, dtype)
    saved = state_of(seed=7)
    average.load_state(saved)
    moved(learner, 1)
    average.update()
    for index, (theirs, mine) in enumerate(zip(learner.modules, average.model.modules, strict=True)):
        for (name, now), (_, value) in zip(theirs.named_parameters(), mine.named_parameters(), strict=True):
            before = saved[str(index)][name].double()
            expected = before + RATE * (now.detach().double() - before)
            rounded = 2.0**-8 if dtype == "bfloat16" else 1e-6
            torch.testing.assert_close(value.double(), expected, rtol=rounded, atol=1e-7)


def test_a_new_average_equals_the_student_and_scores_like_it() -> None:
    learner = student()
    average = make_average(learner, "bfloat16")
    for theirs, mine in zip(learner.modules, average.model.modules, strict=True):
        for now, value in zip(theirs.parameters(), mine.parameters(), strict=True):
            assert torch.equal(value, now.detach().bfloat16())
