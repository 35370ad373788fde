"""The independent reading equals a manual forward pass, uses only the folder, and needs the stated memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES, tiny_tokenizer, write_tiny_model
from tropd_mcore.errors import ModelError
from tropd_mcore.weights import independent
from tropd_mcore.weights.host_memory import GIB, cgroup_room, gib
from tropd_mcore.weights.independent import (
    PROBE_TEXT,
    fits,
    independent_log_probs,
    memory_needed,
    probe_ids,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "m")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_log_prob_is_that_of_a_token_given_those_before_it(family: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", family=family)
    ids = np.array([5, 200, 17, 17, 306], np.int32)
    found = independent_log_probs(folder, ids)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor(ids[None, :place], dtype=torch.int64)).logits[0, -1]
        assert abs(float(logits.log_softmax(-1)[ids[place]]) - found[place - 1]) < 1e-5
    assert found.dtype == np.float32 and found.shape == (4,)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "moe", family="qwen3_moe", num_hidden_layers=2)


def test_a_model_that_megatron_cannot_build_is_read_as_well(moe: Path) -> None:
    ids = np.array([5, 200, 17, 17, 306], np.int32)
    model: Any = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)  # with another kernel for the experts
    with torch.no_grad():
        logp = model(torch.tensor(ids[None].astype(np.int64))).logits[0].log_softmax(-1)
    expected = logp[torch.arange(4), torch.tensor(ids[1:].astype(np.int64))].numpy()
    assert np.abs(independent_log_probs(moe, ids) - expected).max() < 1e-5
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * parameters < memory_needed(moe) - 512 * 2**20 < 8 * parameters + 4 * 5 * 128 * 307


def test_a_model_that_this_machine_cannot_read_is_reported_in_one_line(moe: Path, tmp_path: Path) -> None:
    def changed(name: str, **changes: Any) -> Path:
        copy = tmp_path / name
        shutil.copytree(moe, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))
        return copy

    reason = fits(changed("fp8", quantization_config={"quant_method": "fp8"}))
    assert reason == "its weights are quantised (fp8), which is not computed on a CPU"
    for name, words in (("gpt9", "transformers cannot load it"), ("fuyu", "transformers finds no tensor")):
        with pytest.raises(ModelError, match=words) as caught:
            independent_log_probs(changed(name, model_type=name), np.array([1, 2], np.int32))
        assert "\n" not in str(caught.value)
    without = changed("without")
    tensors = load_file(without / "model.safetensors")
    lost = next(name for name in tensors if "experts.3.down_proj" in name)
    del tensors[lost]
    save_file(tensors, without / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        independent_log_probs(without, np.array([1, 2], np.int32))


def test_the_independent_reading_restores_the_number_of_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    independent_log_probs(folder, np.array([1, 2], np.int32))
    assert torch.get_num_threads() == before


def test_log_probs_in_bfloat16_are_close_but_not_equal(folder: Path) -> None:
    ids = probe_ids(folder)
    gap = np.abs(independent_log_probs(folder, ids) - independent_log_probs(folder, ids, dtype="bfloat16"))
    assert 1e-4 < gap.max() < 0.2


def test_a_missing_tensor_is_an_error_and_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        independent_log_probs(folder, np.array([1, 2], np.int32))


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "modeling_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    independent_log_probs(folder, np.array([1, 2], np.int32))
    assert not (tmp_path / "ran").exists()


def test_the_probe_is_a_text_in_the_folders_tokens_cut_to_context_and_vocabulary(tmp_path: Path) -> None:
    expected = tiny_tokenizer()(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    folder = write_tiny_model(tmp_path / "m")
    assert probe_ids(folder).tolist() == expected[:128]
    assert probe_ids(folder, limit=9).tolist() == expected[:9]
    short = write_tiny_model(tmp_path / "short", max_position_embeddings=20)
    assert probe_ids(short).tolist() == expected[:20]
    narrow = write_tiny_model(tmp_path / "narrow", vocab_size=200)
    assert probe_ids(narrow).tolist() == [index for index in expected if index < 200][:128]


def test_the_probe_of_a_folder_without_a_tokenizer_has_ids_from_a_fixed_seed(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", with_tokenizer=False)
    assert len(probe_ids(folder)) == 128
    assert probe_ids(folder).tolist() == probe_ids(folder).tolist()
    assert len(set(probe_ids(folder).tolist())) > 60


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: damaged tokenizer"):
        probe_ids(folder)


def test_the_estimated_memory_is_four_bytes_per_parameter_plus_overhead(folder: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * parameters < memory_needed(folder) - 512 * 2**20 < 8 * parameters + 4 * 5 * 128 * 307


def test_a_host_with_too_little_memory_is_reported_with_both_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(independent, "available_memory", lambda: 100 * GIB)
    assert fits(folder) is None
    monkeypatch.setattr(independent, "available_memory", lambda: GIB // 4)
    reason = fits(folder)
    assert reason is not None and "0.5 GiB" in reason and "0.2 GiB are available" in reason


def test_available_memory_is_the_tightest_cgroup_limit_without_the_file_cache(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    (root / "job/step").mkdir(parents=True)

    def group(path: str, limit: str, used: int, cache: int) -> None:
        (root / path / "memory.max").write_text(f"{limit}\n")
        (root / path / "memory.current").write_text(f"{used}\n")
        (root / path / "memory.stat").write_text(f"anon 7\ninactive_file {cache}\n")

    assert cgroup_room(root, membership) is None
    group("job/step", "max", 5, 0)
    assert cgroup_room(root, membership) is None
    group("job", "1000", 700, 200)
    assert cgroup_room(root, membership) == 500
    group("job/step", "800", 700, 0)
    assert cgroup_room(root, membership) == 100
    assert cgroup_room(root, tmp_path / "absent") is None


def test_limits_of_cgroup_version_1_count_as_well(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("4:cpu,cpuacct:/a\n5:memory:/a\n")
    folder = tmp_path / "cgroup/memory/a"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("1000")
    (folder / "memory.usage_in_bytes").write_text("900")
    (folder / "memory.stat").write_text("total_inactive_file 300\n")
    assert cgroup_room(tmp_path / "cgroup", membership) == 400


def test_memory_sizes_are_written_in_gib() -> None:
    assert [gib(size) for size in (3 * GIB, GIB // 2, GIB // 1000)] == ["3.0 GiB", "0.5 GiB", "0.001 GiB"]
