"""Redirects the "cuda" device that megatron-core hard-codes to the CPU.

Code of this project does not need it, because it passes devices explicitly. Two mechanisms are used. A
TorchFunctionMode handles literals such as `device="cuda"` and `Tensor.cuda()`; `torch.set_default_device` uses the same
mechanism, and no attribute of torch changes. In addition two functions of `torch.cuda` are replaced, because Megatron
calls them without checking for a GPU. `torch.cuda.is_available()` stays False. Invariant: a call that names no CUDA
device is passed on unchanged.

The mode is thread-local: it applies only in the thread that called `install`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo.config
import torch.autograd
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

CPU = torch.device("cpu")

# Megatron's optimizers recognise dtypes by the CUDA spelling of Tensor.type().
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaLiteralsOnCpu(TorchFunctionMode):
    """Runs torch functions that name a CUDA device on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # a CPU build has no pinned allocator
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


_MODE = _CudaLiteralsOnCpu()
_active = False


def is_active() -> bool:
    """Whether `install` has run in this process."""
    return _active


def install() -> None:
    """Enter the mode for the life of the process and replace the functions of torch.cuda that Megatron calls."""
    global _active
    assert not torch.cuda.is_available(), "the CPU platform never runs beside a GPU"
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]  # used as device=... only
    torch.cuda.synchronize = lambda device=None: None
    # Megatron's jit_fuser is torch.compile. On a CPU that costs a C++ build in the first step and saves no time.
    torch._dynamo.config.disable = True
    _keep_mode_in_backward()
    _MODE.__enter__()
    _active = True


def _names_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


def _keep_mode_in_backward() -> None:
    """Re-enter the mode around the autograd engine.

    torch passes `backward` itself to the mode and then runs it with the mode popped. Without this function, code inside
    a backward pass (a custom Function, recomputed activations) would still see the "cuda" literals.
    """
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        if any(mode is _MODE for mode in _get_current_function_mode_stack()):
            return run_backward(*args, **kwargs)
        with _MODE:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_in_mode
