"""The table of tests/dist/test_autograd.py is sharp: without a guard of the kernel, a situation is silently wrong.

A guard is replaced inside the rank process. Then some form must be WRONG in the named situation. Before, none is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.autograd_cases import FORMS, SITUATIONS, Setting, outcome
from tests.ranks import run_on_ranks

KERNEL = "tropd_mcore.kernel"
FUNCTIONS = ("support_loss", "support_log_probs")


def nothing(*arguments: Any) -> None:
    return None


def no_hooks() -> bool:
    return False


def always(source: Any) -> bool:
    return True


def every_row(grad_logp_CJ: Tensor, *further_C: Tensor | None) -> Tensor:
    return torch.ones(len(grad_logp_CJ), dtype=torch.bool, device=grad_logp_CJ.device)


def as_they_are(hidden_CD: Tensor, live_C: Tensor) -> Tensor:
    return hidden_CD


Guard = tuple[tuple[str, ...], Callable[..., Any] | float, str, str]
GUARDS: dict[str, Guard] = {
    "given logits are written over under hooks": (
        (f"{KERNEL}.source.saved_tensor_hooks_are_active",), no_hooks, "save_on_cpu, after tanh", "eager",
    ),
    "given logits are written over although they are a leaf": (
        (f"{KERNEL}.source.GivenLogits.may_be_overwritten",), always, "logits are a leaf", "eager",
    ),
    "folded is run again inside a backward pass": (
        (f"{KERNEL}.support_loss.refuse_a_repeated_forward",), nothing, "checkpoint, product after", "eager",
    ),
    "a second derivative is made": (
        tuple(f"{KERNEL}.{name}.begin_backward" for name in FUNCTIONS), nothing, "create_graph=True", "eager",
    ),
    "a second backward pass is made": (
        tuple(f"{KERNEL}.{name}.begin_backward" for name in FUNCTIONS), nothing, "second backward pass", "eager",
    ),
    "rows without a gradient are computed": (
        tuple(f"{KERNEL}.{name}.rows_with_gradient" for name in FUNCTIONS), every_row, "NaN in masked rows", "eager",
    ),
    "hidden states of rows without a gradient are multiplied": (
        tuple(f"{KERNEL}.{name}.finite_where_live" for name in FUNCTIONS), as_they_are, "NaN in masked rows", "eager",
    ),
    "impossible entries stay infinite": (
        (f"{KERNEL}.shard.LEAST_LOGIT",), -torch.inf, "-inf entries of given logits", "eager",
    ),
    "a raw write does not bump the version": (
        ("torch.autograd.graph.increment_version",), nothing, "after tanh, which saved its output", "triton",
    ),
}  # fmt: skip


def outcomes_without(names: tuple[str, ...], replacement: Any, situation: str, backend: str) -> tuple[list[str], ...]:
    """The outcomes of all forms with and without the guard. A failed assertion of a situation counts as WRONG."""

    def run() -> list[str]:
        found = []
        for given in FORMS.values():
            try:
                found.append(outcome(Setting(backend, **given), SITUATIONS[situation]))
            except AssertionError as error:
                found.append(f"WRONG: {error}")
        return found

    guarded = run()
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch(name, replacement))
        return guarded, run()


def test_without_the_shield_the_inner_graph_reruns_a_checkpoint_and_is_refused() -> None:
    """The guard against repeated forward passes still works, so `folded` is refused instead of wrong."""
    names = (f"{KERNEL}.support_loss.shield",)
    ((guarded, unguarded),) = run_on_ranks(outcomes_without, 1, names, nullcontext, "checkpoint", "eager")
    assert set(guarded) == {"right"}
    assert set(unguarded) == {"right", "refused: run again inside a backward pass"}


@pytest.mark.parametrize("fault", GUARDS)
def test_a_situation_is_silently_wrong_if_its_guard_is_removed(fault: str) -> None:
    ((guarded, unguarded),) = run_on_ranks(outcomes_without, 1, *GUARDS[fault])
    assert not [found for found in guarded if found.startswith("WRONG")]
    assert [found for found in unguarded if found.startswith("WRONG")]
