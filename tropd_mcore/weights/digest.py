"""Digests of the files that a run reads: a model folder file by file, a data file with its number of lines.

This module does not compare digests (`train.inputs`) and does not handle checkpoints. Invariants: a digest does not
depend on the path, so a moved or copied folder keeps it. Only files that a run reads count. A large file is read once:
its digest is remembered together with its size and its modification and change times. A file that may still be
changing is not remembered.
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
"""Most files of a folder that a message names."""
REMEMBERED_BYTES = 1 << 20
"""Smaller files are read again at each launch, because that costs less than remembering them."""
SETTLED_NS = 2_000_000_000
"""A file read within this time after it was written may still change without a new time stamp."""

Fingerprint = tuple[int, int, int]
"""Size in bytes, modification and change time in ns."""


@dataclass(frozen=True)
class FolderDigest:
    """SHA-256 of each file of a model folder that a run reads, by its name in the folder."""

    files: Mapping[str, str]

    def whole(self) -> str:
        """Return one digest of the names and contents of all files."""
        return _of_names(self.files)

    def weights(self) -> str:
        """Return the same for the safetensors files only."""
        return _of_names({name: value for name, value in self.files.items() if name.endswith(".safetensors")})

    def changes(self, new: FolderDigest) -> str | None:
        """Return, on one line, the files in which `new` differs, with old and new digest; None if there are none."""
        names = sorted(name for name in {*self.files, *new.files} if self.files.get(name) != new.files.get(name))
        if not names:
            return None
        shown = (
            f"{name} {short(self.files.get(name))} -> {short(new.files.get(name))}" for name in names[:SHOWN_FILES]
        )
        more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
        return f"sha256 of {', '.join(shown)}{more}"

    def tokenizer(self) -> str:
        """Return the same for the files that turn text into ids."""
        return _of_names({name: value for name, value in self.files.items() if name in TOKENIZER_FILES})


@dataclass(frozen=True)
class DataDigest:
    """The SHA-256 of a data file and its number of lines."""

    sha256: str
    lines: int


@dataclass
class DigestMemory:
    """Remembers digests of large files that were read before, by resolved path."""

    known: dict[str, tuple[Fingerprint, str]] = field(default_factory=dict)

    def recall(self, path: Path) -> str | None:
        """Return the digest of `path` if the file has not changed since it was read, else None. Raises OSError."""
        found = self.known.get(str(path.resolve()))
        return found[1] if found is not None and found[0] == fingerprint(path) else None

    def remember(self, read: Iterable[tuple[Path, Fingerprint, str]]) -> None:
        """Remember the digests of the large files among `read`."""
        for path, print_, digest in read:
            if print_[0] >= REMEMBERED_BYTES and time.time_ns() - max(print_[1:]) > SETTLED_NS:
                self.known[str(path.resolve())] = (print_, digest)

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Drop all files except these resolved paths."""
        self.known = {path: found for path, found in self.known.items() if path in paths}

    def save(self, path: Path) -> None:
        """Publish the memory as JSON. Raises DataError if `path` cannot be written."""
        publish_text(path, json.dumps(self.known, indent=1) + "\n")


def short(digest: str | None) -> str:
    """Return a digest in the short form that messages show."""
    return digest[:12] if digest is not None else "none"


def load_memory(path: Path) -> DigestMemory:
    """Read what `DigestMemory.save` wrote. If it cannot be used, returns an empty memory and files are read again."""
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
    """Return size and times, which change when a file is written again. Does not read the file. Raises OSError."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def model_files(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that a run reads, sorted: config, tokenizer, templates, weights.

    If there is an index, only the weights that it names count. Missing files are left out; the code that needs them
    reports them.
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
    """Read each file in full; returns (path, fingerprint, SHA-256) of each. Raises ModelError if one cannot be read."""
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
    """Return the digest of a model folder. Files that `memory` knows are not read; other files are added to it.

    Raises ModelError if a file cannot be read.
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
    """Return the digest of a data file; `key` names it in messages. Raises DataError if it cannot be read."""
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
