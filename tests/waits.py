"""Tensors that count how often the host waits for their device, which a CPU tensor otherwise hides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

WAITS = {"cpu", "tolist", "item", "numpy", "__int__", "__float__", "__bool__", "__index__", "unique", "nonzero"}
"""Methods that need values on the host, and those whose result has a size that depends on values."""
_FOUND: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A CPU tensor that counts its waits, also in everything that is computed from it on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if name in WAITS:
            _FOUND[name] += 1
            return found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found
        if isinstance(found, tuple):  # a loop over a tensor splits it first
            return tuple(part.as_subclass(cls) if isinstance(part, torch.Tensor) else part for part in found)
        return found.as_subclass(cls) if isinstance(found, torch.Tensor) else found


def waits() -> dict[str, int]:
    """The waits since the last `on_device`, by method."""
    return dict(_FOUND)


def on_device(tensor: torch.Tensor) -> OnDevice:
    """The tensor as one of a device, with the count at zero."""
    _FOUND.clear()
    return tensor.as_subclass(OnDevice)
