"""The JSON beside a checkpoint's tensors, and which folders are checkpoints; nothing here is collective.

Not for tensors (`checkpoint`). Invariant: the JSON is written last, so a folder that has it, and no `.partial` in its
name, is complete.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import Architecture, architecture_from_json, architecture_to_json

INFO_FILE = "tropd.json"
HF_FOLDER = "hf"
"""config.json and tokenizer of the model, so that an export needs nothing but the checkpoint."""
PARTIAL_SUFFIX = ".partial"
_FORMAT = 1
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """The JSON of a checkpoint."""

    step: int
    """Optimizer steps done."""
    architecture: Architecture
    param_dtype: str
    layout: dict[str, int]
    """World, tensor, pipeline, virtual pipeline, data and context sizes that it was written at."""
    optimizer: str | None
    """`distributed`, `replicated`, or None for weights only."""
    scheduler: dict[str, Any] | None
    extra: dict[str, Any]
    """What the caller of `checkpoint.save` gave."""
    average: bool = False
    """Whether it holds a moving average of the weights."""

    def to_json(self) -> str:
        """The text of the file; `read_info` is the inverse."""
        values = {**vars(self), "architecture": architecture_to_json(self.architecture)}
        return json.dumps({"format": _FORMAT, **values}, indent=2) + "\n"


def read_info(path: Path) -> CheckpointInfo:
    """Read the JSON of the checkpoint `path`. Raises ModelError where it is missing, damaged or of another format."""
    file = path / INFO_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values.pop("format")
        if found != _FORMAT:
            raise ModelError(f"{file}: checkpoint format {found}, expected {_FORMAT}")
        architecture = architecture_from_json(values.pop("architecture"), source=str(file))
        return CheckpointInfo(architecture=architecture, **values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"checkpoint {path}: {INFO_FILE} not found; expected a complete checkpoint folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: damaged ({error!r})") from error


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return directory / f"step_{step:06d}"


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, the oldest step first; partial ones are ignored."""
    if not directory.is_dir():
        return []
    numbers = [(path, _STEP_FOLDER.fullmatch(path.name)) for path in directory.iterdir()]
    found = [(int(match[1]), path) for path, match in numbers if match and (path / INFO_FILE).is_file()]
    return [path for _, path in sorted(found)]


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def partial_checkpoints(directory: Path) -> list[Path]:
    """Folders that an interrupted save left behind."""
    return [path for path in sorted(directory.glob(f"*{PARTIAL_SUFFIX}")) if _STEP_FOLDER.match(path.name)]
