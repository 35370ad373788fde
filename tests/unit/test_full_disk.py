"""A full, broken or read-only disk, for every writer: one line with file and key, no partial file, and the same call
works once there is room.

Three kinds of disk: a kernel that refuses to let a file grow (RLIMIT_FSIZE, which needs no rights), a real full file
system if the tests run as root, and each error number at the moment of the flush.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.glue.stubs import make_rollout
from tests.tiny_models import write_tiny_model
from tests.unit.test_stored_scores import candidates, micro_batches, scores_of
from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.files import PARTIAL, append_text, partial_name, publish_text, remove_left_partials, sync
from tropd_mcore.monitor.jsonl import JsonLines
from tropd_mcore.records.replay import ScoreKey, save_rollouts, save_scores
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.records.token_file import save_token_sample
from tropd_mcore.rollout.prefixes import _append
from tropd_mcore.types import TokenTable
from tropd_mcore.weights.digest import DigestMemory
from tropd_mcore.weights.hf_folder import HfReader, write_hf_folder

ROOM_BYTES = 512
ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


def write_scores(root: Path) -> None:
    batches = micro_batches()
    key = ScoreKey("teacher", batches, candidates(batches))
    save_scores(RunDir(root).scores(0, 0, 0), key, [scores_of(batch, own=True, entropy=True) for batch in batches])


def write_tokens(root: Path) -> None:
    rows = np.arange(400)
    columns = {"sample_index": rows // 40, "epoch": 0 * rows, "token_index": rows % 40, "student_logp": -rows / 7.0}
    save_token_sample(RunDir(root).tokens(0), TokenTable(columns=columns), 4)


WRITERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "metrics line": (
        lambda root: JsonLines(root / "metrics.jsonl", 9).write(9, {f"metric/{i}": i / 3 for i in range(60)}),
        "metrics.jsonl",
        "run.dir",
    ),
    "rollouts": (
        lambda root: save_rollouts(RunDir(root).rollouts(3), [make_rollout("a", "p", 40)]),
        "step_000003.npz",
        "run.dir",
    ),
    "scores": (write_scores, "step_000000.dp0.cp0.npz", "run.dir"),
    "tokens": (write_tokens, "step_000000.npz", "run.dir"),
    "configuration": (lambda root: RunDir(root).record_config("a: 1\n" * 200), "config.resolved.yaml", "run.dir"),
    "digests": (
        lambda root: DigestMemory({str(i): ((1, 2, 3), "0" * 64) for i in range(20)}).save(root / "digests.json"),
        "digests.json",
        "run.dir",
    ),
    "teacher responses": (
        lambda root: _append(root / "responses.jsonl.partial", {str(i): json.dumps([0] * 40) for i in range(9)}),
        "responses.jsonl.partial",
        r"data\.teacher_responses \(or --out\)",
    ),
    "report": (lambda root: publish_text(root / "report.html", "x" * 999, key="--out"), "report.html", "--out"),
}
"""Each writer, a part of the file's name, and the key that the message must name. All write over 512 bytes."""


@contextmanager
def files_cannot_grow() -> Iterator[None]:
    """The kernel lets no file of this process grow beyond ROOM_BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one block. Only root can make it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def contents(root: Path) -> dict[str, bytes]:
    """Every file under `root`, including hidden ones."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(write: Callable[[Path], object], root: Path, *, name: str, key: str) -> str:
    with pytest.raises(DataError, match=rf"^cannot write \S*{name}: .*; .*\bset {key} to") as caught:
        write(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_cannot_grow_gives_a_one_line_error_and_leaves_nothing_half_written(
    tmp_path: Path, writer: str
) -> None:
    write, name, key = WRITERS[writer]
    before = contents(tmp_path)
    with files_cannot_grow():
        said = refused(write, tmp_path, name=name, key=key)
    assert "make room there and run it again" in said
    left = contents(tmp_path)
    assert {file: data for file, data in left.items() if data} == before
    write(tmp_path)
    assert any(name in file for file in contents(tmp_path))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_file_system_gives_a_one_line_error_and_the_same_call_works_once_there_is_room(
    small_disk: Path, writer: str
) -> None:
    write, name, key = WRITERS[writer]
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space left"):
        while True:
            stream.write(bytes(4096))
    assert "No space left on device; make room" in refused(write, small_disk, name=name, key=key)
    assert not [file for file, data in contents(small_disk).items() if data and file != "filler"]
    filler.unlink()
    write(small_disk)
    assert any(name in file for file in contents(small_disk))


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_disk_error_gives_one_line_and_keeps_the_old_file(
    tmp_path: Path, writer: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, name, key = WRITERS[writer]
    write(tmp_path)
    before = contents(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert os.strerror(number) in refused(write, tmp_path, name=name, key=key)
    assert contents(tmp_path) == before
    write(tmp_path)


def test_a_line_that_could_not_be_appended_leaves_the_lines_before_it_intact(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, 0)
    sink.write(0, {"loss": 0.5})
    before = path.read_bytes()
    with files_cannot_grow(), pytest.raises(DataError, match=r"cannot write .*metrics\.jsonl: File too large"):
        sink.write(1, {f"metric/{i}": i / 3 for i in range(60)})
    assert path.read_bytes() == before
    sink.write(1, {"loss": 0.25})
    assert path.read_text().count("\n") == 2 and path.read_bytes().startswith(before)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_a_partial_line_left_by_a_crash_is_removed_before_the_next_append(tmp_path: Path, size: int) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"whole\n" + b"x" * size)
    append_text(path, "next\n")
    assert path.read_bytes() == b"whole\nnext\n"
    path.write_bytes(b"y" * size)
    append_text(path, "first\n")
    assert path.read_bytes() == b"first\n"


def test_an_export_without_room_gives_a_one_line_error_and_leaves_no_folder(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    with HfReader(source) as reader:
        weights: list[tuple[str, torch.Tensor]] = [(name, reader.tensor(name)) for name in reader.names()]
    before = contents(tmp_path)
    with files_cannot_grow(), pytest.raises(ModelError, match=r"output \S+: writing failed .*; make room") as caught:
        write_hf_folder(tmp_path / "out", weights, source_folder=source)
    assert "\n" not in str(caught.value) and contents(tmp_path) == before
    write_hf_folder(tmp_path / "out", weights, source_folder=source)


def test_a_file_system_without_directory_flush_is_reported_once_and_file_flushes_stay_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flush = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    for number in range(3):
        publish_text(tmp_path / f"{number}.txt", "x")
    assert caplog.text.count("does not flush directories") == 1
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid")))
    with pytest.raises(OSError, match="Invalid"):
        sync(tmp_path / "0.txt")
    with pytest.raises(DataError, match="cannot write"):
        publish_text(tmp_path / "4.txt", "x")


def test_temporary_files_of_killed_writers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    mine = partial_name(tmp_path / "a.npz")
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = Path(str(mine).replace(f".{os.getpid()}@", f".{ended.pid}@"))
    elsewhere = tmp_path / f".b.npz.{ended.pid}@another.machine.example{PARTIAL}"
    forgotten = tmp_path / f".c.npz.{ended.pid}@another.machine.example{PARTIAL}"
    other = tmp_path / "responses.jsonl.partial"
    for path in (mine, dead, elsewhere, forgotten, other):
        path.touch()
    os.utime(forgotten, (0, 0))
    folder = tmp_path / dead.name.replace("a.npz", "folder")
    (folder / "inside").mkdir(parents=True)
    assert remove_left_partials(tmp_path) == 3
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, other])
