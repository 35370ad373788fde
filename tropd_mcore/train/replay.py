"""Rollouts and teacher scores of a step on disk, so that a killed step is repeated with the same numbers.

Plain `.npz` arrays, read without pickle. Variable-length arrays are stored flat beside their lengths. A damaged file
cannot exist (files are published whole); scores of other rollouts, another layout, another teacher or other candidates
are not used.
"""

import hashlib
import io
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tropd_mcore.errors import DataError
from tropd_mcore.files import publish_file
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores

_RAGGED = ("prompt_ids", "prefix_ids", "response_ids", "behav_logp", "trust_u")
_TEXT = ("sample_id", "prompt_id", "policy_version", "finish_reason")
_SCORE_FIELDS = ("logp_T", "topk_ids_TK", "topk_logp_TK", "tail_mass_T", "scored_T")
_OPTIONAL_SCORE_FIELDS = ("entropy_T", "own_logp_TL")


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


@dataclass(frozen=True)
class ScoreKey:
    """What a score file belongs to."""

    teacher: str
    """Anything that tells one scorer, with the number of candidates it was asked for, from another."""
    micro_batches: Sequence[MicroBatch]
    own_ids: Sequence[Tensor | None]
    """int64 [T, L] a micro-batch, the student's own candidates; None where none were asked for."""

    def fingerprint(self) -> str:
        """Hash of the teacher, of the predicted tokens of all rows in order, and of the candidates."""
        digest = hashlib.sha256(self.teacher.encode())
        for micro_batch, own_ids in zip(self.micro_batches, self.own_ids, strict=True):
            rows = (micro_batch.target_ids, micro_batch.sample_index, micro_batch.token_index)
            for tensor in rows if own_ids is None else (*rows, own_ids):
                digest.update(tensor.cpu().numpy().tobytes())
            digest.update(b"|")
        return digest.hexdigest()


def save_scores(path: Path, key: ScoreKey, scores: Sequence[TeacherScores]) -> None:
    """Publish the teacher's scores of this rank's micro-batches at `path`; hidden states are left out."""
    arrays = {name: torch.cat([getattr(score, name) for score in scores]).cpu().numpy() for name in _SCORE_FIELDS}
    for name in _OPTIONAL_SCORE_FIELDS:
        pieces = [piece for score in scores if (piece := getattr(score, name)) is not None]
        if pieces and len(pieces) == len(scores):
            arrays[name] = torch.cat(pieces).cpu().numpy()
    arrays["fingerprint"] = np.array(key.fingerprint())
    _publish_arrays(path, arrays)


def has_scores(path: Path, key: ScoreKey) -> bool:
    """Whether `load_scores` would find scores, without reading them. Raises `DataError` as that does."""
    return path.exists() and str(_read_arrays(path, {"fingerprint"})["fingerprint"]) == key.fingerprint()


def load_scores(path: Path, key: ScoreKey) -> list[TeacherScores] | None:
    """The scores at `path` cut to the micro-batches of `key`, or None where there are none for exactly that."""
    if not path.exists():
        return None
    arrays = _read_arrays(path)
    if str(arrays["fingerprint"]) != key.fingerprint():
        return None
    sizes = [len(micro_batch.rows) for micro_batch in key.micro_batches]
    device = key.micro_batches[0].rows.device if key.micro_batches else torch.device("cpu")
    pieces = {
        name: torch.from_numpy(arrays[name]).to(device).split(sizes)
        for name in (*_SCORE_FIELDS, *_OPTIONAL_SCORE_FIELDS)
        if name in arrays
    }
    return [
        TeacherScores(**{"entropy_T": None, **{name: values[index] for name, values in pieces.items()}})
        for index in range(len(sizes))
    ]


def _publish_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(stream: BinaryIO) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        stream.write(buffer.getbuffer())

    publish_file(path, write)


def _read_arrays(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names, or all."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in (archive.files if names is None else names)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}; remove the file to have the step sampled again") from error
