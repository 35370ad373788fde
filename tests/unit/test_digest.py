"""Digests of model folders and data files depend on contents, not paths, and large files are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.weights import digest
from tropd_mcore.weights.digest import (
    DigestMemory,
    data_digest,
    folder_digest,
    load_memory,
    model_files,
    read_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder in two shards, with files that no run reads."""
    root = tmp_path / "model"
    (root / "additional_chat_templates").mkdir(parents=True)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    contents = {
        "config.json": "{}",
        "tokenizer.json": "tokens",
        "tokenizer_config.json": "settings",
        "generation_config.json": "ends",
        "chat_template.jinja": "template",
        "additional_chat_templates/tool.jinja": "tools",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}),
        shards[0]: "first",
        shards[1]: "second",
        "consolidated.safetensors": "the same once more",
        "README.md": "words",
        "pytorch_model.bin": "pickle",
    }
    for name, text in contents.items():
        (root / name).write_text(text)
    return root


def test_the_digest_of_a_folder_covers_the_files_that_a_run_reads(folder: Path) -> None:
    assert model_files(folder) == [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert folder_digest(folder).files["tokenizer.json"] == hashlib.sha256(b"tokens").hexdigest()


def test_without_a_readable_index_every_weight_file_counts(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("torn {")
    assert "consolidated.safetensors" in model_files(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "consolidated.safetensors" in model_files(folder)


def test_a_moved_or_copied_folder_has_the_same_digest_and_unread_files_do_not_count(
    folder: Path, tmp_path: Path
) -> None:
    before = folder_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    (copy / "README.md").write_text("other words")
    (copy / "pytorch_model.bin").unlink()
    after = folder_digest(copy)
    assert (before.whole(), before.weights(), before.tokenizer()) == (after.whole(), after.weights(), after.tokenizer())
    assert after.weights() == before.weights()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model-00002-of-00002.safetensors", {"whole", "weights"}),
        ("tokenizer.json", {"whole", "tokenizer"}),
        ("tokenizer_config.json", {"whole", "tokenizer"}),
        ("chat_template.jinja", {"whole"}),
        ("generation_config.json", {"whole"}),
        ("config.json", {"whole"}),
        ("additional_chat_templates/tool.jinja", {"whole"}),
    ],
)
@pytest.mark.parametrize("edit", ["rewritten", "removed"])
def test_a_change_of_any_file_that_is_read_changes_the_digest_of_its_part(
    folder: Path, name: str, changed: set[str], edit: str
) -> None:
    def parts() -> dict[str, str]:
        found = folder_digest(folder)
        return {"whole": found.whole(), "weights": found.weights(), "tokenizer": found.tokenizer()}

    before = parts()
    if edit == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_text((folder / name).read_text()[::-1] + ".")
    after = parts()
    assert {part for part in before if before[part] != after[part]} == changed


def test_swapping_the_names_of_two_files_changes_the_digest(folder: Path) -> None:
    before = folder_digest(folder)
    one, two = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert folder_digest(folder).weights() != before.weights()


@pytest.mark.parametrize(
    ("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"a\n\nb\n", 3)], ids=repr
)
def test_the_digest_and_line_count_of_a_data_file_are_those_of_its_bytes(
    tmp_path: Path, content: bytes, lines: int
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    found = data_digest(tmp_path / "data.jsonl", key="data.prompts")
    assert (found.sha256, found.lines) == (hashlib.sha256(content).hexdigest(), lines)


def test_files_that_cannot_be_read_are_named_in_the_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.prompts=.*absent: cannot be read: expected JSONL; not found"):
        data_digest(tmp_path / "absent", key="data.prompts")
    with pytest.raises(ModelError, match=r"absent: cannot be read: No such file"):
        read_files([tmp_path / "absent"])


def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = digest.file_digest

    def slow(path: Path) -> str:
        found = real(path)
        path.write_text("the copy goes on")
        return found

    monkeypatch.setattr(digest, "file_digest", slow)
    with pytest.raises(ModelError, match=r"config\.json: changes while it is read"):
        read_files([folder / "config.json"])


@pytest.fixture
def memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], DigestMemory]:
    """The cached digests of the shards, which count as large and as written long ago."""
    monkeypatch.setattr(digest, "REMEMBERED_BYTES", 5)
    monkeypatch.setattr(digest, "SETTLED_NS", -(10**18))
    remembered = DigestMemory()
    remembered.remember(read_files(folder / name for name in model_files(folder)))
    remembered.save(tmp_path / "digests.json")
    return lambda: load_memory(tmp_path / "digests.json")


def test_the_digest_of_a_large_file_is_cached_and_that_of_a_small_one_is_not(
    folder: Path, memory: Callable[[], DigestMemory]
) -> None:
    assert memory().recall(folder / "model-00002-of-00002.safetensors") == hashlib.sha256(b"second").hexdigest()
    assert memory().recall(folder / "config.json") is None


@pytest.mark.parametrize("edit", ["longer", "same length", "same length and modification time", "replaced"])
def test_the_cached_digest_of_a_rewritten_file_is_not_used(
    folder: Path, memory: Callable[[], DigestMemory], edit: str
) -> None:
    """The change time cannot be set back, so a copy that keeps the modification time is also detected."""
    path = folder / "model-00002-of-00002.safetensors"
    before = path.stat()
    text = "another length" if edit == "longer" else "SECOND"
    if edit == "replaced":
        fresh = folder / "fresh"
        fresh.write_text(text)
        fresh.replace(path)
    else:
        path.write_text(text)
    if edit == "same length and modification time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert memory().recall(path) is None


def test_the_digest_of_a_file_that_was_just_written_is_not_cached(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "REMEMBERED_BYTES", 5)
    monkeypatch.setattr(digest, "SETTLED_NS", 10**18)
    remembered = DigestMemory()
    remembered.remember(read_files([folder / "model-00002-of-00002.safetensors"]))
    assert remembered.known == {}


def test_an_unreadable_cache_of_digests_counts_as_empty(tmp_path: Path) -> None:
    for text in ("torn {", "[]", '{"a": [1, 2]}', '{"a": [[1, 2, "x"], "d"]}'):
        (tmp_path / "digests.json").write_text(text)
        assert load_memory(tmp_path / "digests.json").known == {}
    assert load_memory(tmp_path / "absent").known == {}


def test_the_cache_of_digests_drops_files_of_folders_that_are_no_longer_read(
    folder: Path, memory: Callable[[], DigestMemory]
) -> None:
    kept = str((folder / "model-00001-of-00002.safetensors").resolve())
    remembered = memory()
    assert len(remembered.known) > 1
    remembered.forget_all_but({kept})
    assert set(remembered.known) == {kept}
