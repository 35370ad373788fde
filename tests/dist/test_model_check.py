"""Every Megatron model of a job against transformers' reading of its folder: right ones pass, wrong ones stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dist import model_check_ranks
from tests.dist.checkpoint_ranks import Setup
from tests.dist.layouts import Case
from tests.dist.model_check_ranks import Fault
from tests.ranks import run_on_ranks
from tests.tiny_models import FAMILIES, write_tiny_model
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"one": Case(), "logits": Case(form="logits")},
    2: {
        "tp2 sp": Case(tensor=2, sequence_parallel=True),
        "pp2": Case(pipeline=2),
        "pp2 vpp2": Case(pipeline=2, virtual_pipeline=2),
        "cp2": Case(context=2),
        "dp2": Case(),
    },
    4: {
        "tp2 cp2 sp": Case(tensor=2, context=2, sequence_parallel=True),
        "tp2 pp2 vpp2 sp": Case(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True),
        "pp2 cp2": Case(pipeline=2, context=2),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention is sharp enough for its positions to matter."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "m", rope_parameters=LINEAR)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_correctly_read_model_passes_at_every_layout(folder: Path, ranks: int, tmp_path: Path) -> None:
    for said in run_on_ranks(model_check_ranks.differences, ranks, folder, tmp_path, LAYOUTS[ranks], Fault()):
        assert said == dict.fromkeys(LAYOUTS[ranks], "passed")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_passes_in_both_dtypes(family: str, dtype: str, tmp_path: Path) -> None:
    rope = LLAMA3 if family == "llama" else LINEAR
    folder = write_tiny_model(tmp_path / "m", family=family, rope_parameters=rope, tied=family == "qwen2")
    case = Case(dtype=dtype)  # type: ignore[arg-type]
    assert run_on_ranks(model_check_ranks.differences, 1, folder, tmp_path, {"one": case}, Fault()) == [
        {"one": "passed"}
    ]


FAULTS = {
    "no scaling": (Fault(architecture=(("rope_scaling", None),)), "the attention"),
    "another factor": (Fault(architecture=(("rope_scaling", {**LINEAR, "factor": 3.9}),)), "the attention"),
    "another base": (Fault(architecture=(("rope_theta", 1.1e4),)), "the attention"),
    "another epsilon": (Fault(architecture=(("rms_norm_eps", 1e-4),)), "a norm"),
    "one scaled norm": (Fault(parameter="final_layernorm.weight"), "a norm"),
    "one scaled matrix": (Fault(parameter="layers.2.mlp.linear_fc2.weight"), "a tensor"),
    "one scaled embedding": (Fault(parameter="word_embeddings.weight"), "a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrongly_read_model_stops_with_the_key_the_number_and_the_likely_cause(
    folder: Path, name: str, tmp_path: Path
) -> None:
    fault, cause = FAULTS[name]
    ((said),) = run_on_ranks(model_check_ranks.differences, 1, folder, tmp_path, {"one": Case()}, fault)
    assert said["one"].startswith(f"GateError: gates.model_reading: teacher.path={folder}: "), said
    assert all(word in said["one"] for word in ("nats (mean)", "allowed 1e-04", cause)), said
    assert "\n" not in said["one"]


@pytest.mark.parametrize(
    ("ranks", "name", "fault"),
    [
        (2, "tp2 sp", FAULTS["no scaling"][0]),
        (2, "pp2 vpp2", Fault(parameter="layers.3.mlp.linear_fc2.weight")),
        (2, "dp2", Fault(parameter="final_layernorm.weight", replica=1)),
        (4, "tp2 cp2 sp", FAULTS["another base"][0]),
    ],
)
def test_a_fault_on_one_stage_or_one_replica_raises_on_every_rank(
    folder: Path, ranks: int, name: str, fault: Fault, tmp_path: Path
) -> None:
    cases = {name: LAYOUTS[ranks][name]}
    found = run_on_ranks(model_check_ranks.differences, ranks, folder, tmp_path, cases, fault)
    assert len({said[name] for said in found}) == 1
    assert found[0][name].startswith("GateError")


OVERLAPPED = OptimizerConfig(learning_rate=3e-3, overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(Setup(optimizer=OVERLAPPED), id="dp2 overlapped"),
        pytest.param(Setup(), id="dp2"),
        pytest.param(Setup(ParallelConfig(tensor=2)), id="tp2"),
    ],
)
def test_checking_the_student_does_not_change_a_bit_of_its_training(folder: Path, setup: Setup) -> None:
    plain = run_on_ranks(model_check_ranks.trained, 2, folder, setup, False)
    compared = run_on_ranks(model_check_ranks.trained, 2, folder, setup, True)
    assert compared == plain and len(plain[0]) > 30


def test_a_wrong_rotary_scaling_is_detected_despite_bfloat16_rounding(tmp_path: Path) -> None:
    """A folder whose config.json has a factor that Megatron did not read, with bfloat16 files and computation."""
    sharp = write_tiny_model(tmp_path / "m", rope_parameters=LINEAR, dtype=torch.bfloat16, seed=5)
    case = replace(Case(), dtype="bfloat16")
    fault = FAULTS["no scaling"][0]
    (said,) = run_on_ranks(model_check_ranks.differences, 1, sharp, tmp_path, {"one": case}, fault)
    assert said["one"].startswith("GateError"), said
    assert "the attention" in said["one"]
