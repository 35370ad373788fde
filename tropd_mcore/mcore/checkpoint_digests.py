"""Digests of every file of a checkpoint, computed when it is written and compared before anything in it is read.

This module does not know what the files mean (`checkpoint`) and does not compute the JSON's own digest
(`checkpoint_info`). Invariants: every file is hashed once, by the rank that wrote it if the job has at least as many
ranks. All ranks raise the same error. A checkpoint whose digests match is bit for bit the one that was written.
Each rank hashes about 1 GiB per second, or as fast as the disk reads.
"""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

import torch.distributed as dist

from tropd_mcore.errors import ModelError
from tropd_mcore.files import file_digest
from tropd_mcore.mcore.checkpoint_info import (
    DAMAGED_SUFFIX,
    INFO_FILE,
    CheckpointInfo,
    DamagedCheckpoint,
    FileRecord,
    complete_checkpoints,
    read_info,
    step_of,
)
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks
from tropd_mcore.progress import progress, tick

log = logging.getLogger(__name__)

_RANK_IN_NAME = re.compile(r"(?:__|rng_)(\d+)")


def make_digests(folder: Path, control: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Return, on all ranks, the record of every file under `folder` except the JSON, by relative path. Collective.

    Each rank lists the folder itself, because on NFS another node may not see yet what this one has just written.
    Raises ModelError if a file cannot be read.
    """
    with raise_on_all_ranks(control):
        names = _names(folder)
    with progress(log, f"{folder}: reading {len(names)} files for their digests"):
        return _read_all(folder, names, control)


def check_digests(path: Path, info: CheckpointInfo, control: dist.ProcessGroup) -> None:
    """Raise DamagedCheckpoint on all ranks if a file is not the one that was written. Collective.

    A missing or added file also counts as damage. Added hidden files are ignored, because file systems and users create
    them. A checkpoint from a release that recorded no digests passes with a warning.
    """
    if info.files is None:
        log.warning("checkpoint %s: written without digests, so damage inside its files cannot be seen", path)
        return
    names = on_rank_zero(lambda: _names(path), control)
    missing = sorted(set(info.files) - set(names))
    added = sorted(name for name in set(names) - set(info.files) if not Path(name).name.startswith("."))
    if missing:
        raise DamagedCheckpoint(f"checkpoint {path}: {', '.join(missing)} not found; it is damaged")
    if added:
        raise DamagedCheckpoint(f"checkpoint {path}: {', '.join(added)} was not written with it; move it away")
    with progress(log, f"{path}: comparing {len(info.files)} files with their digests"):
        found = _read_all(path, sorted(info.files), control)
    changed = [_difference(name, info.files[name], found[name]) for name in sorted(info.files)]
    damaged = [difference for difference in changed if difference is not None]
    if damaged:
        rest = f" and {len(damaged) - 1} more files" if len(damaged) > 1 else ""
        raise DamagedCheckpoint(f"checkpoint {path}: {damaged[0]}{rest}; it is damaged")


def way_on(path: Path, control: dist.ProcessGroup) -> str:
    """Return advice about the damaged checkpoint `path` of a run: the newest whole one before it, and the command.

    Returns "" if `path` is not named after a step. Collective. Reads the older checkpoints in full, the newest first.
    """
    step = step_of(path)
    if step is None:
        return ""

    def older() -> list[Path]:
        found = complete_checkpoints(path.parent)
        return [other for other in reversed(found) if (step_of(other) or 0) < step]

    for good in on_rank_zero(older, control):
        if _is_whole(good, control):
            return (
                f"; the newest whole one before it is {good}: to resume from there, {_move(path)} and run the same "
                "command again"
            )
    return f"; none before it is whole: to begin at step 0 again, {_move(path.parent)} and run the same command again"


def _move(path: Path) -> str:
    return f"mv {shlex.quote(str(path))} {shlex.quote(str(path) + DAMAGED_SUFFIX)}"


def _is_whole(path: Path, control: dist.ProcessGroup) -> bool:
    try:
        info = on_rank_zero(lambda: read_info(path), control)
        check_digests(path, info, control)
    except ModelError as error:
        log.warning("%s", error)
        return False
    return info.files is not None


def _names(folder: Path) -> list[str]:
    """Return the relative paths of the files under `folder` except the JSON, sorted."""
    try:
        return sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path != folder / INFO_FILE
        )
    except OSError as error:
        raise ModelError(f"checkpoint {folder}: cannot be read ({error})") from error


def _read_all(folder: Path, names: list[str], control: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Return the records of all files, each computed on one rank. `names` must include the files this rank owns."""
    rank, size = dist.get_rank(control), dist.get_world_size(control)
    mine: dict[str, FileRecord] = {}
    with raise_on_all_ranks(control):
        for name in names:
            if _owner(name) % size == rank:
                mine[name] = _record(folder / name)
                tick()
    everyone: list[dict[str, FileRecord]] = [{}] * size
    dist.all_gather_object(everyone, mine, group=control)
    return {name: record for part in everyone for name, record in part.items()}


def _owner(name: str) -> int:
    """Return the rank that wrote a file: the number in the name of a shard or of random states, otherwise 0."""
    found = _RANK_IN_NAME.match(name)
    return int(found[1]) if found else 0


def _record(path: Path) -> FileRecord:
    try:
        return FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error.strerror or error})") from error


def _difference(name: str, written: FileRecord, found: FileRecord) -> str | None:
    if found.bytes != written.bytes:
        return f"{name} has {found.bytes} bytes, {written.bytes} were written"
    if found.sha256 != written.sha256:
        return f"{name} is not as it was written (sha256 {found.sha256[:12]}, expected {written.sha256[:12]})"
    return None
