"""examples/integrations/megatron_lm.py under Megatron's schedules: gradients of a whole model against float64.

The schedules of the installed megatron-core always run. The training steps of Megatron-LM and Megatron-Bridge run with
their sources (PEERS, tests/dist/peer_sources.py), in separate processes, because their megatron-core differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

from tests.dist import integration_megatron_lm_ranks as ranks
from tests.dist import peer_sources, tiny_gpt
from tests.ranks import run_on_ranks
from tropd_mcore.conformance.ranks import Pool

LAYOUTS = [(size, per_token) for size in (1, 2) for per_token in (True, False)]
NAMES = [f"tp{size}-{'tokens' if per_token else 'micro-batches'}" for size, per_token in LAYOUTS]


@pytest.fixture(scope="module", params=["megatron_lm", "bridge"])
def stack(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[object], Pool]]:
    """(name, folders of the sources, processes that see these)."""
    folders = [peer_sources.source("megatron_lm")]
    if request.param == "bridge":
        folders.insert(0, peer_sources.source("megatron_bridge"))
    with contextlib.closing(Pool()) as pool:
        yield request.param, list(folders), pool


def _check(every: list[ranks.Found], per_token: bool) -> None:
    (expected,) = run_on_ranks(ranks.expected, 1, per_token)
    for found in every:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    error = tiny_gpt.error_of([found["gradients"] for found in every], expected["gradients"])
    print(f"megatron-core {every[0]['version']}: largest gradient error {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize(("size", "per_token"), LAYOUTS, ids=NAMES)
def test_the_schedule_gives_the_gradient_of_a_softmax(size: int, per_token: bool) -> None:
    _check(run_on_ranks(ranks.schedule, size, size, per_token), per_token)


@pytest.mark.parametrize(("size", "per_token"), LAYOUTS, ids=NAMES)
def test_the_training_step_of_the_stack_gives_the_gradient_of_a_softmax(
    stack: tuple[str, list[object], Pool], size: int, per_token: bool
) -> None:
    name, folders, pool = stack
    every = pool.run(getattr(ranks, name), size, *folders, size, per_token)
    assert all(found["version"].startswith("0.20") for found in every)
    _check(every, per_token)


@pytest.mark.parametrize("newer", [False, True], ids=["installed", "megatron-lm"])
def test_loss_count_and_gradient_of_context_ranks_add_up_to_the_whole(newer: bool) -> None:
    loss, count, gradient = ranks.context_expected()
    if newer:
        with contextlib.closing(Pool()) as pool:
            every = pool.run(ranks.context, 2, peer_sources.source("megatron_lm"))
    else:
        every = run_on_ranks(ranks.context, 2, None)
    assert sum(found[1] for found in every) == count
    assert sum(found[0] for found in every) == pytest.approx(loss, rel=1e-5)
    assert np.abs(sum(found[2] for found in every) - gradient).max() / np.abs(gradient).max() < 1e-5
