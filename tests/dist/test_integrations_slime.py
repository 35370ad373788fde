"""Our losses in slime's own training actor, at TP 1 and 2: gradients against a float64 softmax over all ids.

This runs slime's source. tests/dist/test_integrations.py checks only the contract. integration_slime_ranks.py says
which parts are slime's and which are replaced. Skipped without PEERS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.dist import integration_slime_ranks as ranks
from tests.dist.peer_sources import source
from tests.dist.shard_errors import largest_error
from tropd_mcore.conformance.ranks import Pool

PLAIN = {"loss": "examples.integrations.slime.tropd_loss", "full": False}
FULL = {"loss": "examples.integrations.slime_full.tropd_loss", "full": True}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Separate ranks, because slime changes Megatron and the accelerator when it is imported."""
    source("slime")
    ranks_of_slime = Pool({"TRITON_INTERPRET": "1"})
    yield ranks_of_slime
    ranks_of_slime.close()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute_loss_function"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sample_means", "per_token"])
@pytest.mark.parametrize("adapter", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_slimes_actor_has_the_gradient_of_a_softmax(
    pool: Pool, size: int, adapter: dict[str, Any], per_token: bool, recompute: bool
) -> None:
    options = {**adapter, "per_token": per_token, "recompute": recompute}
    every = pool.run(ranks.train, size, size, str(source("slime")), options)
    lengths = [len(gradient) for gradient in every[0]["gradients"]]
    expected = ranks.by_softmax(every[0]["order"], lengths, per_token=per_token, full=adapter["full"])
    for name, number in expected["reported"].items():
        assert every[0]["reported"][name] == pytest.approx(number, rel=1e-5, abs=1e-6), name
    assert 0.2 < expected["reported"]["train/trusted"] < 0.9, "both branches are taken"
    error = largest_error([found["gradients"] for found in every], expected["gradients"])
    print(f"slime, TP {size}: largest error of a gradient {error:.2e} of its largest element")
    assert error < 1e-5
