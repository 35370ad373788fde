"""Our losses in verl's own distillation path, at TP 1 and 2: gradients against a float64 softmax over all ids.

This runs verl's source. tests/dist/test_integrations.py checks only the contract. integration_verl_ranks.py says which
parts are verl's and which are replaced. Skipped without PEERS, and without tensordict and omegaconf, which may be in a
folder named by PEERS_PACKAGES.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import integration_verl_ranks as ranks
from tests.dist.peer_sources import patched, source
from tests.dist.shard_errors import largest_error
from tropd_mcore.conformance.ranks import Pool

FORWARD_KL = {"loss_mode": "forward_kl_topk", "engine": "sglang"}
TROPD = {"loss_mode": "tropd", "engine": "sglang"}
TROPD_VLLM = {"loss_mode": "tropd", "engine": "vllm"}


def _packages() -> list[str]:
    """The folder of tensordict and omegaconf. Skips the test if there is none."""
    folder = os.environ.get("PEERS_PACKAGES")
    for name in ("tensordict", "omegaconf"):
        if importlib.util.find_spec(name) is None and not (folder and (Path(folder) / name).is_dir()):
            pytest.skip(
                f"verl computes with {name}, which is neither installed nor in the folder that PEERS_PACKAGES names"
            )
    return [folder] if folder else []


@pytest.fixture(scope="module")
def original() -> Iterator[tuple[Pool, list[str]]]:
    """Separate ranks, because verl changes the modules that it imports, and the path to verl."""
    roots = [str(source("verl")), *_packages()]
    pool = Pool({"TRITON_INTERPRET": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"})
    yield pool, roots
    pool.close()


@pytest.fixture(scope="module")
def with_our_patch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pool, list[str]]]:
    """The same for a patched copy."""
    source("verl")
    roots = [str(patched("verl", tmp_path_factory.mktemp("patched"), "verl")), *_packages()]
    pool = Pool({"TRITON_INTERPRET": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"})
    yield pool, roots
    pool.close()


# `alone` is verl's distillation_only: without it, Megatron's cross entropy runs on the same logits after our loss.


def _check(where: tuple[Pool, list[str]], size: int, options: dict[str, Any]) -> None:
    pool, roots = where
    every = pool.run(ranks.train, size, size, roots, options)
    expected = ranks.by_softmax(every[0]["uniforms"], loss_mode=options["loss_mode"], reduction=options["reduction"])
    for found in every:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found["uniforms"], every[0]["uniforms"], strict=True))
    if options["loss_mode"] == "tropd":
        assert every[0]["metrics"]["distillation/trusted"] == pytest.approx(expected["trusted"])
        assert 0.2 < expected["trusted"] < 0.9, "both branches are taken"
    error = largest_error([found["gradients"] for found in every], expected["gradients"])
    print(f"verl {options['loss_mode']}, TP {size}: largest error of a gradient {error:.2e} of its largest element")
    assert error < 1e-5


@pytest.mark.parametrize("packed", [True, False], ids=["thd", "bshd"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_function_that_replaces_verls_has_the_gradient_of_a_softmax(
    original: tuple[Pool, list[str]], size: int, reduction: str, packed: bool
) -> None:
    _check(original, size, {**FORWARD_KL, "reduction": reduction, "packed": packed, "alone": packed})


@pytest.mark.parametrize("packed", [True, False], ids=["thd", "bshd"])
@pytest.mark.parametrize("objective", [TROPD, TROPD_VLLM], ids=["sglang", "vllm"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("size", [1, 2])
def test_tropd_in_a_patched_verl_has_the_gradient_of_a_softmax(
    with_our_patch: tuple[Pool, list[str]], size: int, reduction: str, objective: dict[str, Any], packed: bool
) -> None:
    _check(with_our_patch, size, {**objective, "reduction": reduction, "packed": packed, "alone": packed})
