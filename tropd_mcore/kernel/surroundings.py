"""The surroundings of the kernel's autograd functions: saved-tensor hooks, checkpointing, autocast, transforms.

The kernel runs inside a caller's autograd. This module finds out which of these are active around a call, and refuses
those that would give a wrong gradient. It does not compute anything. docs/autograd.md has the table of supported and
refused cases.

PyTorch has no public function for three of the questions. They use the private functions that torch.utils.checkpoint
and torch.autograd.function use themselves. Each docstring says which answer is assumed if a version lacks the function;
tests/unit/test_surroundings.py fails for such a version.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

NO_GRAPH_TASK = -1
"""PyTorch's id of the running backward pass if none is running."""


def saved_tensor_hooks_are_active() -> bool:
    """Whether saved tensors pass through hooks here: activation offload, non-reentrant checkpointing, save_on_cpu.

    Behind a hook, a saved tensor has no version check, and several readers may hold the same memory. So a saved tensor
    must not be overwritten. True if PyTorch cannot tell.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def inside_a_backward_pass() -> bool:
    """Whether this code runs inside a backward pass, like a forward pass that a checkpoint repeats.

    False if PyTorch cannot tell.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != NO_GRAPH_TASK


def functional_transforms_are_active(*tensors: Tensor | None) -> bool:
    """Whether torch.func.grad, vmap, jvp or similar wrap this call or one of the tensors.

    False if PyTorch cannot tell.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if active is not None and active():
        return True
    names = ("is_functorch_wrapped_tensor", "is_legacy_batchedtensor")  # the second is for is_grads_batched
    wrapped = [getattr(torch._C._functorch, name) for name in names if hasattr(torch._C._functorch, name)]
    return any(is_wrapped(tensor) for is_wrapped in wrapped for tensor in tensors if tensor is not None)


def refuse_functional_transforms(*tensors: Tensor | None) -> None:
    """Raise LossInputError inside torch.func transforms, because they would run the loss on wrapped tensors."""
    if functional_transforms_are_active(*tensors):
        raise LossInputError(
            "the loss was called inside a functional transform (torch.func.grad, vmap, jvp, is_grads_batched); "
            "expected a plain call followed by backward() or torch.autograd.grad"
        )


def refuse_forward_mode(ctx: Any, *tangents: Tensor | None) -> Any:
    """The `jvp` of the kernel's autograd functions: raises LossInputError, because there is none."""
    raise LossInputError("the loss has no forward-mode derivative; expected backward() or torch.autograd.grad")


def refuse_a_repeated_forward(key: str) -> None:
    """Raise LossInputError inside a backward pass, for a forward pass that adds to main_grad."""
    if inside_a_backward_pass():
        raise LossInputError(
            f"{key}: the forward pass adds dW to main_grad, and it was run again inside a backward pass, as activation "
            "checkpointing does; keep the loss outside the checkpoint or use the weight-gradient mode deferred"
        )


def begin_backward(ctx: Any, *gradients: Tensor | None) -> None:
    """Mark the backward pass of this call as started. `gradients` are the gradients it was given.

    Raises LossInputError if it is the second one, if its result is to be differentiated again, or if it is batched.
    """
    refuse_functional_transforms(*gradients)
    # Only with create_graph=True does the engine run a backward pass with gradients enabled.
    if torch.is_grad_enabled():
        raise LossInputError(
            "the loss has no second derivative: its backward pass was run with create_graph=True; expected "
            "create_graph=False"
        )
    if getattr(ctx, "spent", False):
        raise LossInputError(
            "a second backward pass through the same loss: its gradients were handed out, or written over the logits, "
            "by the first; call the loss again instead of backward(retain_graph=True)"
        )
    ctx.spent = True


def shield() -> AbstractContextManager[None]:
    """Keep the hooks around a call away from the small graph that the kernel differentiates itself.

    Otherwise non-reentrant checkpointing would run the whole checkpointed function, and with it the kernel, again for
    each tensor that this graph saved. The graph exists for one chunk only, so there is nothing to offload.
    """
    return _version_checked() if saved_tensor_hooks_are_active() else nullcontext()


@contextmanager
def _version_checked() -> Iterator[None]:
    """Hooks that change nothing but keep the version check, which PyTorch drops for hooked tensors."""

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        return tensor, tensor._version

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, version = saved
        if tensor._version != version:
            raise LossInputError(
                "the objective changed a number in place that its own gradient needs; use an operation that makes a "
                "new tensor"
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off: the kernel and the objective choose their dtypes themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def outside_compile(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`torch.compiler.disable` that does not import the compiler unless it has been imported already.

    If torch.compile reaches the function, it leaves the function and all that it calls out of the graph: one graph
    break.
    """

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        disabled: Callable[Parameters, Result] = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable sets it too
    return call
