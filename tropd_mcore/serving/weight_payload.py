"""Packs tensors for `/update_weights_from_tensor`: by handle in shared memory, or by value.

By handle needs a server on this host and costs one copy into /dev/shm, for any number of server ranks. By value works
everywhere and costs base64 in JSON, about a hundred times as much. `rollout.publisher` decides what is sent. Invariant:
a payload holds copies; the trainer's own weights are never shared.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.multiprocessing
from torch import Tensor

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.left_behind import note_sharing

SHARED_MEMORY = Path("/dev/shm")
ALIGNMENT = 64
ROOM_FOR_OTHERS = 0.8
"""Fraction of the free shared memory that a buffer may take. Writing beyond the free space kills the process."""


def by_value(named_tensors: list[tuple[str, Tensor]], *, copies: int) -> list[bytes]:
    """Return one payload for each of `copies` ranks. Each holds the tensors' values."""
    whole = [(name, storage_of_its_own(tensor)) for name, tensor in named_tensors]
    return [pickle.dumps(whole, protocol=pickle.HIGHEST_PROTOCOL)] * copies


class SharedBuffer:
    """A shared-memory buffer that carries one bucket of tensors after the other. It grows if a bucket needs more."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def payloads(self, named_tensors: list[tuple[str, Tensor]], *, copies: int) -> list[bytes]:
        """Copy the tensors in and return one payload of handles for each of `copies` ranks.

        Payloads are valid until the next call, so the server must have loaded them by then. Each can be loaded once.
        Raises ServerError if the shared memory is too small.
        """
        offsets, size = _layout([tensor for _, tensor in named_tensors])
        buffer = self._reserve(size)
        views = []
        for (name, tensor), offset in zip(named_tensors, offsets, strict=True):
            view = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor.detach())
            views.append((name, view))
        with _shared_by_file_name():
            return [_pickled(views) for _ in range(copies)]

    def _reserve(self, size: int) -> Tensor:
        if self._bytes is None or self._bytes.nbytes < size:
            self._bytes = None
            room = shared_memory_room()
            if size > room:
                raise ServerError(
                    f"a weight update needs {size >> 20} MiB of {SHARED_MEMORY} but {room >> 20} are usable: "
                    "enlarge it (docker: --shm-size)"
                )
            note_sharing()
            with _shared_by_file_name():
                self._bytes = torch.empty(size, dtype=torch.uint8).share_memory_()
                manager, name, _ = self._bytes.untyped_storage()._share_filename_cpu_()
                note_sharing(manager.decode(), name.decode())
        return self._bytes


def shared_memory_room() -> int:
    """Return how many bytes of shared memory a buffer may take now."""
    return int(shutil.disk_usage(SHARED_MEMORY).free * ROOM_FOR_OTHERS) if SHARED_MEMORY.is_dir() else 0


def _layout(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Byte offset of each tensor, and the end of the last one."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += (tensor.nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


def _pickled(views: list[tuple[str, Tensor]]) -> bytes:
    stream = io.BytesIO()
    ForkingPickler(stream, pickle.HIGHEST_PROTOCOL).dump(views)
    return stream.getvalue()


@contextmanager
def _shared_by_file_name() -> Iterator[None]:
    """Share by file name. The default shares open files, which only a process started from Python could receive."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def storage_of_its_own(tensor: Tensor) -> Tensor:
    """Return a CPU tensor whose storage holds only its own elements, even if it was a slice of a larger one."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
