"""Damage of a checkpoint is found before any tensor is loaded. The error names file and last good checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.dist import checkpoint_ranks, conversion_ranks
from tests.dist.checkpoint_ranks import Setup
from tests.dist.test_checkpoint import without_digests
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.checkpoint_info import latest

RUN = "a-run-1"
TP2 = Setup(ParallelConfig(tensor=2))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hf") / "m", tied=True)


@pytest.fixture(scope="module")
def written(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3 of two tensor ranks."""
    directory = tmp_path_factory.mktemp("written")
    run_on_ranks(checkpoint_ranks.train_and_save, 2, hf, directory, TP2, [1, 2, 3], 9, RUN)
    return directory


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "the run")


def refused(hf: Path, path: Path, ranks: int = 1, run: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        run_on_ranks(checkpoint_ranks.load_fails, ranks, hf, path, TP2 if ranks == 2 else Setup(), run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_file_of_a_checkpoint_has_a_digest(written: Path) -> None:
    path = written / "step_000003"
    files = json.loads((path / "tropd.json").read_text())["files"]
    there = {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}
    assert set(files) == there - {"tropd.json"}
    assert {"common.pt", ".metadata", "metadata.json", "hf/config.json", "hf/tokenizer.json"} < there
    assert sum(name.endswith(".distcp") for name in files) == 2 == sum(name.startswith("rng_") for name in files)
    expected = subprocess.run(
        ["sha256sum", "--", *sorted(files)], cwd=path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [f"{files[name]['sha256']}  {name}" for name in sorted(files)] == expected
    assert all(files[name]["bytes"] == (path / name).stat().st_size for name in files)


def test_a_file_that_rank_0_does_not_see_yet_still_gets_a_digest(tmp_path: Path) -> None:
    names = ["__0_0.distcp", "__1_0.distcp", "common.pt", "rng_00001.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    assert run_on_ranks(checkpoint_ranks.digests_of_a_slow_file_system, 2, tmp_path) == [names, names]


def test_one_flipped_bit_in_any_file_is_refused_by_name_on_all_ranks_before_anything_is_loaded(
    hf: Path, run: Path
) -> None:
    """Weights, main weights and moments are spread over the two shards: 24 places in each, 3 in other files."""
    path, random = run / "step_000003", Random(0)
    flips = []
    for file in sorted(found for found in path.rglob("*") if found.is_file()):
        bits = 8 * file.stat().st_size
        places = [0, bits - 1, *(random.randrange(bits) for _ in range(22 if file.suffix == ".distcp" else 1))]
        flips += [(file.relative_to(path).as_posix(), place) for place in places]
    first, second = run_on_ranks(checkpoint_ranks.loads_with_flips, 2, hf, path, TP2, flips)
    assert first == second
    missed = [flip for flip, said in zip(flips, first, strict=True) if flip[0] not in said or str(path) not in said]
    assert missed == []
    assert len(flips) > 70


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda path: (path / "common.pt").unlink(), ["common.pt", "not found"], id="missing"),
        pytest.param(lambda path: (path / "hf/config.json").unlink(), ["hf/config.json", "not found"], id="below"),
        pytest.param(lambda path: (path / "hf/vocab.json").touch(), ["hf/vocab.json", "was not written"], id="added"),
        pytest.param(
            lambda path: (path / "rng_00000.safetensors").open("ab").truncate(9),
            ["rng_00000.safetensors", "9 bytes", "were written"],
            id="truncated",
        ),
    ],
)  # fmt: skip
def test_missing_added_and_truncated_files_are_named(
    hf: Path, run: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(run / "step_000003")
    message = refused(hf, run / "step_000003")
    assert all(word in message for word in ["step_000003", *words]), message


def test_hidden_files_in_a_checkpoint_folder_are_ignored(hf: Path, run: Path) -> None:
    (run / "step_000003" / ".nfs00000001").touch()
    assert run_on_ranks(checkpoint_ranks.resumes, 1, hf, run, Setup()) == [("step_000003", 3)]


def test_the_command_in_the_message_resumes_from_the_newest_undamaged_checkpoint(hf: Path, run: Path) -> None:
    """The two newest are damaged. The message for the newest names the third. Each printed command is run unchanged."""
    for name in ("step_000003", "step_000002"):
        damage(run / name)
    for name in ("step_000003", "step_000002"):
        message = refused(hf, run / name, ranks=2)
        assert f"the newest whole one before it is {run / 'step_000001'}" in message
        (command,) = re.findall(r"to resume from there, (mv .*) and run the same command again", message)
        subprocess.run(command, shell=True, check=True)
        assert (run / f"{name}.damaged").is_dir()
    assert run_on_ranks(checkpoint_ranks.resumes, 2, hf, run, TP2) == [("step_000001", 1)] * 2


def test_if_every_checkpoint_is_damaged_the_command_in_the_message_starts_over(hf: Path, run: Path) -> None:
    for name in ("step_000003", "step_000002", "step_000001"):
        damage(run / name)
    message = refused(hf, run / "step_000003")
    (command,) = re.findall(r"none before it is whole: to begin at step 0 again, (mv .*) and run the same", message)
    subprocess.run(command, shell=True, check=True)
    assert latest(run) is None


def test_a_renamed_checkpoint_is_refused_with_both_steps(hf: Path, run: Path) -> None:
    (run / "step_000002").rename(run / "step_000009")
    message = refused(hf, run / "step_000009")
    assert "name says step 9" in message and "step 2" in message
    assert f"the newest whole one before it is {run / 'step_000003'}" in message


def test_a_folder_name_without_a_step_is_not_compared_with_the_recorded_step(hf: Path, run: Path) -> None:
    other = (run / "step_000002").rename(run / "begin here")
    run_on_ranks(checkpoint_ranks.load_and_save, 1, hf, other, run / "again", Setup())


def test_a_checkpoint_of_another_run_is_refused_with_both_names(hf: Path, run: Path) -> None:
    message = refused(hf, run / "step_000003", run="b-run-2")
    assert RUN in message and "b-run-2" in message and "run.init_from" in message


def test_a_checkpoint_without_digests_still_loads(hf: Path, run: Path) -> None:
    without_digests(run / "step_000003")
    assert run_on_ranks(checkpoint_ranks.resumes, 1, hf, run, Setup()) == [("step_000003", 3)]


def test_converting_a_damaged_checkpoint_is_refused_and_writes_nothing(hf: Path, run: Path, tmp_path: Path) -> None:
    damage(run / "step_000003")
    with pytest.raises(ModelError, match=r"__1_0\.distcp is not as it was written"):
        run_on_ranks(conversion_ranks.to_hf, 1, ParallelConfig(), [(run / "step_000003", tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def damage(path: Path) -> None:
    """Flip the lowest bit of one number in the middle of a shard."""
    file = path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
