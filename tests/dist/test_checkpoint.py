"""Checkpoints: bit-for-bit resume, other layouts, interrupted saves, and refusals before anything is overwritten."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import checkpoint_ranks, conversion_ranks
from tests.dist.checkpoint_ranks import Setup
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.checkpoint_info import latest, read_info
from tropd_mcore.weights.architecture import read_architecture

REPLICATED = OptimizerConfig(learning_rate=3e-3, distributed=False)
OVERLAPPED = OptimizerConfig(learning_rate=3e-3, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hf") / "m", tied=True)


@pytest.fixture(scope="module")
def saved(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank after 2 steps, bfloat16, distributed optimizer."""
    directory = tmp_path_factory.mktemp("saved")
    run_on_ranks(checkpoint_ranks.train_and_save, 1, hf, directory, Setup(), [2])
    return directory / "step_000002"


@pytest.mark.parametrize(
    ("setup", "ranks"),
    [
        pytest.param(Setup(), 2, id="dp2 bf16"),
        pytest.param(Setup(ParallelConfig(tensor=2, pipeline=2)), 4, id="tp2 pp2 bf16"),
        pytest.param(Setup(ParallelConfig(pipeline=2, virtual_pipeline=2)), 4, id="pp2 vpp2 dp2 bf16"),
        pytest.param(Setup(ParallelConfig(tensor=2), dtype="float32"), 4, id="tp2 dp2 fp32"),
        pytest.param(Setup(optimizer=REPLICATED), 2, id="dp2 bf16 replicated"),
        pytest.param(Setup(dtype="float32", optimizer=REPLICATED), 2, id="dp2 fp32 replicated"),
        pytest.param(Setup(optimizer=OVERLAPPED), 2, id="dp2 bf16 overlapped"),
    ],
)
def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one(hf: Path, setup: Setup, ranks: int, tmp_path: Path) -> None:
    for straight, resumed in run_on_ranks(checkpoint_ranks.straight_and_resumed, ranks, hf, tmp_path, setup):
        assert len(straight) > 30
        assert {name for name in straight if straight[name] != resumed[name]} == set()


def test_export_right_after_a_step_has_the_new_weights_while_their_gather_is_pending(hf: Path) -> None:
    plain = OVERLAPPED.model_copy(update={"overlap_grad_reduce": False, "overlap_param_gather": False})
    setups = [Setup(optimizer=plain), Setup(optimizer=OVERLAPPED)]
    expected, found = run_on_ranks(checkpoint_ranks.exported_after_a_step, 2, hf, setups)[0]
    assert len(expected) == 46
    assert found == expected


@pytest.mark.parametrize(
    ("before", "ranks_before", "after", "ranks_after"),
    [
        pytest.param(ParallelConfig(tensor=2, pipeline=2), 4, ParallelConfig(), 1, id="tp2 pp2 -> one"),
        pytest.param(ParallelConfig(), 1, ParallelConfig(tensor=2, pipeline=2), 4, id="one -> tp2 pp2"),
        pytest.param(ParallelConfig(tensor=2), 4, ParallelConfig(pipeline=2), 4, id="tp2 dp2 -> pp2 dp2"),
        pytest.param(ParallelConfig(), 2, ParallelConfig(pipeline=2, virtual_pipeline=2), 2, id="dp2 -> pp2 vpp2"),
    ],
)
@pytest.mark.parametrize("optimizer", [Setup().optimizer, REPLICATED], ids=["distributed", "replicated"])
def test_a_checkpoint_loaded_at_another_layout_holds_the_same_numbers(
    hf: Path,
    before: ParallelConfig,
    ranks_before: int,
    after: ParallelConfig,
    ranks_after: int,
    optimizer: OptimizerConfig,
    tmp_path: Path,
) -> None:
    setup = Setup(before, optimizer=optimizer)
    run_on_ranks(checkpoint_ranks.train_and_save, ranks_before, hf, tmp_path / "a", setup, [2])
    source = tmp_path / "a" / "step_000002"
    setup = Setup(after, optimizer=optimizer)
    run_on_ranks(checkpoint_ranks.load_and_save, ranks_after, hf, source, tmp_path / "b", setup)
    (left,) = run_on_ranks(checkpoint_ranks.plain_tensors, 1, source)
    (right,) = run_on_ranks(checkpoint_ranks.plain_tensors, 1, tmp_path / "b" / "step_000002")
    assert set(left) == set(right)
    moments = [name for name in left if "exp_avg" in name]
    assert len(moments) >= 2 * 10
    assert all(left[name].any() for name in moments if "word_embeddings" in name)
    for name in left:
        one, other = left[name], right[name]
        if "word_embeddings" in name or "output_layer" in name:
            assert not one[307:].any() and not other[307:].any(), name
            one, other = one[:307], other[:307]
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_a_training_checkpoint_exports_to_hugging_face_by_itself(hf: Path, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    run_on_ranks(conversion_ranks.to_hf, 2, ParallelConfig(tensor=2), [(saved, out)])
    assert read_architecture(out).dtype == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_saving_a_checkpoint_starts_no_process(hf: Path, tmp_path: Path) -> None:
    (left,) = run_on_ranks(checkpoint_ranks.train_and_save, 1, hf, tmp_path, Setup(), [1])
    assert left == {"children": [], "active": 0}


def test_only_the_newest_checkpoints_are_kept(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "step_000001.partial").mkdir()
    (tmp_path / "notes.partial").mkdir()
    run_on_ranks(checkpoint_ranks.train_and_save, 1, hf, tmp_path, Setup(), [1, 2, 3], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.partial", "step_000002", "step_000003"]
    assert latest(tmp_path) == tmp_path / "step_000003"


def test_saving_the_same_step_again_replaces_it(hf: Path, tmp_path: Path) -> None:
    for _ in range(2):
        run_on_ranks(checkpoint_ranks.train_and_save, 1, hf, tmp_path, Setup(), [1])
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("moment", ["save_rng", "_publish", "fsync_tree", "replace_folder", "_prune"])
def test_a_run_killed_while_saving_leaves_a_usable_checkpoint(hf: Path, moment: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died"):
        run_on_ranks(checkpoint_ranks.killed_while_saving, 1, hf, tmp_path, moment)
    newest = latest(tmp_path)
    published = moment == "_prune"
    assert newest == tmp_path / ("step_000002" if published else "step_000001")
    run_on_ranks(checkpoint_ranks.load_and_save, 1, hf, newest, tmp_path / "again", Setup())
    run_on_ranks(checkpoint_ranks.train_and_save, 1, hf, tmp_path, Setup(), [2])
    assert not list(tmp_path.glob("*.partial"))


def test_there_is_no_latest_checkpoint_if_none_is_complete(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    for name in ("step_000003.partial", "step_000004", "logs"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) is None


def test_a_failed_save_is_the_same_error_on_every_rank(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    errors = run_on_ranks(checkpoint_ranks.save_fails, 2, hf, tmp_path / "file" / "below")
    assert errors[0] == errors[1]
    assert errors[0].startswith("ModelError: checkpoint")
    assert "writing failed (rank 0:" in errors[0]


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(optimizer=REPLICATED), "set optimizer.distributed=true"),
        (Setup(dtype="float32"), "written with student.dtype=bfloat16, found float32"),
    ],
)
def test_a_resume_with_settings_that_would_train_differently_is_refused(
    hf: Path, saved: Path, setup: Setup, words: str
) -> None:
    with pytest.raises(ModelError) as caught:
        run_on_ranks(checkpoint_ranks.load_fails, 1, hf, saved, setup)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(saved: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", tied=True, num_hidden_layers=2)
    with pytest.raises(ModelError, match="another architecture: num_layers is 4, expected 2"):
        run_on_ranks(checkpoint_ranks.load_fails, 1, other, saved, Setup())


def test_a_checkpoint_without_optimizer_state_cannot_be_resumed(hf: Path, tmp_path: Path) -> None:
    run_on_ranks(conversion_ranks.to_mcore, 1, ParallelConfig(), [(hf, tmp_path / "mcore")])
    with pytest.raises(ModelError, match="holds weights only"):
        run_on_ranks(checkpoint_ranks.load_fails, 1, hf, tmp_path / "mcore", Setup())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tropd.json", b"{"),
        ("tropd.json", None),
        ("tropd.json", b'{"format": 0}'),
        ("common.pt", None),
        ("common.pt", b"PK"),
        (".metadata", None),
        (".metadata", b"\x80"),
        ("metadata.json", None),
        ("__0_0.distcp", None),
        ("__0_0.distcp", b"short"),
        ("rng_00000.safetensors", b"short"),
        ("rng_00000.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_gives_a_one_line_error(
    hf: Path, saved: Path, file: str, content: bytes | None, tmp_path: Path
) -> None:
    damaged = shutil.copytree(saved, tmp_path / "broken")
    assert (damaged / file).is_file()
    if content is None:
        (damaged / file).unlink()
    else:
        (damaged / file).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        run_on_ranks(checkpoint_ranks.load_fails, 1, hf, damaged, Setup())
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)


def without_digests(path: Path) -> None:
    """Turn it into a checkpoint of the format without digests."""
    values = json.loads((path / "tropd.json").read_text())
    for key in ("sha256", "files", "run"):
        del values[key]
    (path / "tropd.json").write_text(json.dumps({**values, "format": 1}))


class Intruder:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_pickled_code_in_a_checkpoint_is_refused_and_not_run(hf: Path, saved: Path, file: str, tmp_path: Path) -> None:
    """Digests do not protect against an attacker, who can leave them out (format 1) or compute new ones."""
    bad = shutil.copytree(saved, tmp_path / "bad")
    without_digests(bad)
    target = tmp_path / "ran"
    if file == "common.pt":
        torch.save({"optimizer": Intruder(target)}, bad / file)
    else:
        (bad / file).write_bytes(pickle.dumps(Intruder(target)))
    with pytest.raises(ModelError, match="cannot be read"):
        run_on_ranks(checkpoint_ranks.load_fails, 1, hf, bad, Setup())
    assert not target.exists()


def test_the_json_of_a_checkpoint_records_step_dtype_optimizer_architecture_and_layout(hf: Path, saved: Path) -> None:
    info = read_info(saved)
    assert (info.step, info.param_dtype, info.optimizer) == (2, "bfloat16", "distributed")
    assert info.architecture == read_architecture(hf)
    assert info.layout["tp_size"] == 1
    assert json.loads((saved / "tropd.json").read_text())["scheduler"]["num_steps"] == 2
