"""Hugging Face folders: written folders load in transformers, and damaged files are named in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import FAMILIES, write_tiny_model
from tropd_mcore.errors import ModelError
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import HfReader, write_hf_folder
from tropd_mcore.weights.publish import new_folder

INDEX = "model.safetensors.index.json"


def weights_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    with HfReader(folder) as reader:
        for name, _ in hf_weight_plan(reader.arch):
            yield name, reader.tensor(name)


def copy(source: Path, out: Path, max_shard_bytes: int = 10**9) -> Path:
    write_hf_folder(out, weights_of(source), source_folder=source, max_shard_bytes=max_shard_bytes)
    return out


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(action: object, *words: str) -> None:
    assert callable(action)
    with pytest.raises(ModelError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_written_folder_loads_in_transformers_with_the_same_bytes(family: str, tied: bool, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", family=family, tied=tied, dtype=torch.bfloat16)
    out = copy(source, tmp_path / "out", max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_tokenizer_chat_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    out = copy(source, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, out))
    messages = [{"role": "user", "content": "add five and two"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(messages, tokenize=False)
    assert after("take one pear").input_ids == before("take one pear").input_ids
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_config_states_the_dtype_that_was_written(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source", dtype=torch.float32)
    narrow = ((name, tensor.bfloat16()) for name, tensor in weights_of(source))
    write_hf_folder(tmp_path / "out", narrow, source_folder=source)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    old = write_tiny_model(tmp_path / "old", dtype=torch.bfloat16)
    values = json.loads((old / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (old / "config.json").write_text(json.dumps(values))
    written = json.loads((copy(old, tmp_path / "old_out") / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written


def test_sharded_and_single_file_folders_read_the_same(tmp_path: Path) -> None:
    single = write_tiny_model(tmp_path / "single", seed=3)
    sharded = write_tiny_model(tmp_path / "sharded", seed=3, max_shard_size="100KB")
    assert (sharded / INDEX).is_file()
    for (name, left), (other, right) in zip(weights_of(single), weights_of(sharded), strict=True):
        assert name == other
        assert torch.equal(left, right)


def test_slices_read_from_a_folder_equal_those_of_the_whole_tensor(tmp_path: Path) -> None:
    with HfReader(write_tiny_model(tmp_path / "m")) as reader:
        name = "model.layers.2.mlp.down_proj.weight"
        whole = reader.tensor(name)
        assert torch.equal(reader[name][5:11], whole[5:11])
        assert torch.equal(reader[name][:, 7:9], whole[:, 7:9])
        reader.check()


def test_missing_weight_files_are_named(tmp_path: Path) -> None:
    refused(lambda: HfReader(tmp_path / "absent"), "absent", "not found")
    folder = write_tiny_model(tmp_path / "m", max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    refused(lambda: HfReader(folder), shard.name, "not found", INDEX)
    (folder / INDEX).unlink()
    refused(lambda: HfReader(folder), "model.safetensors", "nor", INDEX)
    (folder / "config.json").unlink()
    refused(lambda: HfReader(folder), "config.json not found")


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, -1])
def test_a_truncated_weight_file_is_named(kept_bytes: int, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    refused(lambda: HfReader(folder), "model.safetensors", "damaged or truncated" if kept_bytes else "an empty file")


def test_an_index_that_lists_missing_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", max_shard_size="100KB")
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    refused(lambda: HfReader(folder), "ghost.weight", INDEX)
    index["weight_map"]["ghost.weight"] = "../model.safetensors"
    path.write_text(json.dumps(index))
    refused(lambda: HfReader(folder), "outside the folder")
    path.write_text("{}")
    refused(lambda: HfReader(folder), INDEX, "weight_map")


def test_names_and_shapes_are_checked_against_the_config(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    removed = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    refused(lambda: HfReader(folder).check(), "missing", "model.norm.weight")
    refused(lambda: HfReader(folder).tensor("model.norm.weight"), "model.norm.weight", "not found")
    save_file(tensors | {"model.norm.weight": removed[:-1]}, path, metadata={"format": "pt"})
    refused(lambda: HfReader(folder).check(), "model.norm.weight", "(47,)", "(48,)", "model.safetensors")
    save_file(tensors | {"model.norm.weight": removed, "model.extra": removed.clone()}, path, metadata={"format": "pt"})
    refused(lambda: HfReader(folder).check(), "unknown", "model.extra")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    change_config(folder, model_type="gemma3")
    refused(lambda: HfReader(folder), "gemma3", "qwen3")


def test_an_output_that_is_not_new_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    refused(lambda: copy(source, taken), "taken", "not empty")
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    refused(lambda: copy(source, taken / "notes.txt"), "a file of that name exists")
    refused(lambda: copy(source, taken / "notes.txt" / "below"), "cannot write to")


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    copy(write_tiny_model(tmp_path / "source"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")

    def fails_late() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights_of(source))[:-1]
        raise ModelError("the sender died")

    refused(lambda: write_hf_folder(tmp_path / "out", fails_late(), source_folder=source), "the sender died")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_incomplete_wrong_or_mixed_weights_are_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    good = list(weights_of(source))

    def write(weights: list[tuple[str, Tensor]]) -> None:
        write_hf_folder(tmp_path / "out", weights, source_folder=source)

    name, tensor = good[-1]
    refused(lambda: write(good[:-1]), "missing", name)
    refused(lambda: write([*good[:-1], (name, tensor[:-1])]), name, "(306, 48)", "(307, 48)")
    refused(lambda: write([*good, ("other.weight", tensor)]), "other.weight")
    refused(lambda: write([*good, good[0]]), "given twice")
    refused(lambda: write([*good[:-1], (name, tensor.bfloat16())]), "several dtypes")
    assert not (tmp_path / "out").exists()


def test_the_remains_of_a_killed_export_are_replaced(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "old").write_text("old")
    with new_folder(tmp_path / "out") as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert not stale.exists()
