"""Measure the peak memory that a piece of code allocates, by following every tensor that it creates."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Allocations:
    """Bytes of the storages that were created within the block."""

    now: int = 0
    peak: int = 0


@contextmanager
def traced_allocations() -> Iterator[Allocations]:
    """Within the block, the yielded object holds the bytes that are alive now and their maximum so far.

    Memory that a kernel allocates and frees inside one operator is not seen.
    """
    found = Allocations()
    with _Tracer(found):
        yield found


class _Tracer(TorchDispatchMode):
    def __init__(self, found: Allocations) -> None:
        super().__init__()
        self.found = found
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in before | self.known:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.found.now += size
        self.found.peak = max(self.found.peak, self.found.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.found.now -= size


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
