"""platform.deterministic: what is switched on, what is refused, and that training on a CPU works with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.dist import platform_ranks
from tests.ranks import run_on_ranks
from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.platform.deterministic import make_deterministic
from tropd_mcore.weights.architecture import read_architecture


@pytest.fixture(autouse=True)
def switched_back() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_and_the_variables_of_all_libraries_are_set() -> None:
    environ: dict[str, str] = {}
    make_deterministic(environ)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert environ == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
    }


def test_another_value_that_repeats_is_kept() -> None:
    environ = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "^NVLS", "OTHER": "1"}
    make_deterministic(environ)
    assert environ == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "NCCL_ALGO": "^NVLS",
        "OTHER": "1",
    }


def test_every_variable_that_contradicts_is_refused_and_nothing_is_switched() -> None:
    environ = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1", "CUBLAS_WORKSPACE_CONFIG": ":0:0", "NCCL_ALGO": "NVLS"}
    before = dict(environ)
    with pytest.raises(ConfigError) as refused:
        make_deterministic(environ)
    remedy = "unset the variable, or set platform.deterministic=false"
    expected = {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1": "0",
        "CUBLAS_WORKSPACE_CONFIG=:0:0": ":4096:8 or :16:8",
        "NCCL_ALGO=NVLS": "Ring or Tree or CollnetDirect or CollnetChain or ^NVLS",
    }
    lines = [f"platform.deterministic=true: {given}, expected {values}; {remedy}" for given, values in expected.items()]
    assert refused.value.problems == lines
    assert environ == before and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_model_follows_the_switch_and_its_embedding_has_the_right_gradient(
    tmp_path: Path, deterministic: bool
) -> None:
    """Megatron then looks up embeddings in a way whose gradient has a fixed order."""
    folder = write_tiny_model(tmp_path / "tiny", num_hidden_layers=1)
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(7, (2, 37), generator=random)
    back = torch.randn(2, 37, read_architecture(folder).hidden_size, generator=random)
    found = run_on_ranks(platform_ranks.deterministic_lookup, 1, folder, ids, back, deterministic)[0]
    assert found["mode"] is deterministic
    expected = torch.zeros(found["gradient"].shape, dtype=torch.float64)
    for token, gradient in zip(ids.flatten().tolist(), back.flatten(0, 1).double(), strict=True):
        expected[token] += gradient
    torch.testing.assert_close(found["gradient"].double(), expected, rtol=1e-5, atol=1e-5)
