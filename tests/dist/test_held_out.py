"""The distance to the teacher on held-out responses, in every kind of layout, against a float64 loop over tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist import reference
from tests.dist.held_out_ranks import EVERY, LAST_STEP, Measured, measure_cases
from tests.dist.layouts import Case
from tests.ranks import run_on_ranks
from tropd_mcore.types import Rollout

LENGTHS = [(3, 9, 0), (5, 12, 0), (2, 3, 0), (7, 17, 0), (1, 5, 0), (4, 1, 0), (3, 8, 0)]
"""A response of the teacher is a prefix without a continuation."""
CASES: dict[int, dict[str, Case]] = {
    1: {"one": Case()},
    2: {
        "tp2-sp": Case(tensor=2, sequence_parallel=True),
        "pp2-vpp2": Case(pipeline=2, virtual_pipeline=2),
        "dp2-one-pack": Case(tokens_per_micro_batch=512),
    },
    4: {"tp2-cp2-logits": Case(tensor=2, context=2, form="logits"), "pp2-dp2": Case(pipeline=2)},
}
K = 5


def responses() -> list[Rollout]:
    return [replace(rollout, carries_prefix_loss=True) for rollout in reference.make_rollouts(LENGTHS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Measured]]:
    """{case: results by rank}"""
    folder = tmp_path_factory.mktemp("models")
    paths = (
        reference.write_model(reference.STUDENTS["qwen3"], folder / "student", seed=5),
        reference.write_model(reference.TEACHER, folder / "teacher", seed=11),
    )
    by_case: dict[str, Any] = {"models": paths}
    for size, cases in CASES.items():
        arguments = (*paths, responses(), cases, K, reference.TEMPERATURE, folder / "runs")
        by_rank = run_on_ranks(measure_cases, size, *arguments)
        by_case |= {name: [results[name] for results in by_rank] for name in cases}
    return by_case


@pytest.fixture(scope="module")
def expected(found: dict[str, Any]) -> dict[str, float]:
    """By the definitions, over whole vocabularies; the teacher's is wider than the student's."""
    student, teacher = (reference.reference_model(path) for path in found["models"])
    sums: dict[str, float] = {"forward_kl": 0.0, "sampled_kl": 0.0, "teacher_mass": 0.0, "nll": 0.0, "exact": 0.0}
    tokens = 0
    for rollout in responses():
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64))
        with torch.no_grad():
            log_p = (student(ids[None]).logits[0].double() / reference.TEMPERATURE).log_softmax(-1)
            log_q = teacher(ids[None]).logits[0].double().log_softmax(-1)
        for token in range(len(rollout.prompt_ids), len(ids)):
            lp, lq, x = log_p[token - 1], log_q[token - 1], int(ids[token])
            top = [v for v in lq.topk(K).indices.tolist() if v < len(lp)]
            mass, covered = float(lq[top].exp().sum()), float(lp[top].exp().sum())
            kl = float((lq[top].exp() * (lq[top] - lp[top])).sum())
            sums["forward_kl"] += kl + (1 - mass) * (math.log1p(-mass) - math.log1p(-covered))
            sums["sampled_kl"] += float(lq[x] - lp[x])
            sums["teacher_mass"] += mass
            sums["nll"] -= float(lp[x])
            shared = lq[: len(lp)]
            sums["exact"] += float((shared.exp() * (shared - lp)).sum())
            tokens += 1
    return {name: total / tokens for name, total in sums.items()} | {"tokens": tokens}


NAMES = [name for cases in CASES.values() for name in cases]


@pytest.mark.parametrize("name", NAMES)
def test_the_distance_equals_a_loop_over_tokens_in_every_layout(
    found: dict[str, list[Measured]], expected: dict[str, float], name: str
) -> None:
    for step, distance in found[name][0].by_step.items():
        if step % EVERY and step != LAST_STEP:
            assert distance is None
            continue
        assert distance is not None and (distance.tokens, distance.responses) == (expected["tokens"], len(LENGTHS))
        assert distance.unscored == 0
        for number in ("forward_kl", "sampled_kl", "teacher_mass", "nll"):
            assert getattr(distance, number) == pytest.approx(expected[number], rel=2e-5, abs=2e-5), number


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_is_loaded_once_and_never_asked_again(found: dict[str, list[Measured]], name: str) -> None:
    for rank, measured in enumerate(found[name]):
        assert measured.loads == 1 and measured.untouched
        assert measured.again == (measured.by_step[0] if rank == 0 else None)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_teacher_only_the_likelihood_is_known(found: dict[str, list[Measured]], name: str) -> None:
    first, *others = found[name]
    alone, known = first.without_teacher, first.by_step[0]
    assert alone is not None and known is not None
    assert alone.nll == pytest.approx(known.nll, rel=1e-6) and alone.tokens == alone.unscored == known.tokens
    assert all(math.isnan(number) for number in (alone.forward_kl, alone.sampled_kl, alone.teacher_mass))
    assert all(other.without_teacher is None for other in others)


def test_the_divergence_on_candidates_is_a_lower_bound(expected: dict[str, float]) -> None:
    assert 0.0 < expected["forward_kl"] < expected["exact"]
