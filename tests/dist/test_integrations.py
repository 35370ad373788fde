"""The examples of docs/integrations.md: gradients against a float64 softmax over all ids, at TP 1 and 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dist import integration_ranks, reference
from tests.dist.layouts import Case
from tests.dist.peer_sources import PATCHES
from tests.dist.shard_errors import largest_error
from tests.ranks import run_on_ranks

UNTIED = next(name for name, config in reference.STUDENTS.items() if not config.tie_word_embeddings)


@pytest.mark.parametrize(
    "case", [Case(), Case(tensor=2), Case(tensor=2, sequence_parallel=True)], ids=["tp1", "tp2", "tp2-sp"]
)
def test_a_custom_megatron_loop_has_the_gradient_of_a_softmax(tmp_path: Path, case: Case) -> None:
    folder = reference.write_model(reference.STUDENTS[UNTIED], tmp_path / "student", seed=3)
    (expected,) = run_on_ranks(integration_ranks.by_softmax, 1, folder)
    every = run_on_ranks(integration_ranks.own_loop, case.tensor, folder, case)
    for found in every:
        torch.testing.assert_close(found["loss"].double(), expected["loss"].double(), rtol=1e-5, atol=1e-5)
    for name, gradient in expected.items():
        if name == "loss":
            continue
        parts = [found[name] for found in every]
        if "layernorm" in name:
            whole = parts[0] if not case.sequence_parallel else torch.stack(parts).sum(dim=0)
        else:
            whole = torch.cat(parts)[: len(gradient)]
        error = float((whole - gradient[: len(whole)]).abs().max() / gradient.abs().max())
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("size", [1, 2])
def test_the_hook_of_slime_has_the_gradient_of_a_softmax(size: int) -> None:
    loss, gradient, trusted = integration_ranks.slime_by_softmax()
    every = run_on_ranks(integration_ranks.slime_hook, size, size)
    for found in every:
        torch.testing.assert_close(found[0].double(), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[2].double(), trusted, rtol=1e-6, atol=0)
    assert largest_error([[found[1]] for found in every], [gradient]) < 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_function_of_nemo_rl_has_the_gradient_of_a_softmax(size: int) -> None:
    loss, gradient = integration_ranks.nemo_by_softmax()
    every = run_on_ranks(integration_ranks.nemo_loss, size, size)
    for found in every:
        torch.testing.assert_close(found[0].double(), loss, rtol=1e-5, atol=1e-6)
    assert largest_error([[found[1]] for found in every], [gradient]) < 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_that_replaces_verls_has_the_gradient_of_a_softmax(size: int) -> None:
    each, gradient, *masses = integration_ranks.verl_by_softmax()
    every = run_on_ranks(integration_ranks.verl_loss, size, size)
    for found in every:
        torch.testing.assert_close(found[0].double(), each, rtol=2e-5, atol=2e-6)
        for mass, expected in zip(found[2:], masses, strict=True):
            torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-6)
    assert largest_error([[found[1]] for found in every], [gradient]) < 1e-5


def test_an_adapter_has_at_most_fifty_lines() -> None:
    for path in (Path(integration_ranks.__file__).parents[2] / "examples" / "integrations").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, path.name


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*.patch")), ids=lambda patch: patch.stem)
def test_a_patch_only_inserts_and_contains_no_line_of_the_other_project(patch: Path) -> None:
    lines = patch.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(("--- a/", "+++ b/", "@@ -", "+")) for line in lines)
    assert all(line.split()[1].endswith(",0") for line in lines if line.startswith("@@"))
