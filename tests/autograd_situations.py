"""The loss inside other autograd code: the situations.

This is not a test. A situation is a short program around a loss. It computes some logits (or hidden states) from a
leaf, calls the loss, and runs a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.autograd_program import MASKED_ROWS, TOKENS, VOCABULARY, Program

Situation = Callable[[Program], None]


def plain(program: Program) -> None:
    program.loss(program.leaf * 1.0).backward()


def leaf_logits(program: Program) -> None:
    """The caller owns the logits. They must be unchanged afterwards."""
    before = program.leaf.detach().clone()
    program.loss(program.leaf).backward()
    assert torch.equal(program.leaf.detach(), before), "the leaf was overwritten"


def _hooked(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Situation:
    def situation(program: Program) -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = program.loss(program.leaf * 1.0)
        loss.backward()

    return situation


def offloaded(program: Program) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = program.loss(program.leaf * 1.0)
    loss.backward()


def offloaded_with_a_producer_that_saved_its_output(program: Program) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = program.loss(torch.tanh(program.leaf))
    loss.backward()


def offloaded_with_a_second_consumer(program: Program) -> None:
    with torch.autograd.graph.save_on_cpu():
        z = program.leaf * 1.0
        other = _consumer(program, z)
        total = program.loss(z) + other
    total.backward()


def _checkpointed(before: bool, after: bool, reentrant: bool) -> Situation:
    def situation(program: Program) -> None:
        def inside(z: Tensor) -> Tensor:
            loss = program.loss(torch.tanh(z) if before else z)
            return torch.tanh(loss * 0.01) if after else loss

        checkpoint(inside, program.leaf * 1.0, use_reentrant=reentrant).backward()

    return situation


def checkpointed_with_a_product_after_it(program: Program) -> None:
    """The product saves its operands, which makes the checkpoint run the loss again."""
    scale = torch.ones((), dtype=torch.float64, device=program.leaf.device, requires_grad=True)
    checkpoint(lambda z: program.loss(z) * scale, program.leaf * 1.0, use_reentrant=False).backward()


def checkpointed_within_a_checkpoint(program: Program) -> None:
    def inner(z: Tensor) -> Tensor:
        return checkpoint(lambda y: program.loss(torch.sin(y)), z, use_reentrant=False)

    checkpoint(inner, program.leaf * 1.0, use_reentrant=False).backward()


def _consumer(program: Program, z: Tensor) -> Tensor:
    """Another loss on the same values, which saves them. With given logits, each rank adds its own columns."""
    if program.setting.given and not program.truth:
        z = z[:, program.shard.start : program.shard.stop]
    return z.square().sum()


def second_consumer_before(program: Program) -> None:
    z = program.leaf * 1.0
    other = _consumer(program, z)
    (other + program.loss(z)).backward()


def second_consumer_after(program: Program) -> None:
    z = program.leaf * 1.0
    loss = program.loss(z)
    (loss + _consumer(program, z)).backward()


def two_losses_on_the_same_logits(program: Program) -> None:
    z = program.leaf * 1.0
    (program.loss(z) + program.loss(z)).backward()


def slices_of_one_tensor(program: Program) -> None:
    z = program.leaf * 1.0
    (program.rows_loss(z[:3], slice(0, 3)) + program.rows_loss(z[3:], slice(3, TOKENS))).backward()


def producer_that_saved_its_output(program: Program) -> None:
    program.loss(torch.tanh(program.leaf)).backward()


def gradient_accumulation(program: Program) -> None:
    program.loss(program.leaf * 1.0).backward()
    program.loss(program.leaf * 2.0).backward()


def autocast(program: Program) -> None:
    with torch.autocast(program.leaf.device.type, dtype=torch.bfloat16):
        loss = program.loss(program.leaf * 1.0)
        loss.backward()


def two_dtypes(program: Program) -> None:
    """Hidden states in the dtype of autocast and a weight in the parameters' dtype. Given logits have no weight."""
    z = program.leaf * 1.0
    program.loss(z if program.truth or program.setting.given else z.float()).backward()


def without_gradients(program: Program) -> None:
    with torch.no_grad():
        program.value = program.loss(program.leaf * 1.0)


def inference_mode(program: Program) -> None:
    with torch.inference_mode():
        program.value = program.loss(program.leaf * 1.0).clone()


def inference_logits(program: Program) -> None:
    """Tensors created in inference mode and used outside of it. PyTorch's own operations refuse to save them."""
    with torch.inference_mode(not program.truth):
        z = program.leaf.detach() * 1.0
    loss = program.loss(z)
    program.value = loss.detach().clone()
    if loss.requires_grad:
        loss.backward()


def functional_grad(program: Program) -> None:
    program.leaf.grad = torch.func.grad(program.loss)(program.leaf.detach())


def functional_vmap(program: Program) -> None:
    z = torch.stack([program.leaf, program.leaf])
    torch.func.vmap(program.loss)(z).sum().backward()


def forward_mode(program: Program) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(program.leaf.detach(), torch.ones_like(program.leaf))
        program.value = forward_ad.unpack_dual(program.loss(dual)).tangent
        assert program.value is not None, "the tangent was lost"


def batched_backward(program: Program) -> None:
    loss = program.loss(program.leaf * 1.0)
    ones = torch.ones(2, dtype=loss.dtype, device=loss.device)
    (both,) = torch.autograd.grad(loss, program.leaf, ones, is_grads_batched=True)
    program.leaf.grad = both[0]


def second_derivative(program: Program) -> None:
    (first,) = torch.autograd.grad(program.loss(program.leaf * 1.0), program.leaf, create_graph=True)
    (first * first).sum().backward()


def second_backward_pass(program: Program) -> None:
    loss = program.loss(program.leaf * 1.0)
    loss.backward(retain_graph=True)
    loss.backward()


def changed_in_place_by_others(program: Program) -> None:
    """The reference has the gradient at the values that the loss saw."""
    z = program.leaf * 1.0
    loss = program.loss(z)
    if not program.truth:
        with torch.no_grad():
            z.mul_(3.0)
    loss.backward()


def ids_changed_in_place(program: Program) -> None:
    loss = program.loss(program.leaf * 1.0)
    if not program.truth:
        program.numbers.ids_TJ.zero_()
    loss.backward()


def rows_that_share_memory(program: Program) -> None:
    program.loss(program.leaf[:1].expand(TOKENS, -1)).backward()


def gradient_of_a_hook(program: Program) -> None:
    """A hook on the logits sees their gradient, and may replace it."""
    z = program.leaf * 1.0
    z.register_hook(lambda gradient: gradient * 2.0)
    program.loss(z).backward()


def nan_in_masked_rows(program: Program) -> None:
    program.mask()
    _fill(program, torch.nan)
    program.loss(program.leaf * 1.0).backward()


def infinities_in_masked_rows(program: Program) -> None:
    program.mask()
    _fill(program, -torch.inf)
    program.loss(program.leaf * 1.0).backward()


def _fill(program: Program, number: float) -> None:
    """One entry of the first masked row and all of the second."""
    with torch.no_grad():
        program.leaf[MASKED_ROWS[0], 3] = number
        program.leaf[MASKED_ROWS[1]] = number


def impossible_entries(program: Program) -> None:
    """Given logits with -inf outside the support, as for banned tokens. Hidden states have none."""
    if program.setting.given:
        with torch.no_grad():
            for row in range(TOKENS):
                free = [v for v in range(VOCABULARY) if v not in program.numbers.ids_TJ[row].tolist()]
                program.leaf[row, free[:5]] = -torch.inf
            if program.setting.dense:
                program.numbers.teacher_TV[program.leaf.isneginf()] = -torch.inf
    program.loss(program.leaf * 1.0).backward()


def compiled_caller(program: Program) -> None:
    """torch.compile of the caller: graph breaks inside the loss."""

    def call(z: Tensor) -> Tensor:
        return program.loss(z * 1.0) * 1.0

    torch.compiler.reset()
    torch.compile(call, backend="eager")(program.leaf).backward()


SITUATIONS: dict[str, Situation] = {
    "plain": plain,
    "logits are a leaf": leaf_logits,
    "hooks that clone": _hooked(torch.clone, lambda saved: saved),
    "hooks that do nothing": _hooked(lambda saved: saved, lambda saved: saved),
    "save_on_cpu": offloaded,
    "save_on_cpu, after tanh": offloaded_with_a_producer_that_saved_its_output,
    "save_on_cpu, second consumer": offloaded_with_a_second_consumer,
    "checkpoint": _checkpointed(before=False, after=False, reentrant=False),
    "checkpoint, tanh before": _checkpointed(before=True, after=False, reentrant=False),
    "checkpoint, tanh after": _checkpointed(before=False, after=True, reentrant=False),
    "checkpoint, tanh before and after": _checkpointed(before=True, after=True, reentrant=False),
    "checkpoint, product after": checkpointed_with_a_product_after_it,
    "checkpoint in a checkpoint": checkpointed_within_a_checkpoint,
    "reentrant checkpoint": _checkpointed(before=False, after=False, reentrant=True),
    "reentrant checkpoint, tanh before": _checkpointed(before=True, after=False, reentrant=True),
    "reentrant checkpoint, tanh before and after": _checkpointed(before=True, after=True, reentrant=True),
    "second consumer before": second_consumer_before,
    "second consumer after": second_consumer_after,
    "two losses on the same logits": two_losses_on_the_same_logits,
    "slices of one tensor": slices_of_one_tensor,
    "after tanh, which saved its output": producer_that_saved_its_output,
    "gradient accumulation": gradient_accumulation,
    "autocast": autocast,
    "two dtypes": two_dtypes,
    "torch.no_grad": without_gradients,
    "torch.inference_mode": inference_mode,
    "inference tensors": inference_logits,
    "torch.func.grad": functional_grad,
    "torch.func.vmap": functional_vmap,
    "forward-mode derivative": forward_mode,
    "is_grads_batched": batched_backward,
    "create_graph=True": second_derivative,
    "second backward pass": second_backward_pass,
    "logits changed in place by others": changed_in_place_by_others,
    "ids changed in place by others": ids_changed_in_place,
    "rows that share memory": rows_that_share_memory,
    "hook on the logits": gradient_of_a_hook,
    "NaN in masked rows": nan_in_masked_rows,
    "-inf in masked rows": infinities_in_masked_rows,
    "-inf entries of given logits": impossible_entries,
    "torch.compile of the caller": compiled_caller,
}
"""The situations of the table in docs/autograd.md, in its order."""
