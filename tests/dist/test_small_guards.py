"""Small decisions: differences in a verification, requirements of the GPU platform, the average after a load."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.dist import average_ranks
from tests.dist.checkpoint_ranks import Setup
from tests.dist.conversion_ranks import open_layout
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.platform.cuda import CudaPlatform
from tropd_mcore.mcore.verification import compare_tensors
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import HfReader

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfReader]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with HfReader(write_tiny_model(folder, num_hidden_layers=1, with_tokenizer=False)) as reader:
        yield reader


def tensors_of(reader: HfReader) -> dict[str, Tensor]:
    return {name: reader.tensor(name).clone() for name, _ in hf_weight_plan(reader.arch)}


def compared(reader: HfReader, found: dict[str, Tensor]) -> tuple[list[bool], list[str]]:
    """(names equal, bytes equal) and the finding of each."""
    names, contents = compare_tensors("copy", reader, found.items())
    assert (names.name, contents.name) == ("copy: names", "copy: bytes")
    return [names.passed, contents.passed], [names.found, contents.found]


def test_an_identical_copy_of_a_model_passes_verification(reader: HfReader) -> None:
    assert compared(reader, tensors_of(reader)) == ([True, True], ["the same", "equal"])


def test_zero_and_minus_zero_differ_and_a_nan_equals_itself_in_a_verification(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", num_hidden_layers=1, with_tokenizer=False)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[NORM][:2] = torch.tensor([0.0, torch.nan])
    save_file(weights, file, metadata={"format": "pt"})
    with HfReader(folder) as reader:
        found = tensors_of(reader)
        assert compared(reader, found)[0] == [True, True]
        found[NORM][0] = -0.0
        assert compared(reader, found) == ([True, False], ["the same", f"1 differ: {NORM}"])


@pytest.mark.parametrize("change", ["one bit", "dtype"])
def test_a_single_changed_tensor_is_the_only_one_named(reader: HfReader, change: str) -> None:
    found = tensors_of(reader)
    if change == "dtype":
        found[NORM] = found[NORM].double()
    else:
        found[NORM].view(torch.int32)[-1] ^= 1
    assert compared(reader, found) == ([True, False], ["the same", f"1 differ: {NORM}"])


def test_a_missing_and_an_unknown_tensor_differ_in_names_and_not_in_bytes(reader: HfReader) -> None:
    found = tensors_of(reader) | {"zzz.weight": torch.zeros(2)}
    del found[NORM]
    assert compared(reader, found) == ([False, True], [f"2 differ: {NORM}, ...", "equal"])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets which modules are installed and how many GPUs there are."""
    real = importlib.util.find_spec

    def has(*, modules: set[str], gpus: int) -> None:
        asked_for = {"transformer_engine", "fused_weight_gradient_mlp_cuda"}

        def find_spec(name: str, package: str | None = None) -> Any:
            return (object() if name in modules else None) if name in asked_for else real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

    return has


def test_the_gpu_platform_needs_transformer_engine(machine: Any) -> None:
    machine(modules=set(), gpus=2)
    with pytest.raises(ConfigError, match="platform.kind = cuda: transformer_engine is not installed"):
        CudaPlatform(local_rank=1)
    machine(modules={"transformer_engine"}, gpus=2)
    assert CudaPlatform(local_rank=1).device == torch.device("cuda", 1)


def test_a_local_rank_without_its_own_gpu_is_refused(machine: Any) -> None:
    machine(modules={"transformer_engine"}, gpus=2)
    with pytest.raises(ConfigError, match=r"local rank 2 has no GPU, this machine has 2; .*--nproc-per-node=2"):
        CudaPlatform(local_rank=2)


@pytest.mark.parametrize("has_apex", [True, False])
def test_weight_gradients_are_fused_if_and_only_if_the_extension_is_installed(machine: Any, has_apex: bool) -> None:
    machine(modules={"transformer_engine"} | ({"fused_weight_gradient_mlp_cuda"} if has_apex else set()), gpus=1)
    assert CudaPlatform(local_rank=0).config_defaults()["gradient_accumulation_fusion"] is has_apex


class EngineLayer(torch.nn.Linear):
    """Has the attribute of Transformer Engine's layers, as Megatron sets it without Apex."""

    fuse_wgrad_accumulation = False


def test_layers_of_the_engine_add_their_weight_gradients_themselves_without_apex(machine: Any) -> None:
    """They need no extension for it, and what has no such attribute is left alone."""
    machine(modules={"transformer_engine"}, gpus=1)
    model = torch.nn.Sequential(EngineLayer(2, 2), torch.nn.Sequential(EngineLayer(2, 2)), torch.nn.Linear(2, 2))
    platform = CudaPlatform(local_rank=0)
    platform.prepare_training(model)
    assert [getattr(part, "fuse_wgrad_accumulation", None) for part in model.modules()] == [
        None, True, None, True, None,
    ]  # fmt: skip
    assert not EngineLayer.fuse_wgrad_accumulation
    assert platform.config_defaults()["gradient_accumulation_fusion"] is False


def saved_and_loaded(folder: Path, directory: Path) -> list[dict[str, str]]:
    """Digests of student and average: as saved, of new objects, and of these after the load."""
    setup = Setup()
    job = open_layout(setup.parallel)
    state = average_ranks.averaged(folder, job, setup, 0.5)
    average_ranks.follow(state, 0, 1)
    checkpoint.save(directory, 1, state, {}, keep=1)
    found = [average_ranks.digests(state)]
    state = average_ranks.averaged(folder, job, setup, 0.5)
    found.append(average_ranks.digests(state))
    checkpoint.load(directory / "step_000001", state)
    found.append(average_ranks.digests(state))
    destroy(job.layout)
    return found


def test_an_average_saved_before_any_step_scores_the_same_after_a_load(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", num_hidden_layers=1, with_tokenizer=False)
    (saved, new, loaded) = run_on_ranks(saved_and_loaded, 1, folder, tmp_path / "checkpoints")[0]
    assert len([name for name in saved if name.startswith("rounded") and saved[name] != new[name]]) > 5
    assert {name for name in saved if saved[name] != loaded[name]} == set()
