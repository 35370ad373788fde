"""A teacher whose layers do not divide over the student's pipeline stages gives the scores of an uncut one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import conversion_ranks, own_cut_ranks, reference
from tests.dist.layouts import Case
from tests.dist.test_conversion import assert_same_bytes
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.weights.architecture import layers_of_stages

LENGTHS = [(3, 4, 9), (5, 0, 12), (2, 6, 3), (7, 3, 17)]
CASES: dict[int, dict[str, tuple[Case, tuple[int, ...] | None, list[int]]]] = {
    2: {
        "pp2": (Case(pipeline=2), None, [4, 3]),
        "pp2 given": (Case(pipeline=2), (1, 6), [1, 6]),
        "pp2 beside an interleaved student": (Case(pipeline=2, virtual_pipeline=2), None, [4, 3]),
    },
    4: {
        "pp4": (Case(pipeline=4), None, [2, 2, 2, 1]),
        "pp4 given": (Case(pipeline=4), (1, 3, 1, 2), [1, 3, 1, 2]),
        "pp2 dp2": (Case(pipeline=2), (2, 5), [2, 5]),
        "tp2 pp2": (Case(tensor=2, pipeline=2, sequence_parallel=True), None, [4, 3]),
        "cp2 pp2": (Case(context=2, pipeline=2), (3, 4), [3, 4]),
    },
}
ROUNDED = ("tp2", "cp2")
"""Beginnings of the cases whose sums are made in another order."""


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_scores_do_not_depend_on_the_cut(tied: bool, tmp_path: Path) -> None:
    """Bit for bit, unless tensor or context ranks add up in another order."""
    folder = write_tiny_model(tmp_path / "teacher", num_hidden_layers=7, tied=tied, vocab_size=131)
    rollouts = reference.make_rollouts(LENGTHS)
    whole = run_on_ranks(own_cut_ranks.scores_of, 1, folder, rollouts, {"one": (Case(), None)}, 8)[0]["one"]
    assert whole["layers"] == [7] and len(whole["logp"]) > 30
    for ranks, cases in CASES.items():
        given = {name: (case, layers) for name, (case, layers, _) in cases.items()}
        (found, *_) = run_on_ranks(own_cut_ranks.scores_of, ranks, folder, rollouts, given, 8)
        for name, (_, _, layers) in cases.items():
            assert found[name]["layers"] == layers, name
            for what in ("logp", "topk"):
                if name.startswith(ROUNDED):
                    assert float((found[name][what] - whole[what]).abs().max()) <= 2e-5, (name, what)
                else:
                    assert torch.equal(found[name][what], whole[what]), (name, what)


def test_the_first_stages_get_the_layers_that_are_left_over() -> None:
    assert [layers_of_stages(layers, 4) for layers in (8, 9, 11, 126)] == [
        [2, 2, 2, 2], [3, 2, 2, 2], [3, 3, 3, 2], [32, 32, 31, 31],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage_layers", "words"),
    [
        ((1, 1), "teacher.pipeline_layers = [1, 1] has 2 layers, num_hidden_layers of qwen3 is 3"),
        (None, "num_hidden_layers = 1 of qwen3 is less than parallel.pipeline = 2, and each stage needs a layer"),
    ],
)
def test_an_impossible_cut_is_refused_in_one_line(
    stage_layers: tuple[int, ...] | None, words: str, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=3 if stage_layers else 1)
    assert run_on_ranks(own_cut_ranks.refused, 2, folder, Case(pipeline=2), stage_layers) == [words, words]


def test_a_checkpoint_is_converted_at_a_pipeline_size_that_does_not_divide_the_layers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=4)
    made, back = tmp_path / "mcore", tmp_path / "back"
    run_on_ranks(conversion_ranks.to_mcore, 3, ParallelConfig(pipeline=3), [(folder, made)])
    run_on_ranks(conversion_ranks.to_hf, 2, ParallelConfig(pipeline=2), [(made, back)])
    assert_same_bytes(folder, back)
