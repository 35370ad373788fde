"""The JSON file of a checkpoint, and which folders are checkpoints. Nothing here is collective.

This module does not read tensors (`checkpoint`) or hash files (`checkpoint_digests`). Invariants: the JSON is written
last, so a folder that has it, and no `.partial` in its name, is complete. The JSON holds the digest of every other file
and of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import Architecture, architecture_from_json, architecture_to_json

INFO_FILE = "tropd.json"
HF_FOLDER = "hf"
"""Folder with config.json and tokenizer of the model, so an export needs only the checkpoint."""
PARTIAL_SUFFIX = ".partial"
DAMAGED_SUFFIX = ".damaged"
"""Suffix that the user adds to the name of a checkpoint to keep it from being resumed."""
_FORMAT = 2
_WITHOUT_DIGESTS = 1
"""The format before digests were recorded. It can still be read."""
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_NO_DIGEST = '"sha256": ""'


class DamagedCheckpoint(ModelError):
    """A checkpoint is not as it was written. An older one may still be whole."""


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointInfo:
    """The JSON of a checkpoint."""

    step: int
    """Optimizer steps done."""
    architecture: Architecture
    param_dtype: str
    layout: dict[str, int]
    """World, tensor, pipeline, virtual pipeline, data and context sizes of the job that wrote it."""
    optimizer: str | None
    """`distributed`, `replicated`, or None for weights only."""
    scheduler: dict[str, Any] | None
    extra: dict[str, Any]
    """Values that the caller of `checkpoint.save` passed."""
    average: bool = False
    """Whether it holds a moving average of the weights."""
    run: str | None = None
    """Identity of the run that wrote it; None if it belongs to no run."""
    files: dict[str, FileRecord] | None = None
    """Every other file of the checkpoint, by relative path; None if the release that wrote it recorded no digests."""

    def to_json(self) -> str:
        """Return the text of the file. `read_info` is the inverse."""
        assert self.files is not None, "a checkpoint is written with the digests of its files"
        values = {
            **vars(self),
            "architecture": architecture_to_json(self.architecture),
            "files": {name: dataclasses.asdict(record) for name, record in sorted(self.files.items())},
        }
        text = json.dumps({"format": _FORMAT, "sha256": "", **values}, indent=2) + "\n"
        return text.replace(_NO_DIGEST, f'"sha256": "{_digest(text)}"', 1)


def read_info(path: Path) -> CheckpointInfo:
    """Read the JSON of the checkpoint `path`.

    Raises DamagedCheckpoint if it is not as it was written, or if its step differs from the step in the folder's name.
    Raises ModelError if it is missing or has another format.
    """
    file = path / INFO_FILE
    try:
        text = file.read_text(encoding="utf-8")
        info = _parse(text, file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"checkpoint {path}: {INFO_FILE} not found; expected a complete checkpoint folder") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: cannot be read ({error.strerror or error})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{file}: damaged ({error!r})") from error
    named = step_of(path)
    if named is not None and named != info.step:
        raise DamagedCheckpoint(
            f"checkpoint {path}: its name says step {named}, its {INFO_FILE} step {info.step}; it was renamed or copied"
        )
    return info


def _parse(text: str, file: Path) -> CheckpointInfo:
    values = json.loads(text)
    found = values.pop("format")
    files: dict[str, FileRecord] | None = None
    if found != _WITHOUT_DIGESTS:  # an unknown format number is damage, unless the digest confirms it
        stated = values.pop("sha256")
        if stated != _digest(text.replace(f'"sha256": "{stated}"', _NO_DIGEST, 1)):
            raise DamagedCheckpoint(
                f"{file}: not as it was written (its own sha256 differs); the checkpoint is damaged"
            )
        if found != _FORMAT:
            raise ModelError(f"{file}: checkpoint format {found}, expected {_FORMAT}")
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
    architecture = architecture_from_json(values.pop("architecture"), source=str(file))
    return CheckpointInfo(architecture=architecture, files=files, **values)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None if the name has another form (a conversion)."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else None


def step_folder(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return directory / f"step_{step:06d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, the oldest step first. Partial ones are ignored."""
    if not directory.is_dir():
        return []
    numbered = [(step_of(path), path) for path in directory.iterdir() if (path / INFO_FILE).is_file()]
    found = [(step, path) for step, path in numbered if step is not None]
    return [path for _, path in sorted(found)]


def without_info(directory: Path) -> list[Path]:
    """Return folders that are named after a step but have no JSON. No save leaves one: somebody removed the JSON."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if step_of(path) is not None and not (path / INFO_FILE).exists())


def latest(directory: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def partial_checkpoints(directory: Path) -> list[Path]:
    """Return the folders that interrupted saves left behind."""
    return [path for path in sorted(directory.glob(f"*{PARTIAL_SUFFIX}")) if _STEP_FOLDER.match(path.name)]
