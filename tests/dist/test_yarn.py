"""Megatron's YaRN against transformers: rotations beyond the original context, log-probs at all layouts, conversion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.dist import conversion_ranks, model_check_ranks
from tests.dist.conversion_ranks import open_layout
from tests.dist.layouts import Case
from tests.dist.model_check_ranks import Fault
from tests.dist.test_conversion import LIMIT_NATS, assert_same_bytes, transformers_log_probs
from tests.ranks import run_on_ranks
from tests.tiny_models import FAMILIES, write_tiny_model
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.mcore.model import _transformer_config
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.weights.architecture import read_architecture

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 48}
"""The text of the model check, 128 tokens, goes far beyond the original context."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": YARN,
    "betas": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5},
    "mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.3},
    "not truncated": {**YARN, "truncate": False},
    "long": {**YARN, "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 4096},
}


def rotations(folder: Path, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, head_dim] that Megatron's attention multiplies with."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    job = open_layout(ParallelConfig())
    model = job.build(read_architecture(folder), "float32")
    (module,) = model.modules
    emb, _ = module.rotary_pos_emb(positions, packed_seq=True)
    factor = yarn._yarn_get_concentration_factor_from_config(model.config)
    destroy(job.layout)
    return (emb.cos() * factor)[:, 0, 0].clone(), (emb.sin() * factor)[:, 0, 0].clone()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_equal_those_of_transformers_beyond_the_original_context(
    family: str, name: str, tmp_path: Path
) -> None:
    rope = VARIANTS[name]
    folder = write_tiny_model(
        tmp_path / "m", family=family, num_hidden_layers=1, max_position_embeddings=16384, rope_parameters=dict(rope)
    )
    positions = 3 * rope["original_max_position_embeddings"] + 7
    ((cos, sin),) = run_on_ranks(rotations, 1, folder, positions)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model.model.rotary_emb(torch.zeros(1, positions, 1), torch.arange(positions)[None])
    for found, wanted in zip((cos, sin), expected, strict=True):
        assert float((found - wanted[0]).abs().max()) <= 2e-6
    assert float(cos.max()) > 1.02, "the attention factor is in them"


LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"one": Case(), "bfloat16": Case(dtype="bfloat16")},
    2: {"tp2": Case(tensor=2, sequence_parallel=True), "pp2": Case(pipeline=2), "cp2": Case(context=2)},
}


@pytest.mark.parametrize("ranks", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_those_of_transformers_at_every_layout(family: str, ranks: int, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", family=family, rope_parameters=VARIANTS["mscale"], tied=family == "qwen2")
    for said in run_on_ranks(model_check_ranks.differences, ranks, folder, tmp_path, LAYOUTS[ranks], Fault()):
        assert said == dict.fromkeys(LAYOUTS[ranks], "passed")


@pytest.mark.parametrize(
    "change", [{"attention_factor": 1.0}, {"factor": 7.0}, {"beta_slow": 0.5}, {"truncate": False}], ids=str
)
def test_a_parameter_that_is_read_wrongly_is_detected(change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", rope_parameters=dict(YARN))
    scaling = read_architecture(folder).rope_scaling
    assert scaling is not None
    fault = Fault(architecture=(("rope_scaling", {**scaling, **change}),))
    ((said),) = run_on_ranks(model_check_ranks.differences, 1, folder, tmp_path, {"one": Case()}, fault)
    assert said["one"].startswith("GateError: gates.model_reading: ") and "the attention" in said["one"], said


def test_a_converted_folder_keeps_its_scaling_and_its_log_probs(tmp_path: Path) -> None:
    """Written as in Qwen's model cards: `rope_scaling` beside `rope_theta`, with either name of the type."""
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=2)
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    scaling = {"factor": 8.0, "original_max_position_embeddings": 48}
    tokens = torch.randint(307, (200,), generator=torch.Generator().manual_seed(6))
    for key in ("rope_type", "type"):
        path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": {key: "yarn", **scaling}}))
        made, back = tmp_path / f"mcore-{key}", tmp_path / f"back-{key}"
        run_on_ranks(conversion_ranks.to_mcore, 2, ParallelConfig(tensor=2), [(folder, made)])
        run_on_ranks(conversion_ranks.to_hf, 2, ParallelConfig(pipeline=2), [(made, back)])
        assert_same_bytes(folder, back)
        assert json.loads((back / "config.json").read_text()) == json.loads(path.read_text())
        (found,) = run_on_ranks(conversion_ranks.log_probs_of, 1, ParallelConfig(), [back], tokens)[0]
        assert AutoConfig.from_pretrained(back).rope_parameters["rope_type"] == "yarn"
        assert (found - transformers_log_probs(folder, tokens)).abs().max() <= LIMIT_NATS


def fusions(folder: Path) -> tuple[bool, bool]:
    """Whether rotary embeddings are fused on a platform that fuses them: with yarn, and without."""
    from tropd_mcore.mcore.model import _set_yarn

    job = open_layout(ParallelConfig())
    platform: Any = SimpleNamespace(config_defaults=job.platform.config_defaults)
    arch, found = read_architecture(folder), []
    for architecture in (arch, replace(arch, rope_scaling=None)):
        config = _transformer_config(architecture, job.layout, platform, torch.float32, {}, None)
        config.apply_rope_fusion = True
        _set_yarn(config, architecture)
        found.append(config.apply_rope_fusion)
    destroy(job.layout)
    return found[0], found[1]


def test_the_fused_kernel_which_knows_no_attention_factor_is_not_used(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=1, rope_parameters=dict(YARN))
    assert run_on_ranks(fusions, 1, folder) == [(False, True)]
