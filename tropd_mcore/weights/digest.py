"""Digests of what a run reads: a model folder file by file, a data file with its number of lines.

Not for who compares them (`train.inputs`) or for checkpoints. Invariants: a digest says nothing of places, so a moved
or copied folder has the same one; only files that a run reads count; a large file is read once, because its digest is
remembered beside size and times (modification and change), and a file that is just being written is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.file_kinds import EMPTY, in_the_way
from tropd_mcore.files import file_digest, publish_text, shown
from tropd_mcore.progress import tick
from tropd_mcore.weights.hf_folder import COMPANION_FILES, COMPANION_FOLDERS, INDEX_FILE, TOKENIZER_FILES

SHOWN_FILES = 4
"""Files of a folder that are named in one line."""
REMEMBERED_BYTES = 1 << 20
"""Smaller files are read again at each launch: that costs less than to remember them."""
SETTLED_NS = 2_000_000_000
"""A file that was written less than this before it was read may still change without another time stamp."""

Fingerprint = tuple[int, int, int]
"""Size in bytes, modification and change time in ns."""


@dataclass(frozen=True)
class FolderDigest:
    """The SHA-256 of each file of a model folder that a run reads, by its name in the folder."""

    files: Mapping[str, str]

    def whole(self) -> str:
        """One digest of all files: names and contents."""
        return _of_names(self.files)

    def weights(self) -> str:
        """The same of the safetensors alone."""
        return _of_names({name: value for name, value in self.files.items() if name.endswith(".safetensors")})

    def changes(self, new: FolderDigest) -> str | None:
        """The files in which `new` differs, with old and new digest, on one line; None where it is the same."""
        names = sorted(name for name in {*self.files, *new.files} if self.files.get(name) != new.files.get(name))
        if not names:
            return None
        shown = (
            f"{name} {short(self.files.get(name))} -> {short(new.files.get(name))}" for name in names[:SHOWN_FILES]
        )
        more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
        return f"sha256 of {', '.join(shown)}{more}"

    def tokenizer(self) -> str:
        """The same of the files that turn text into ids."""
        return _of_names({name: value for name, value in self.files.items() if name in TOKENIZER_FILES})


@dataclass(frozen=True)
class DataDigest:
    """The SHA-256 of a data file and its number of lines."""

    sha256: str
    lines: int


@dataclass
class DigestMemory:
    """Digests of large files that were read before, by resolved path."""

    known: dict[str, tuple[Fingerprint, str]] = field(default_factory=dict)

    def recall(self, path: Path) -> str | None:
        """The digest of `path` if the file is still the one that was read. Raises OSError."""
        found = self.known.get(str(path.resolve()))
        return found[1] if found is not None and found[0] == fingerprint(path) else None

    def remember(self, read: Iterable[tuple[Path, Fingerprint, str]]) -> None:
        """Keep the digests of the large ones among files that were read."""
        for path, print_, digest in read:
            if print_[0] >= REMEMBERED_BYTES and time.time_ns() - max(print_[1:]) > SETTLED_NS:
                self.known[str(path.resolve())] = (print_, digest)

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Drop the files that are not among these resolved paths."""
        self.known = {path: found for path, found in self.known.items() if path in paths}

    def save(self, path: Path) -> None:
        """Publish as JSON. Raises DataError where the place cannot be written."""
        publish_text(path, json.dumps(self.known, indent=1) + "\n")


def short(digest: str | None) -> str:
    """A digest as messages show it."""
    return digest[:12] if digest is not None else "none"


def load_memory(path: Path) -> DigestMemory:
    """What `DigestMemory.save` wrote; an empty memory, which costs another reading, where it cannot be used."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {
            str(key): ((int(size), int(modified), int(changed)), str(digest))
            for key, ((size, modified, changed), digest) in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return DigestMemory()
    return DigestMemory(known)


def fingerprint(path: Path) -> Fingerprint:
    """What tells a file that was written again from one that was not, without reading it. Raises OSError."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def model_files(folder: Path) -> list[str]:
    """Names in `folder` of the files that a run reads, sorted: config, tokenizer, templates, the weights in use.

    Weights in use are those that the index names where there is one. Files that are missing are left out: who needs
    them says so.
    """
    folder = Path(folder)
    names = {"config.json", INDEX_FILE, *COMPANION_FILES, *_weight_files(folder)}
    for sub in COMPANION_FOLDERS:
        names |= {path.relative_to(folder).as_posix() for path in (folder / sub).rglob("*")}
    return sorted(name for name in names if (folder / name).is_file())


def _weight_files(folder: Path) -> set[str]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {path.name for path in folder.glob("*.safetensors")}


def read_files(paths: Iterable[Path]) -> list[tuple[Path, Fingerprint, str]]:
    """(path, fingerprint, SHA-256) of each file, read in full. Raises ModelError where one cannot be read."""
    read = []
    for path in paths:
        try:
            before = fingerprint(path)
            digest = file_digest(path)
            changed = fingerprint(path) != before
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        if changed:
            raise ModelError(f"{path}: changes while it is read; start the run when it is complete")
        read.append((path, before, digest))
        tick()
    return read


def folder_digest(folder: Path, memory: DigestMemory | None = None) -> FolderDigest:
    """The digest of a model folder; files that `memory` knows are not read again, what is read goes into it.

    Raises ModelError where a file cannot be read.
    """
    memory = memory or DigestMemory()
    paths = {name: Path(folder) / name for name in model_files(folder)}
    known = {name: digest for name, path in paths.items() if (digest := memory.recall(path)) is not None}
    unknown = [name for name in paths if name not in known]
    read = read_files(paths[name] for name in unknown)
    memory.remember(read)
    fresh = {name: digest for name, (_, _, digest) in zip(unknown, read, strict=True)}
    return FolderDigest({name: known.get(name) or fresh[name] for name in paths})


def data_digest(path: Path, *, key: str) -> DataDigest:
    """The digest of a data file; `key` names it in messages. Raises DataError where it cannot be read."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    if (found := in_the_way(Path(path))) is not None and found.what != EMPTY:
        raise DataError(f"{key}={shown(path)}: cannot be read: expected JSONL; {found}")
    try:
        with Path(path).open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error.strerror or error}") from error
    return DataDigest(digest.hexdigest(), lines + (last != b"\n"))


def _of_names(digests: Mapping[str, str]) -> str:
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()
