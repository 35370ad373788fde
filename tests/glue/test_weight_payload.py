"""Tensors in the payload of an update: correct bits, copies, and no more memory than available."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from tropd_mcore.errors import ServerError
from tropd_mcore.serving import weight_payload as payload_module
from tropd_mcore.serving.weight_payload import ALIGNMENT, SharedBuffer, by_value, shared_memory_room

DTYPES = {torch.bfloat16, torch.float32, torch.float64, torch.int8}
BY_NAME = b"rebuild_storage_filename"


def many_kinds() -> list[tuple[str, Tensor]]:
    """Of dtypes, sizes that need padding, and memory layouts."""
    numbers = torch.arange(60.0).view(5, 12) / 7
    return [
        ("bfloat16", numbers[:1, :3].bfloat16()),
        ("float32", numbers),
        ("transposed", numbers.T),
        ("slice", numbers[1:4, ::5]),
        ("int8", torch.arange(-3, 4, dtype=torch.int8)),
        ("scalar", torch.tensor(2.5, dtype=torch.float64)),
        ("empty", torch.empty(0, 4)),
        ("parameter", torch.nn.Parameter(numbers[0].clone())),
    ]


def assert_equal(found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, got), (_, wanted) in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and not got.requires_grad, name
        assert torch.equal(got, wanted.detach()), name


def test_tensors_of_every_dtype_and_layout_come_out_of_shared_memory_unchanged() -> None:
    buffer = SharedBuffer()
    payloads = buffer.payloads(many_kinds(), copies=2)
    assert len(payloads) == 2
    for payload in payloads:
        loaded = pickle.loads(payload)
        assert_equal(loaded, many_kinds())
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for _, tensor in loaded)


def test_tensors_of_every_dtype_and_layout_come_out_of_a_payload_by_value_unchanged() -> None:
    payloads = by_value(many_kinds(), copies=3)
    assert len(payloads) == 3 and len(set(payloads)) == 1
    assert_equal(pickle.loads(payloads[0]), many_kinds())


def test_a_handle_names_only_what_a_server_with_another_torch_was_seen_to_read() -> None:
    """See docs/install.md. SGLang refuses names that are not on its list."""
    named: set[str] = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            named.add(f"{module}.{name}")
            return super().find_class(module, name)

    buffer = SharedBuffer()  # keeps the memory while it is read
    Reader(io.BytesIO(buffer.payloads(many_kinds(), copies=1)[0])).load()
    assert {name for name in named if getattr(torch, name.removeprefix("torch."), None) not in DTYPES} == {
        "torch.Size",
        "torch.Tensor",
        "torch.multiprocessing.reductions.rebuild_storage_filename",
        "torch.multiprocessing.reductions.rebuild_tensor",
        "torch.multiprocessing.reductions.rebuild_typed_storage",
        "torch.storage.UntypedStorage",
    }


def test_a_handle_names_its_shared_memory_so_that_any_process_can_open_it() -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    (payload,) = SharedBuffer().payloads([("a", torch.zeros(100_000))], copies=1)
    assert BY_NAME in payload and len(payload) < 1000
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_one_shared_memory_buffer_is_reused_for_every_bucket_and_grows_if_needed() -> None:
    buffer = SharedBuffer()

    def handles_of(size: int) -> bytes:
        expected = [("a", torch.rand(size)), ("b", torch.rand(3))]
        (payload,) = buffer.payloads(expected, copies=1)
        assert_equal(pickle.loads(payload), expected)
        return payload

    first = handles_of(1000)
    assert handles_of(1000) == first, "a handle of the same place"
    handles_of(10)
    assert handles_of(1000) == first, "a smaller bucket does not move it"
    handles_of(5000)
    assert handles_of(1000) != first


@pytest.mark.parametrize("way", ["shared", "value"])
def test_a_payload_holds_copies_of_the_weights(way: str) -> None:
    weight = torch.arange(4.0)
    pack = SharedBuffer().payloads if way == "shared" else by_value
    (payload,) = pack([("a", weight)], copies=1)
    weight += 1
    ((_, loaded),) = pickle.loads(payload)
    assert loaded.tolist() == [0.0, 1.0, 2.0, 3.0]
    loaded.zero_()
    assert weight.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_by_value_a_slice_is_sent_without_the_rest_of_its_tensor() -> None:
    whole = torch.zeros(100_000)
    (payload,) = by_value([("a", whole[7:9])], copies=1)
    assert len(payload) < 2000


def test_a_bucket_that_shared_memory_cannot_hold_is_refused_before_a_byte_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big = torch.zeros(1, dtype=torch.uint8).expand(300 * 2**20)  # without memory of that size
    monkeypatch.setattr(payload_module, "shared_memory_room", lambda: 300 * 2**20 - 1)
    buffer = SharedBuffer()
    with pytest.raises(ServerError, match=r"needs 300 MiB of /dev/shm but 299 are usable: enlarge it"):
        buffer.payloads([("a", big)], copies=1)
    monkeypatch.setattr(payload_module, "shared_memory_room", lambda: 2 * ALIGNMENT)
    (payload,) = buffer.payloads([("a", torch.zeros(17)), ("b", torch.zeros(0))], copies=1)
    assert len(pickle.loads(payload)) == 2, "what just fits is taken"


def test_a_fifth_of_the_free_shared_memory_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {str(tmp_path): 1000}
    monkeypatch.setattr(payload_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[str(path)]))
    monkeypatch.setattr(payload_module, "SHARED_MEMORY", tmp_path)
    assert shared_memory_room() == 800
    monkeypatch.setattr(payload_module, "SHARED_MEMORY", tmp_path / "absent")
    assert shared_memory_room() == 0
