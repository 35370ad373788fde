"""Files of the wrong kind are recognised by their first bytes, without blocking, in one line with the remedy."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tropd_mcore.data.jsonl import read_lines
from tropd_mcore.data.prompt_file import read_prompt_file
from tropd_mcore.data.responses import read_responses
from tropd_mcore.data.tokenizer import read_tokenizer
from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.file_kinds import HEAD_BYTES, folder_in_the_way, in_the_way, kind_of
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.weights.architecture import read_architecture
from tropd_mcore.weights.digest import data_digest
from tropd_mcore.weights.json_file import read_json_object

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713\nsize 2\n"
LINE = json.dumps({"id": "a", "prompt": "one"})


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("prompts.jsonl", LINE)


def write_tar(path: Path) -> None:
    (path.parent / "inside").write_text(LINE)
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inside")


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, "not found"),
    "link": (lambda path: path.symlink_to("nowhere"), "a link to nowhere, which is not there"),
    "directory": (Path.mkdir, "a directory"),
    "fifo": (os.mkfifo, r"a pipe \(FIFO\)"),
    "socket": (listen, "a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "empty": (content(b""), "an empty file"),
    "zeros": (content(bytes(700)), "a file of zeros"),
    "lfs": (content(LFS), "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    "parquet": (content(b"PAR1\x15\x04\x15"), "a parquet file; convert it to JSONL"),
    "arrow": (content(b"ARROW1\x00\x00"), "an Arrow file"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(LINE.encode())), "a gzip archive; unpack it"),
    "zstd": (content(b"\x28\xb5\x2f\xfd\x04\x00"), "a zstd archive"),
    "zip": (write_zip, "a zip archive"),
    "tar": (write_tar, "a tar archive"),
    "pickle": (content(b"\x80\x04\x95\x10"), "a pickle"),
    "utf-16": (content(LINE.encode("utf-16")), "text in UTF-16; save it as UTF-8"),
    "utf-16 without a mark": (content(LINE.encode("utf-16-le")), "text in UTF-16"),
    "utf-32": (content(LINE.encode("utf-32")), "text in UTF-32"),
    "web page": (content(b"<!DOCTYPE html><html>"), "a web page"),
}
"""How each kind is made, and its message."""
TEXTS: dict[str, tuple[bytes, str]] = {
    "bom": (b"\xef\xbb\xbf" + LINE.encode(), r"a byte order mark \(BOM\) at the start of line 1"),
    "array": (f"[{LINE}]".encode(), r"a JSON array; write its elements on a line each \(jq"),
    "array over lines": (f"\n[\n  {LINE}\n]\n".encode(), "a JSON array"),
    "object over lines": (json.dumps(json.loads(LINE), indent=1).encode(), "a JSON object over several lines"),
    "csv": (b"id,prompt,answer\na,one,1\n", "CSV with the columns id, prompt, answer; write each row as a JSON object"),
    "tsv": (b"id\tprompt\na\tone\n", "tab-separated values"),
    "latin-1": (f"{LINE}\n".encode() + b'{"id": "b", "prompt": "na\xefve"}\n', r"line 2 is not UTF-8 text .*0xef"),
}
"""Texts that are not JSONL."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_wrong_file_is_named(tmp_path: Path, kind: str) -> None:
    make, said = KINDS[kind]
    make(tmp_path / "file")
    found = in_the_way(tmp_path / "file")
    assert found is not None and "\n" not in str(found) and "; " in str(found)
    with pytest.raises(DataError, match=said):
        raise DataError(str(found))


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_of_lines_names_key_file_and_kind(tmp_path: Path, kind: str) -> None:
    make, said = KINDS[kind]
    path = tmp_path / "lines.jsonl"
    make(path)
    for read, key in (
        (lambda: read_prompt_file(path), "data.prompts"),
        (lambda: read_responses(path, ()), "data.teacher_responses"),
        (lambda: list(read_lines(path, "--prompts")), "--prompts"),
    ):
        with pytest.raises(DataError, match=rf"^{key}=.*lines\.jsonl: expected JSONL, .*{said}") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("empty", "zip", "link")])
def test_readers_of_json_arrays_and_data_also_name_the_kind_of_a_wrong_file(tmp_path: Path, kind: str) -> None:
    make, said = KINDS[kind]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(ModelError, match=rf"config\.json: cannot be read: expected a JSON object; .*{said}"):
        read_json_object(path)
    with pytest.raises(DataError, match=rf"cannot read .*expected arrays \(\.npz\); .*{said}"):
        load_rollouts(path)
    with pytest.raises(DataError, match=rf"^data\.prompts=.*{said}"):
        data_digest(path, key="data.prompts")


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_that_is_not_jsonl_is_named(tmp_path: Path, name: str) -> None:
    data, said = TEXTS[name]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"^data\.prompts=.*{said}") as caught:
        read_prompt_file(path)
    assert "\n" not in str(caught.value)


def test_valid_files_pass_the_check_of_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for text in (LINE, f"\n\n{LINE}\r\n", '{"id": "caf\u00e9, \u4e16", "prompt": "a, b"}'):
        path.write_text(text, encoding="utf-8")
        assert in_the_way(path) is None and len(read_prompt_file(path)) == 1
    assert folder_in_the_way(tmp_path) is None


@pytest.mark.parametrize("size", [*range(0x280, 0x2A0), 0x380, 0x480, 0x580, 0x8B1F])
def test_a_safetensors_file_is_not_mistaken_for_another_kind_at_any_header_size(size: int) -> None:
    head = size.to_bytes(8, "little") + b'{"model.embed_tokens.weight":{"dtype":"F32"'.ljust(HEAD_BYTES - 8)
    assert kind_of(head) is None


def test_a_path_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_prompt_file(tmp_path / "two\nlines\x1b[31m.jsonl")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and r"two\nlines" in str(caught.value)


def test_a_folder_that_is_not_a_model_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    for name, said in (
        ("absent", "not found; expected a directory"),
        ("file", "found a file; name the folder that holds it"),
        ("link", "a link to gone, which is not there"),
        ("file/below", "a file where a folder should be"),
    ):
        with pytest.raises(ModelError, match=rf"model folder .*{name}: .*{said}"):
            read_architecture(tmp_path / name)
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model/config.json")
    with pytest.raises(ModelError, match=r"a pipe \(FIFO\)"):
        read_architecture(tmp_path / "model")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pipe_in_a_tokenizer_folder_does_not_block_the_reader(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: expected a file of the tokenizer; found a pipe"):
        read_tokenizer(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(LINE)
    path.chmod(0)
    with pytest.raises(DataError, match="a file that this user may not read; give the right"):
        read_prompt_file(path)
