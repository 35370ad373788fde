"""tropd.json: its own digest, its step against its folder's name, and the format without digests."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tropd_mcore.errors import ModelError
from tropd_mcore.mcore import checkpoint_info
from tropd_mcore.mcore.checkpoint_digests import check_digests
from tropd_mcore.mcore.checkpoint_info import (
    CheckpointInfo,
    DamagedCheckpoint,
    FileRecord,
    complete_checkpoints,
    read_info,
    step_of,
)
from tropd_mcore.weights.architecture import architecture_from_config

ARCHITECTURE = architecture_from_config(
    {
        "model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 307, "max_position_embeddings": 512,
    },
    source="config.json",
)  # fmt: skip
INFO = CheckpointInfo(
    step=40,
    architecture=ARCHITECTURE,
    param_dtype="bfloat16",
    layout={"world_size": 1},
    optimizer="distributed",
    scheduler={"num_steps": 40, "max_lr": 1e-05},
    extra={"sha256": "", "note": "ä"},
    run="a-run",
    files={"common.pt": FileRecord(bytes=7, sha256="ab" * 32)},
)


def write(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "tropd.json").write_text(text, encoding="utf-8")
    return path


def test_the_json_of_a_checkpoint_is_read_back_as_written(tmp_path: Path) -> None:
    assert read_info(write(tmp_path / "step_000040", INFO.to_json())) == INFO


def test_every_flipped_bit_of_the_json_is_detected(tmp_path: Path) -> None:
    """Every bit of format and digest, one of every byte of the rest."""
    file = write(tmp_path / "step_000040", INFO.to_json()) / "tropd.json"
    content = file.read_bytes()
    unnoticed = []
    for bit in [*range(8 * 100), *(8 * byte + byte % 8 for byte in range(100, len(content)))]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            read_info(file.parent)
            unnoticed.append(bit)
        except DamagedCheckpoint as error:
            assert str(file) in str(error) and "\n" not in str(error)
    assert unnoticed == []


@pytest.mark.parametrize("change", [{"step": 41}, {"optimizer": None}, {"files": {}}, {"extra": {}}], ids=str)
def test_an_edited_value_of_the_json_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    values = json.loads(INFO.to_json()) | change
    path = write(tmp_path / "elsewhere", json.dumps(values, indent=2) + "\n")
    with pytest.raises(DamagedCheckpoint, match="not as it was written"):
        read_info(path)


def test_a_folder_named_after_another_step_is_refused_with_both_steps(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match="step 41, its tropd.json step 40"):
        read_info(write(tmp_path / "step_000041", INFO.to_json()))
    assert read_info(write(tmp_path / "step_000040.damaged", INFO.to_json())).step == 40
    assert read_info(write(tmp_path / "converted", INFO.to_json())).step == 40


def test_only_folders_named_after_a_step_count_as_checkpoints_and_are_sorted_by_number(tmp_path: Path) -> None:
    for name in ("step_1000000", "step_000040", "step_000040.damaged", "step_000050.partial", "converted"):
        write(tmp_path / name, "{}")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_000040", "step_1000000"]
    assert [step_of(Path(name)) for name in ("step_000040", "step_000040.damaged", "hf")] == [40, None, None]


def test_the_format_before_digests_is_read_with_a_one_line_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = json.loads(INFO.to_json())
    for key in ("sha256", "files", "run"):
        del values[key]
    path = write(tmp_path / "step_000040", json.dumps(values | {"format": 1}))
    info = read_info(path)
    assert (info.step, info.files, info.run) == (40, None, None)
    with caplog.at_level(logging.WARNING):
        check_digests(path, info, SimpleNamespace())  # type: ignore[arg-type]
    (line,) = caplog.messages
    assert str(path) in line and "without digests" in line


@pytest.mark.parametrize("stated", [0, 3])
def test_an_unsupported_checkpoint_format_is_refused(
    stated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_info, "_FORMAT", stated)
    text = INFO.to_json()
    monkeypatch.undo()
    with pytest.raises(ModelError, match=f"checkpoint format {stated}, expected 2") as caught:
        read_info(write(tmp_path / "step_000040", text))
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("text", ["0", "3", "6", "22", '"2"', "null", "[2]"])
def test_a_format_number_that_was_never_written_is_reported_as_damage(text: str, tmp_path: Path) -> None:
    """It must be damage so that the message names the previous checkpoint."""
    for whole in (INFO.to_json(), INFO.to_json().replace('"sha256": ', '"sha356": ', 1)):
        path = write(tmp_path / str(len(list(tmp_path.iterdir()))), whole.replace('"format": 2', f'"format": {text}'))
        with pytest.raises(DamagedCheckpoint):
            read_info(path)
