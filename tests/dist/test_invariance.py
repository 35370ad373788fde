"""Packing, order, padding and recomputation must not change a training step. Logits equal those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.dist import reference
from tests.dist.layouts import Case, logits_of_samples, run_cases
from tests.dist.test_layouts import CONSTANTS, LENGTHS, relative_error
from tests.ranks import run_on_ranks
from tropd_mcore.mcore.model import _recomputed

TOLERANCE = 1e-5
VARIANTS = {
    "whole": Case(tokens_per_micro_batch=256),
    "split": Case(tokens_per_micro_batch=30),
    "padding-tail": Case(tokens_per_micro_batch=128, pack_multiple=32),
    "recompute-selective": Case(tokens_per_micro_batch=256, recompute="selective"),
    "recompute-full": Case(tokens_per_micro_batch=256, recompute="full"),
    "recompute-attention": Case(
        tokens_per_micro_batch=256, recompute="selective", recompute_modules=("mlp", "core_attn")
    ),
    "recompute-one-layer": Case(tokens_per_micro_batch=256, recompute="full", recompute_layers=1),
}
SHARDED_RECOMPUTE = {
    "tp2-sp-selective": Case(tensor=2, sequence_parallel=True, recompute="selective"),
    "tp2-sp-full": Case(tensor=2, sequence_parallel=True, recompute="full"),
    "pp2-vpp2-full": Case(pipeline=2, virtual_pipeline=2, recompute="full"),
    "cp2-full": Case(context=2, recompute="full"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = reference.write_model(reference.TEACHER, folder / "teacher", seed=11)
    return reference.write_model(reference.STUDENTS["qwen3"], folder / "student", seed=5), teacher


@pytest.fixture(scope="module")
def found(folders: tuple[Path, Path]) -> dict[str, Any]:
    rollouts = reference.make_rollouts(LENGTHS)
    steps = run_on_ranks(run_cases, 1, *folders, rollouts, VARIANTS, CONSTANTS)[0]
    reordered = [rollouts[index] for index in (4, 0, 6, 2, 5, 1, 3)]
    steps |= run_on_ranks(run_cases, 1, *folders, reordered, {"reordered": VARIANTS["split"]}, CONSTANTS)[0]
    steps |= run_on_ranks(run_cases, 2, *folders, rollouts, SHARDED_RECOMPUTE, CONSTANTS)[0]
    return steps


@pytest.mark.parametrize("name", [*list(VARIANTS)[1:], "reordered", *SHARDED_RECOMPUTE])
def test_loss_and_gradients_do_not_depend_on_packing_order_padding_or_recomputation(
    found: dict[str, Any], name: str
) -> None:
    expected, step = found["whole"], found[name]
    assert step["token_count"] == expected["token_count"]
    assert step["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    for key, gradient in expected["gradients"].items():
        assert relative_error(step["gradients"][key], gradient) <= TOLERANCE, key


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (2, Case()),
        (4, Case(tensor=2, sequence_parallel=True)),
        (4, Case(pipeline=2, virtual_pipeline=2)),
        (4, Case(context=2)),
    ],
    ids=["dp2", "dp2-tp2-sp", "dp2-pp2-vpp2", "dp2-cp2"],
)
def test_a_data_rank_whose_packs_are_empty_adds_nothing(
    folders: tuple[Path, Path], world_size: int, case: Case
) -> None:
    """One sample: the second replica has packs of only padding, and collectives stay in step."""
    rollouts = reference.make_rollouts(LENGTHS[:1])
    expected = run_on_ranks(run_cases, 1, *folders, rollouts, {"one": Case()}, CONSTANTS)[0]["one"]
    answers = run_on_ranks(run_cases, world_size, *folders, rollouts, {"one": case}, CONSTANTS)
    assert min(answer["one"]["own_rows"] for answer in answers) == 0
    found = answers[0]["one"]
    assert found["token_count"] == expected["token_count"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    for key, gradient in expected["gradients"].items():
        assert relative_error(found["gradients"][key], gradient) <= TOLERANCE, key


def test_the_packing_and_padding_variants_really_differ(found: dict[str, Any]) -> None:
    assert found["whole"]["micro_batches"] == 1
    assert found["split"]["micro_batches"] > 3
    assert found["padding-tail"]["pack_length"] >= found["whole"]["pack_length"] + 20


@pytest.mark.parametrize("family", list(reference.STUDENTS))
@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_equal_those_of_transformers(tmp_path: Path, family: str, world_size: int) -> None:
    """Every position, including those that are not rows in training, with uneven samples in one pack."""
    folder = reference.write_model(reference.STUDENTS[family], tmp_path / family, seed=23)
    rollouts = reference.make_rollouts(LENGTHS)
    model = reference.reference_model(folder)
    found = run_on_ranks(logits_of_samples, world_size, folder, rollouts, Case(tensor=world_size))[0]
    for rollout, logits in zip(rollouts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(rollout.token_ids)[None].long()).logits[0]
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (("none", ("mlp",), None), {}),
        (("selective", ("mlp",), None), {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        (
            ("selective", ("mlp", "core_attn"), None),
            {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
        ),
        (
            ("full", ("mlp",), None),
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ),
        (
            ("full", ("mlp",), 9),
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 9},
        ),
    ],
    ids=str,
)
def test_megatron_gets_what_to_recompute(given: tuple[Any, ...], fields: dict[str, Any]) -> None:
    """Equal gradients, as above, would not show that nothing was recomputed."""
    assert _recomputed(*given) == fields
    TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, **fields)
