"""The adapters for NeMo-RL inside its own driver and Megatron worker: gradients of a whole model against float64.

`nemo_rl.py` runs in the unchanged source, `nemo_rl_full.py` in the source with our patch. PEERS names the sources
(tests/dist/peer_sources.py). The worker also needs Megatron-LM and Megatron-Bridge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dist import integration_nemo_rl_ranks as ranks
from tests.dist import peer_sources, tiny_gpt
from tropd_mcore.conformance.ranks import Pool

Stack = tuple[tuple[Path, ...], bool, Pool]
"""folders of NeMo-RL, Megatron-LM and Megatron-Bridge; whether NeMo-RL is patched; processes that see these"""


@pytest.fixture(scope="module", params=["as-it-is", "patched"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    full = request.param == "patched"
    folders = [peer_sources.source(name) for name in ("nemo_rl", "megatron_lm", "megatron_bridge")]
    if full:
        folders[0] = peer_sources.patched("nemo_rl", tmp_path_factory.mktemp("patched"), "nemo_rl")
    with contextlib.closing(Pool()) as pool:
        yield tuple(folders), full, pool


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_of_the_driver_gives_the_gradient_of_a_softmax(stack: Stack, size: int) -> None:
    sources, full, pool = stack
    every = pool.run(ranks.driver, size, sources, size, full)
    (expected,) = pool.run(ranks.expected, 1, full)
    for found in every:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    error = tiny_gpt.error_of([found["gradients"] for found in every], expected["gradients"])
    print(f"NeMo-RL {'patched, TrOPD' if full else 'as it is, lsm'}, TP {size}: largest gradient error {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2)], ids=["tp1", "tp2", "cp2"])
def test_packed_sequences_have_the_gradient_of_a_softmax(stack: Stack, tensor: int, context: int) -> None:
    sources, full, pool = stack
    if context > 1 and not full:
        pytest.skip("nemo_rl.py is for context parallelism 1")
    every = pool.run(ranks.packed, tensor * context, sources, tensor, context, full)
    loss, gradient = ranks.packed_expected(full)
    for found, _ in every:
        assert found == pytest.approx(loss, rel=1e-5)
    error = np.abs(sum(part for _, part in every) - gradient).max() / np.abs(gradient).max()
    print(f"NeMo-RL {'patched, TrOPD' if full else 'as it is, lsm'}, packed, TP {tensor}, CP {context}: {error:.1e}")
    assert error < 1e-5


def test_the_patch_changes_nothing_without_its_settings(stack: Stack) -> None:
    sources, full, pool = stack
    if not full:
        pytest.skip("this is about the patched source")
    (found,), (expected,) = pool.run(ranks.driver, 1, sources, 1, False), pool.run(ranks.expected, 1, False)
    assert tiny_gpt.error_of([found["gradients"]], expected["gradients"]) < 1e-5
