"""Questions without a public PyTorch API are answered correctly for the installed version."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tropd_mcore.errors import LossInputError, TropdError
from tropd_mcore.kernel import surroundings


class Probe(torch.autograd.Function):
    """Records the surroundings of its forward pass."""

    seen: list[tuple[bool, bool]]

    @staticmethod
    def forward(ctx, number: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        hooks, backward = surroundings.saved_tensor_hooks_are_active(), surroundings.inside_a_backward_pass()
        Probe.seen.append((hooks, backward))
        return number.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return gradient


@pytest.fixture
def leaf() -> Tensor:
    Probe.seen = []
    return torch.ones(3, requires_grad=True)


def test_a_plain_forward_pass_has_no_hooks_and_is_in_no_backward_pass(leaf: Tensor) -> None:
    Probe.apply(leaf).sum().backward()
    assert Probe.seen == [(False, False)]


def test_hooks_are_detected_inside_an_autograd_function(leaf: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        Probe.apply(leaf).sum().backward()
    assert Probe.seen == [(True, False)]


@pytest.mark.parametrize(
    ("reentrant", "seen"), [(False, [(True, False), (True, True)]), (True, [(False, False), (False, True)])]
)
def test_a_forward_pass_rerun_by_a_checkpoint_inside_the_backward_pass_is_detected(
    leaf: Tensor, reentrant: bool, seen: list[tuple[bool, bool]]
) -> None:
    checkpoint(lambda number: torch.sin(Probe.apply(number)), leaf, use_reentrant=reentrant).sum().backward()
    assert Probe.seen == seen


def test_functional_transforms_are_detected() -> None:
    seen: list[bool] = []

    def probed(number: Tensor) -> Tensor:
        seen.append(surroundings.functional_transforms_are_active())
        return number.sum()

    torch.func.grad(probed)(torch.ones(3))
    torch.func.vmap(probed)(torch.ones(2, 3))
    probed(torch.ones(3))
    assert seen == [True, True, False]


def test_if_pytorch_cannot_tell_hooks_are_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert surroundings.saved_tensor_hooks_are_active()


def test_an_objective_that_changes_a_saved_tensor_in_place_is_refused_even_with_hooks() -> None:
    with torch.autograd.graph.save_on_cpu(), surroundings.shield():
        number = torch.ones(3, requires_grad=True)
        square = torch.exp(number * 1.0)
        result = square.sin()
        square.mul_(2.0)
        with pytest.raises(LossInputError, match="changed a number in place"):
            result.sum().backward()


def test_an_error_of_the_loss_is_a_value_error_and_ends_a_job_by_its_message() -> None:
    assert issubclass(LossInputError, ValueError) and issubclass(LossInputError, TropdError)


def test_the_loss_does_not_import_the_compiler() -> None:
    code = (
        "import sys, tropd_mcore.kernel.support_loss, tropd_mcore.kernel.topk;assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ.copy())
