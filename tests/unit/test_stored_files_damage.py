"""Stored rollouts: no flipped bit is read as another number (the archive has a checksum for every array)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.glue.stubs import make_rollouts
from tropd_mcore.errors import DataError
from tropd_mcore.records.replay import load_rollouts, save_rollouts
from tropd_mcore.types import Rollout


def same(left: list[Rollout], right: list[Rollout]) -> bool:
    def values(rollouts: list[Rollout]) -> list[list[Any]]:
        return [[np.asarray(value).tolist() for value in vars(rollout).values()] for rollout in rollouts]

    return values(left) == values(right)


def test_a_flipped_bit_in_stored_rollouts_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step_000000.npz"
    rollouts = [dataclasses.replace(rollout, answer="x") for rollout in make_rollouts(0)[:2]]
    save_rollouts(path, rollouts)
    content = path.read_bytes()
    refused = 0
    for byte in range(0, len(content), 2):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << byte // 2 % 8
        path.write_bytes(flipped)
        try:
            assert same(load_rollouts(path), rollouts), f"byte {byte} of {len(content)}"
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > len(content) // 4


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_000000.npz"
    save_rollouts(path, make_rollouts(0))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="remove the file"):
        load_rollouts(path)


def renamed(path: Path, old: str, new: str) -> None:
    """The file as an earlier version wrote it, which called an array `old`."""
    with np.load(path) as archive:
        arrays = {name.replace(new, old): archive[name] for name in archive.files}
    arrays["contents"] = np.array(sorted(arrays.keys() - {"contents"}))
    np.savez(path, **arrays)


def test_rollouts_of_a_version_with_other_field_names_are_read_unchanged(tmp_path: Path) -> None:
    path, rollouts = tmp_path / "step_000000.npz", make_rollouts(0)
    save_rollouts(path, rollouts)
    renamed(path, "behav_logp", "rollout_logp")
    with np.load(path) as archive:
        assert {"behav_logp", "behav_logp_lengths"} <= set(archive.files)
    assert same(load_rollouts(path), rollouts)
