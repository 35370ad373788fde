"""Checks the checkpoint that a new run starts from (run.init_from): that it is one, and that it fits the student.

This module does not load it (`init_from`). Invariants: only JSON and tokenizer files are read. A checkpoint that passes
fits the student in architecture, dtype and tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.errors import ConfigError, ModelError
from tropd_mcore.files import file_digest
from tropd_mcore.mcore.checkpoint_info import HF_FOLDER, INFO_FILE, PARTIAL_SUFFIX, CheckpointInfo, latest, read_info
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.ground import Ground
from tropd_mcore.train.inputs import Beginning
from tropd_mcore.weights.architecture import check_same_architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from."""

    path: Path
    record: Beginning


def find_source(ground: Ground) -> Source | None:
    """Return the checkpoint of run.init_from after checking that it fits the student; None if the key is not set.

    Raises ConfigError if the path is no checkpoint, and ModelError or DataError if the checkpoint does not fit.
    """
    path = ground.config.run.init_from
    return _checked(ground, path) if path is not None else None


def _checked(ground: Ground, path: Path) -> Source:
    run, student = ground.config.run, ground.config.student
    info = _read(path)
    source = f"run.init_from={path}"
    check_same_architecture(info.architecture, ground.student, source=source)
    if info.param_dtype != student.dtype:
        raise ModelError(
            f"{source}: written with student.dtype={info.param_dtype}, found {student.dtype}; set "
            f"student.dtype={info.param_dtype}"
        )
    if run.init_optimizer and info.optimizer is None:
        raise ModelError(f"{source}: holds weights only; remove run.init_optimizer, or name a checkpoint of a run")
    wanted = "distributed" if ground.config.optimizer.distributed else "replicated"
    if run.init_optimizer and info.optimizer != wanted:
        raise ModelError(
            f"{source}: written with a {info.optimizer} optimizer, found a {wanted} one; set "
            f"optimizer.distributed={str(info.optimizer == 'distributed').lower()}"
        )
    _check_tokens(path, student.path)
    record = Beginning(
        path=str(path), step=info.step, sha256=file_digest(path / INFO_FILE), with_optimizer=run.init_optimizer
    )
    return Source(path, record)


def _read(path: Path) -> CheckpointInfo:
    """Return the JSON of the checkpoint. If `path` is something else, raises ConfigError that says what to set."""
    expected = "expected a checkpoint folder <run.dir>/checkpoints/step_<n>"
    if not path.is_dir():
        raise ConfigError([f"run.init_from={path}: no such folder; {expected}"])
    if path.name.endswith(PARTIAL_SUFFIX):
        raise ConfigError([f"run.init_from={path}: the rest of an interrupted save; {expected}"])
    if (path / INFO_FILE).is_file():
        return read_info(path)
    for checkpoints, what in ((path / "checkpoints", "a run directory"), (path, "the folder of a run's checkpoints")):
        newest = latest(checkpoints)
        if newest is not None:
            raise ConfigError([f"run.init_from={path}: {what}; its newest checkpoint is run.init_from={newest}"])
    if (path / "config.json").is_file():
        raise ConfigError(
            [f"run.init_from={path}: a Hugging Face folder; set student.path={path} and remove run.init_from"]
        )
    raise ConfigError([f"run.init_from={path}: holds no complete checkpoint ({INFO_FILE} not found); {expected}"])


def _check_tokens(path: Path, student: Path) -> None:
    """Check the tokenizer in the checkpoint: if it differs from the student's, every id must mean the same token."""
    file = "tokenizer.json"
    theirs, ours = path / HF_FOLDER / file, student / file
    for found in (theirs, ours):
        if not found.is_file():
            log.warning("run.init_from=%s: no %s, so whether its tokens are the student's is not known", path, found)
            return
    if file_digest(theirs) != file_digest(ours):
        check_same_vocabulary(student, path / HF_FOLDER, key="run.init_from")
