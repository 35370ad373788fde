"""Estimates of GPU memory: against an H200, against sizes counted by hand, and as `--dry-run` prints them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tropd_mcore.cli import main as cli
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.weights.architecture import Architecture, architecture_from_config
from tropd_mcore.weights.gpu_memory import GIB, activations, rank_memory, server_memory

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
H100_GIB = 79.6


def model(family: str, hidden: int, layers: int, heads: tuple[int, int], ffn: int, *, tied: bool) -> dict[str, Any]:
    """The config.json of a published model: hidden size, layers, heads of queries and keys, size of the MLP."""
    return {
        "model_type": family, "hidden_act": "silu", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "intermediate_size": ffn,
        "vocab_size": 151936, "tie_word_embeddings": tied, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "head_dim": 128, "architectures": [f"{family.capitalize()}ForCausalLM"],
    }  # fmt: skip


SMALL = model("qwen3", 2048, 28, (16, 8), 6144, tied=True)
PUBLISHED = {
    "Qwen3-1.7B": SMALL,
    "Qwen3-SFT-1.7B": SMALL,
    "Qwen3-8B": model("qwen3", 4096, 36, (32, 8), 12288, tied=False),
    "Qwen3-Nemotron-4B": model("qwen3", 2560, 36, (32, 8), 9728, tied=True),
    "DeepSeek-R1-Distill-Qwen-1.5B": model("qwen2", 1536, 28, (12, 2), 8960, tied=False),
    "Skywork-OR1-Math-7B": model("qwen2", 3584, 28, (28, 4), 18944, tied=False),
}
"""The models of the recipes for GPUs. Qwen3-32B is missing: its recipe has it on another machine."""


def architecture(config: dict[str, Any]) -> Architecture:
    return architecture_from_config(config, source="test")


def config_of(**sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {
        "run": {"dir": "run"},
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"prompts": "p.jsonl"},
        "batch": {"tokens_per_micro_batch": 20480},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return Config.model_validate(base)


MEASURED_GIB = {"none": 85.2 - 44.3, "selective": 63.3 - 44.3, "full": 49.0 - 44.3}
"""Peak less what rests between steps, one H200, packs of 20,480 positions (docs/gpu.md)."""


@pytest.mark.parametrize("recompute", list(MEASURED_GIB))
def test_activations_are_within_15_percent_of_an_h200(recompute: str) -> None:
    config = config_of(student={"recompute": recompute})
    chunk_gib = 2048 * 151936 * 4 / GIB
    found = activations(architecture(SMALL), config) / GIB + chunk_gib
    assert found == pytest.approx(MEASURED_GIB[recompute], rel=0.15)


def test_recomputation_of_some_layers_is_between_none_and_full() -> None:
    arch = architecture(SMALL)
    found = [
        activations(arch, config_of(student={"recompute": "full", "recompute_layers": layers}))
        for layers in (7, 14, 28)
    ]
    none, full = (activations(arch, config_of(student={"recompute": kind})) for kind in ("none", "full"))
    assert none > found[0] > found[1] > found[2] == full


def test_parallel_ranks_share_what_they_shard() -> None:
    arch = architecture(SMALL)

    def size(**parallel: Any) -> int:
        return activations(arch, config_of(parallel=parallel))

    whole = size()
    assert size(tensor=2, sequence_parallel=True) == size(context=2) == whole // 2
    assert whole // 2 < size(tensor=2) < whole, "norms and residuals are not sharded"
    assert size(pipeline=2) == whole, "a stage has half of the layers, and two micro-batches in flight"
    assert size(pipeline=2, virtual_pipeline=2) > whole


def test_the_parts_of_a_rank_are_those_counted_by_hand() -> None:
    """Qwen3-1.7B: 28 layers of 50.3 M parameters and one table of 311 M. TP 2, four replicas."""
    heads, keys, hidden, ffn, table = 16 * 128, 8 * 128, 2048, 6144, 151936 * 2048
    layer = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * ffn + 2 * hidden + 2 * 128
    student = (28 * layer + hidden + table) / 2
    arch = architecture(SMALL)
    config = config_of(parallel={"tensor": 2, "data": 4, "sequence_parallel": True}, rollout={"max_new_tokens": 1000})
    found = rank_memory(config, {"student.path": arch, "teacher.path": arch}, 8)
    expected = {
        "weights": 2 * student,
        "gradients": 4 * student,
        "optimizer": 12 * student / 4,
        "loss": 2048 * 151936 / 2 * 4,
        "scores": 128 * 4 * 1000 * 64 * 12 / 4,
        "teacher": 2 * student,
    }
    for name, size in expected.items():
        assert found[name] == pytest.approx(size, rel=1e-4), name
    assert set(found) == {*expected, "activations", "context"}
    served = rank_memory(
        config_of(teacher={"kind": "sglang"}, optimizer={"distributed": False}, student={"dtype": "float32"}),
        {"student.path": arch},
        1,
    )
    assert "teacher" not in served
    assert served["optimizer"] == 2 * served["weights"] == 2 * served["gradients"]


@pytest.mark.parametrize(("tensor", "heads"), [(1, 8), (4, 2), (8, 1), (16, 1)])
def test_a_cache_has_keys_and_values_of_every_layer_and_at_least_one_head_per_rank(tensor: int, heads: int) -> None:
    server = ServerConfig(tensor_parallel=tensor, max_total_tokens=1000)
    found = server_memory(architecture(PUBLISHED["Qwen3-8B"]), server, "bfloat16")
    assert found["KV cache"] == 2 * 36 * heads * 128 * 2 * 1000
    assert found["weights"] == pytest.approx(16.4e9 / tensor, rel=0.01)
    assert "KV cache" not in server_memory(architecture(SMALL), ServerConfig(mem_fraction=0.25), "bfloat16")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the config.json of each published model, in which commands run."""
    for name, config in PUBLISHED.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], recipe: Path | str, *overrides: str) -> dict[str, str]:
    """The lines of a dry run by their names."""
    assert cli.main(["train", str(recipe), *overrides, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = re.match(r"layout +", lines[0]).end()  # type: ignore[union-attr]
    return {line[:width].strip(): line[width:] for line in lines if not line.startswith("launch")} | {
        "launch": next(line for line in lines if line.startswith("launch"))
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_of_every_recipe_tells_memory_servers_and_ports(
    capsys: pytest.CaptureFixture[str], models: Path, recipe: Path
) -> None:
    found = plan(capsys, recipe)
    on_gpus = found["layout"].endswith("platform cuda")
    assert found["ports"].startswith("ranks meet at ") and "a free port of the loopback address" in found["ports"]
    assert re.search(r"KV cache of [\d,]+ tokens for \d+ requests", found["rollouts"]) or "none: " in found["rollouts"]
    assert ("on GPU 0" in found["rollouts"]) is on_gpus
    assert ("memory" in found) is on_gpus and ("fullest GPU" in found) is on_gpus
    if on_gpus:
        parts = re.findall(r"(\w+) ([\d.]+)", found["memory"].partition("estimated: ")[2].partition(" = ")[0])
        assert {"weights", "gradients", "optimizer", "activations", "loss", "scores", "context"} <= {*dict(parts)}
        total = float(found["memory"].rpartition(" = ")[2].removesuffix(" GiB"))
        assert total == pytest.approx(sum(float(size) for _, size in parts), abs=0.05 * len(parts))
        servers = [text for name, text in found.items() if name.startswith("rollout.servers.")]
        used = [gpu for gpus in re.findall(r"on GPU ([\d, +]+)", found["rollouts"]) for gpu in re.findall(r"\d+", gpus)]
        assert f"= {len(used)} ranks" in found["layout"], "every GPU samples"
        assert all(re.search(r"weights [\d.]+ \+ KV cache [\d.]+ = ", text) for text in servers)
        fullest = float(found["fullest GPU"].partition(": ")[2].split()[0])
        assert total < fullest < 0.85 * H100_GIB, "some room is left for CUDA graphs and fragmentation"


def test_a_dry_run_needs_no_model_and_says_which_one_it_did_not_find(
    capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    recipe = ROOT / "configs" / "qwen3-1.7b-from-qwen3-8b-1n8g-tp2.yaml"
    (models / "models" / "Qwen3-8B" / "config.json").unlink()
    assert plan(capsys, recipe)["memory"] == "not estimated: no config.json in models/Qwen3-8B"
    (models / "models" / "Qwen3-8B" / "config.json").write_text("{}")
    line = plan(capsys, recipe)["memory"]
    assert line.startswith("not estimated: models/Qwen3-8B/config.json: model_type is None; supported are")
    assert "memory" in plan(capsys, recipe, "teacher.kind=sglang", "teacher.server.url=http://h:1")


def test_a_served_teacher_of_a_family_that_only_sglang_knows_counts_with_its_files(
    capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    recipe = ROOT / "configs" / "qwen3-1.7b-from-qwen3-8b-1n8g-tp2.yaml"
    folder = models / "models" / "Qwen3-8B"
    (folder / "config.json").write_text('{"model_type": "mixtral", "vocab_size": 9, "max_position_embeddings": 9}')
    for part in range(2):
        with (folder / f"model-{part}.safetensors").open("wb") as file:
            file.truncate(3 * GIB)  # a file with holes takes no space
    server = "teacher.server={max_total_tokens: 100000, tensor_parallel: 2, gpus: [2, 3], port: 7007}"
    found = plan(capsys, recipe, "teacher.kind=sglang", server)
    assert found["memory"].startswith("per rank, estimated: weights")
    assert "weights, as on disk 3.0 = 3.0 GiB" in found["teacher.server"]
    assert found["teacher.server"].endswith("because only SGLang knows this family of models")


def test_two_servers_and_a_rank_on_one_gpu_are_added_up(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    recipe = ROOT / "configs" / "qwen3-1.7b-from-qwen3-8b-1n8g-tp2.yaml"
    server = "teacher.server={max_total_tokens: 200000, gpus: [%d], port: 7007}"
    apart = plan(capsys, recipe, "rollout.servers=[]", "teacher.kind=sglang", server % 3)
    shared = plan(capsys, recipe, "rollout.servers=[]", "teacher.kind=sglang", server % 0)
    sizes = [float(found["fullest GPU"].split()[2]) for found in (apart, shared)]
    own = [float(apart[key].partition(" = ")[2].split()[0]) for key in ("rollout.server", "teacher.server")]
    assert apart["fullest GPU"].startswith("GPU 3: ") and shared["fullest GPU"].startswith("GPU 0: ")
    assert sizes[1] - sizes[0] == pytest.approx(min(own), abs=0.11)
    assert "teacher.server on port 7007 of the loopback address" in apart["ports"]
    taking_turns = plan(capsys, recipe, "rollout.servers=[]", "rollout.server.release_memory=true")
    assert taking_turns["fullest GPU"].endswith("; release_memory: they take turns")
    assert taking_turns["rollouts"].count(", in turns with training") == 1
