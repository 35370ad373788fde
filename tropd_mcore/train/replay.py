"""Rollouts and teacher scores of a step on disk, so that a killed step is repeated with the same numbers.

Plain `.npz` arrays, read without pickle. Variable-length arrays are stored flat beside their lengths. A damaged file
cannot exist (files are published whole); a score file that belongs to other rollouts or another layout is not used.
"""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tropd_mcore.errors import DataError
from tropd_mcore.files import publish_file
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores

_RAGGED = ("prompt_ids", "prefix_ids", "response_ids", "behav_logp", "trust_u")
_TEXT = ("sample_id", "prompt_id", "policy_version", "finish_reason")
_SCORE_FIELDS = ("logp_T", "topk_ids_TK", "topk_logp_TK", "tail_mass_T", "scored_T")


def save_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Publish the rollouts of one step at `path`."""
    arrays: dict[str, np.ndarray] = {}
    for name in _RAGGED:
        values = [getattr(rollout, name) for rollout in rollouts]
        arrays[name] = np.concatenate(values) if values else np.zeros(0)
        arrays[f"{name}_lengths"] = np.array([len(value) for value in values], dtype=np.int64)
    for name in _TEXT:
        arrays[name] = np.array([getattr(rollout, name) for rollout in rollouts], dtype=np.str_)
    arrays["carries_prefix_loss"] = np.array([rollout.carries_prefix_loss for rollout in rollouts], dtype=bool)
    arrays["answer"] = np.array([rollout.answer or "" for rollout in rollouts], dtype=np.str_)
    arrays["has_answer"] = np.array([rollout.answer is not None for rollout in rollouts], dtype=bool)
    _publish_arrays(path, arrays)


def load_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of one step as they were saved. Raises `DataError` where the file is not one of ours."""
    arrays = _read_arrays(path)
    ragged = {name: _split(arrays, name) for name in _RAGGED}
    return [_rollout(arrays, ragged, index) for index in range(len(arrays["sample_id"]))]


def _split(arrays: dict[str, np.ndarray], name: str) -> list[Any]:
    """The flat array `name` cut by its lengths."""
    lengths = arrays[f"{name}_lengths"]
    return np.split(arrays[name], np.cumsum(lengths)[:-1]) if len(lengths) else []


def _rollout(arrays: dict[str, np.ndarray], ragged: dict[str, list[Any]], index: int) -> Rollout:
    values: dict[str, Any] = {name: ragged[name][index] for name in _RAGGED}
    values |= {name: str(arrays[name][index]) for name in _TEXT}
    values["carries_prefix_loss"] = bool(arrays["carries_prefix_loss"][index])
    values["answer"] = str(arrays["answer"][index]) if arrays["has_answer"][index] else None
    return Rollout(**values)


def fingerprint(micro_batches: Sequence[MicroBatch]) -> str:
    """Hash of what a score file is aligned to: the predicted tokens of all rows, in order."""
    digest = hashlib.sha256()
    for micro_batch in micro_batches:
        for tensor in (micro_batch.target_ids, micro_batch.sample_index, micro_batch.token_index):
            digest.update(tensor.cpu().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def save_scores(path: Path, micro_batches: Sequence[MicroBatch], scores: Sequence[TeacherScores]) -> None:
    """Publish the teacher's scores of this rank's micro-batches at `path`."""
    arrays = {name: torch.cat([getattr(score, name) for score in scores]).cpu().numpy() for name in _SCORE_FIELDS}
    entropies = [score.entropy_T for score in scores if score.entropy_T is not None]
    if len(entropies) == len(scores):
        arrays["entropy_T"] = torch.cat(entropies).cpu().numpy()
    arrays["fingerprint"] = np.array(fingerprint(micro_batches))
    _publish_arrays(path, arrays)


def load_scores(path: Path, micro_batches: Sequence[MicroBatch]) -> list[TeacherScores] | None:
    """The scores at `path` cut to `micro_batches`, or None where there are none for exactly these rows."""
    if not path.exists():
        return None
    arrays = _read_arrays(path)
    if str(arrays["fingerprint"]) != fingerprint(micro_batches):
        return None
    sizes = [len(micro_batch.rows) for micro_batch in micro_batches]
    device = micro_batches[0].rows.device if micro_batches else torch.device("cpu")
    pieces = {
        name: torch.from_numpy(arrays[name]).to(device).split(sizes)
        for name in (*_SCORE_FIELDS, "entropy_T")
        if name in arrays
    }
    return [
        TeacherScores(
            **{name: pieces[name][index] for name in _SCORE_FIELDS},
            entropy_T=pieces["entropy_T"][index] if "entropy_T" in pieces else None,
        )
        for index in range(len(sizes))
    ]


def _publish_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(stream: BinaryIO) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        stream.write(buffer.getbuffer())

    publish_file(path, write)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}; remove the file to have the step sampled again") from error
