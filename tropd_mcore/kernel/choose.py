"""The backend that `loss.backend` names.

Triton and the compiler are imported only if they are chosen, so a machine without them can run the other backends.
"""

from __future__ import annotations

from functools import cache

import torch

from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import Backend
from tropd_mcore.kernel.eager import EagerBackend

NAMES = ("auto", "eager", "compile", "triton")


@cache
def backend(name: str, device: torch.device) -> Backend:
    """Return the backend for logits on `device`: one object per choice, which keeps what it has compiled.

    `auto` is triton on CUDA and eager elsewhere. Raises ConfigError if the backend cannot run.
    """
    if name not in NAMES:
        raise ConfigError([f"loss.backend={name} is none of {', '.join(NAMES)}"])
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return EagerBackend()
    if name == "compile":
        from tropd_mcore.kernel.compiled import CompiledBackend

        return CompiledBackend(device)
    if device.type != "cuda":
        raise ConfigError([f"loss.backend={name} runs on CUDA and the logits are on {device.type}; use auto or eager"])
    from tropd_mcore.kernel.triton_backend import TritonBackend

    return TritonBackend()
