"""A teacher with its weights in host memory between scorings: the same scores bit for bit, and an empty device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist import offload_ranks, reference
from tests.dist.layouts import Case
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.mcore.offload import HostWeights

LENGTHS = [(3, 4, 9), (5, 0, 12), (2, 6, 3), (7, 3, 17)]
CASES: dict[int, dict[str, Case]] = {
    1: {"one": Case()},
    2: {"tp2": Case(tensor=2, sequence_parallel=True), "pp2": Case(pipeline=2), "dp2": Case()},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("ranks", CASES)
def test_scores_are_the_same_and_the_device_is_empty_between_them(ranks: int, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "teacher", num_hidden_layers=3, tied=tied, vocab_size=131)
    found = run_on_ranks(offload_ranks.compare, ranks, folder, reference.make_rollouts(LENGTHS), CASES[ranks])
    for said in found:
        for name, (same, bytes_before, bytes_between, bytes_inside) in said.items():
            assert same, name
            assert bytes_before == bytes_inside > 0 and bytes_between == [0, 0, 0], (name, bytes_between)


def test_the_offloaded_teacher_trains_the_student_to_the_same_bits(tmp_path: Path) -> None:
    teacher = write_tiny_model(tmp_path / "teacher", num_hidden_layers=3, vocab_size=131)
    student = write_tiny_model(tmp_path / "student", num_hidden_layers=2, vocab_size=101, seed=1)
    rollouts = reference.make_rollouts(LENGTHS)
    (found,) = run_on_ranks(offload_ranks.gradients, 1, student, teacher, rollouts)
    plain, off = found
    assert plain.keys() == off.keys() and all(torch.equal(plain[name], off[name]) for name in plain)


class Frozen(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False)


def test_weights_are_dropped_after_an_error_and_each_copy_is_fresh() -> None:
    module = Frozen()
    weights = HostWeights(module.parameters(), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), weights.resident():
        module.weight.data.zero_()  # a fault of the block must not reach the host copy
        raise RuntimeError("out of memory")
    assert module.weight.numel() == 0
    with weights.resident():
        assert float(module.weight.sum()) == 15.0


def test_on_a_gpu_the_host_copy_is_pinned_and_copies_go_to_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the GPU: what torch is asked for, and numbers on the CPU."""
    gpu, made, moved = torch.device("cuda", 1), [], []
    real_empty = torch.empty

    def empty(*size: Any, **keywords: Any) -> Tensor:
        made.append((keywords.get("device"), keywords.get("pin_memory")))
        return real_empty(*size, dtype=keywords["dtype"])

    def to(self: Tensor, device: torch.device, **keywords: Any) -> Tensor:
        moved.append((device, keywords))
        return self.clone()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "to", to)
    module = Frozen()
    weights = HostWeights(module.parameters(), gpu)
    assert made == [(None, True), (gpu, None)] and module.weight.numel() == 0
    for number in (1, 2):
        with weights.resident():
            assert float(module.weight.sum()) == 15.0
        assert moved == [(gpu, {"non_blocking": True, "copy": True})] * number
        assert made[-1] == (gpu, None) and module.weight.numel() == 0
