"""Stores rollouts and teacher scores of a step on disk, so a killed step is repeated with the same numbers.

Files are plain `.npz` arrays and are read without pickle. Variable-length arrays are stored flat, with their lengths in
a second array. Files are published whole, and a flipped bit is an error when the file is read. Scores that belong to
other rollouts, another layout, another teacher or other candidates are not used, and the reason is reported.
"""

import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from tropd_mcore.errors import DataError
from tropd_mcore.file_kinds import in_the_way
from tropd_mcore.files import publish_file, shown
from tropd_mcore.types import MicroBatch, Rollout, TeacherScores

_RAGGED = ("prompt_ids", "prefix_ids", "response_ids", "rollout_logp", "trust_u")
_EARLIER_NAMES = {"behav_logp": "rollout_logp", "own_logp_TL": "logp_of_student_topk_TL"}
"""Array names of earlier versions -> present names."""
_TEXT = ("sample_id", "prompt_id", "policy_version", "finish_reason")
_TEACHER = "teacher"
"""Array of the names of the rollouts' teachers; only in a run with several."""
_SCORE_FIELDS = ("logp_T", "topk_ids_TK", "topk_logp_TK", "tail_mass_T", "scored_T")
_KEY_PARTS = ("teacher", "rows", "candidates")
_OTHER = {"rows": "of other rows (rollouts, layout or packs)", "candidates": "of other candidates of the student"}
_OPTIONAL_SCORE_FIELDS = ("entropy_T", "logp_of_student_topk_TL", "excluded_T")
_READ_ERRORS = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip
"""Errors that numpy and zipfile raise for a damaged archive. Every array in the archive has a checksum."""
_CONTENTS = "contents"
"""Array with the names of all other arrays, because damage can hide one."""


def save_rollouts(path: Path, rollouts: Sequence[Rollout], *, left_out: int = 0) -> None:
    """Publish the rollouts of one step at `path`; `left_out` counts samples that had no usable answer.

    Raises DataError if the parts of a rollout do not fit together.
    """
    _refuse_what_does_not_fit(path, rollouts)
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
    arrays["left_out"] = np.array(left_out, dtype=np.int64)
    if any(rollout.teacher is not None for rollout in rollouts):  # "" for none, as a name has at least a letter
        arrays[_TEACHER] = np.array([rollout.teacher or "" for rollout in rollouts], dtype=np.str_)
    _publish_arrays(path, arrays)


def load_left_out(path: Path) -> int:
    """Return how many samples were left out of the rollouts in `path`; 0 if the file does not record it.

    Raises `DataError`.
    """
    return int(_read_arrays(path, ["left_out"], missing_ok=True).get("left_out", np.array(0)))


def load_rollouts(path: Path) -> list[Rollout]:
    """Return the rollouts of one step as they were saved.

    Raises `DataError` if the file is not a rollout file, or if the parts of a rollout do not fit together.
    """
    arrays = _read_arrays(path)
    ragged = {name: _split(arrays, name) for name in _RAGGED}
    rollouts = [_rollout(arrays, ragged, index) for index in range(len(arrays["sample_id"]))]
    _refuse_what_does_not_fit(path, rollouts)
    return rollouts


def _refuse_what_does_not_fit(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Raise DataError for rollouts that were put together by hand and would fail, or mislead, much later."""
    seen: set[str] = set()
    for rollout in rollouts:
        problem = _problem(rollout)
        if rollout.sample_id in seen:
            problem = "expected another sample_id than that of an earlier sample of the step"
        if problem is not None:
            raise DataError(f"{path}: sample {rollout.sample_id!r}: {problem}")
        seen.add(rollout.sample_id)


def _problem(rollout: Rollout) -> str | None:
    """What does not fit in one rollout; None if all does."""
    tokens = len(rollout.response_ids)
    for name in ("rollout_logp", "trust_u"):
        values = getattr(rollout, name)
        if len(values) != tokens:
            return f"expected one number in {name} for each of the {tokens} response tokens, found {len(values)}"
        if not np.isfinite(values).all():
            return f"expected finite numbers in {name}, found {values[~np.isfinite(values)][0]}"
    if not len(rollout.prompt_ids):
        return "expected at least one token in prompt_ids, found none"
    if not tokens and not len(rollout.prefix_ids):
        return "expected at least one token in response_ids or prefix_ids, found none"
    return None


def _split(arrays: dict[str, np.ndarray], name: str) -> list[Any]:
    """Split the flat array `name` by its lengths."""
    lengths = arrays[f"{name}_lengths"]
    return np.split(arrays[name], np.cumsum(lengths)[:-1]) if len(lengths) else []


def _rollout(arrays: dict[str, np.ndarray], ragged: dict[str, list[Any]], index: int) -> Rollout:
    values: dict[str, Any] = {name: ragged[name][index] for name in _RAGGED}
    values |= {name: str(arrays[name][index]) for name in _TEXT}
    values["carries_prefix_loss"] = bool(arrays["carries_prefix_loss"][index])
    values["answer"] = str(arrays["answer"][index]) if arrays["has_answer"][index] else None
    values["teacher"] = (str(arrays[_TEACHER][index]) or None) if _TEACHER in arrays else None
    return Rollout(**values)


@dataclass(frozen=True)
class ScoreKey:
    """Identifies what a score file belongs to."""

    teacher: str
    """Text that distinguishes scorers, including the number of candidates that they return."""
    micro_batches: Sequence[MicroBatch]
    own_ids: Sequence[Tensor | None]
    """int64 [T, L] per micro-batch, the student's top-k; None if the teacher was not asked to score it."""

    def parts(self) -> dict[str, str]:
        """Return the teacher, a hash of all rows (predicted tokens, in order), and a hash of the student's top-k."""
        rows, candidates = hashlib.sha256(), hashlib.sha256()
        for micro_batch, own_ids in zip(self.micro_batches, self.own_ids, strict=True):
            for tensor in (micro_batch.target_ids_T, micro_batch.sample_index_T, micro_batch.token_index_T):
                rows.update(tensor.cpu().numpy().tobytes())
            rows.update(b"|")
            candidates.update(b"|" if own_ids is None else own_ids.cpu().numpy().tobytes() + b"|")
        return {"teacher": self.teacher, "rows": rows.hexdigest(), "candidates": candidates.hexdigest()}


def save_scores(path: Path, key: ScoreKey, scores: Sequence[TeacherScores]) -> None:
    """Publish the teacher's scores of this rank's micro-batches at `path`. Hidden states are not stored."""
    arrays = {name: torch.cat([getattr(score, name) for score in scores]).cpu().numpy() for name in _SCORE_FIELDS}
    for name in _OPTIONAL_SCORE_FIELDS:
        pieces = [piece for score in scores if (piece := getattr(score, name)) is not None]
        if pieces and len(pieces) == len(scores):
            arrays[name] = torch.cat(pieces).cpu().numpy()
    # int32 saves a third of the file, and every vocabulary fits into it.
    arrays["topk_ids_TK"] = arrays["topk_ids_TK"].astype(np.int32)
    arrays |= {f"key_{name}": np.array(part) for name, part in key.parts().items()}
    _publish_arrays(path, arrays)


def mismatch(path: Path, key: ScoreKey) -> str | None:
    """Return why the existing scores at `path` do not belong to `key`; None if they do. Reads no scores.

    Raises `DataError` if the file is damaged.
    """
    stored = _read_arrays(path, [f"key_{name}" for name in _KEY_PARTS], missing_ok=True)
    if not stored:
        return "of an earlier version, which did not say what they belong to"
    for name, part in key.parts().items():
        found = str(stored[f"key_{name}"])
        if found != part:
            return _OTHER.get(name) or f"of another teacher ({found}, here {part})"
    return None


def load_scores(path: Path, key: ScoreKey) -> list[TeacherScores]:
    """Return the scores at `path`, split by the micro-batches of `key`. Check with `mismatch` first."""
    arrays = _read_arrays(path)
    arrays["topk_ids_TK"] = arrays["topk_ids_TK"].astype(np.int64)
    sizes = [len(micro_batch.rows_T) for micro_batch in key.micro_batches]
    device = key.micro_batches[0].rows_T.device if key.micro_batches else torch.device("cpu")
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
        np.savez(buffer, allow_pickle=False, **{_CONTENTS: np.array(sorted(arrays)), **arrays})
        stream.write(buffer.getbuffer())

    publish_file(path, write)


def _read_arrays(
    path: Path, names: Collection[str] | None = None, *, missing_ok: bool = False
) -> dict[str, np.ndarray]:
    """Return the arrays `names`, or all arrays. With `missing_ok`, returns {} if one of `names` is missing."""
    if (other := in_the_way(path, zip_wanted=True)) is not None:
        raise DataError(
            f"cannot read {shown(path)}: expected arrays (.npz); {other}; without the file, the step is sampled again"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing_ok and names is not None and not set(names) <= set(archive.files):
                return {}
            found = {name: archive[name] for name in (archive.files if names is None else names)}
    except _READ_ERRORS as error:
        raise DataError(f"cannot read {path}: {error}; remove the file to have the step sampled again") from error
    contents = found.pop(_CONTENTS, None)
    if contents is not None and set(contents.tolist()) != set(found):
        raise DataError(f"cannot read {path}: arrays are missing; remove the file to have the step sampled again")
    return {_now(name): array for name, array in found.items()}


def _now(name: str) -> str:
    """Return the present name of an array, also for the array of lengths that belongs to a flat array."""
    flat = name.removesuffix("_lengths")
    return name.replace(flat, _EARLIER_NAMES.get(flat, flat))
