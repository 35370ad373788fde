"""The loss inside other autograd code on a GPU: Triton writes by pointer, and save_on_cpu really copies.

How to run: see test_kernel_on_cuda. The situations are those of tests/dist/test_autograd.py, on one rank through NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests import autograd_cases
from tests.autograd_cases import FORMS, SITUATIONS, Setting, outcome
from tests.dist.test_autograd import table_in_docs, wrong

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_on_cuda_every_form_is_right_or_refused_in_every_situation_as_documented(backend: str) -> None:
    found = autograd_cases.outcomes(backend, "cuda")
    assert wrong(found) == []
    stated = table_in_docs()
    for situation, row in found.items():
        assert {form: cell.split(" ")[0] for form, cell in stated[situation].items()} == {
            form: cell.split(":")[0] for form, cell in row.items()
        }, situation


def test_a_raw_write_over_the_logits_would_not_be_noticed_without_the_version_bump(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    situation = SITUATIONS["after tanh, which saved its output"]
    setting = Setting("triton", device="cuda", **FORMS["logits"])
    assert outcome(setting, situation).startswith("refused")
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensors: None)
    assert outcome(setting, situation).startswith("WRONG")
