"""Makes the CPU stand where megatron-core writes "cuda".

Not for code of this project, which passes devices explicitly. Two means: a TorchFunctionMode (the mechanism of
`torch.set_default_device`, so no attribute of torch changes) for literals such as `device="cuda"` and `Tensor.cuda()`,
and two functions of `torch.cuda` that Megatron calls without asking whether a GPU exists. `torch.cuda.is_available()`
stays False. Invariant: a call that names no CUDA device is passed on as it is.

The mode is thread-local: it holds in the thread that called `install`.
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
    """Runs a torch function that names a CUDA device on the CPU."""

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
    """Enter the mode for the life of the process and replace what Megatron calls of torch.cuda."""
    global _active
    assert not torch.cuda.is_available(), "the CPU platform never runs beside a GPU"
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]  # used as device=... only
    torch.cuda.synchronize = lambda device=None: None
    # Megatron's jit_fuser is torch.compile: on a CPU it costs a C++ build in the first step and gains nothing.
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

    torch hands `backward` itself to the mode and runs it with the mode popped, so that code inside a backward pass (a
    custom Function, recomputed activations) would see the literals.
    """
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        if any(mode is _MODE for mode in _get_current_function_mode_stack()):
            return run_backward(*args, **kwargs)
        with _MODE:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_in_mode
