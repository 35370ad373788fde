"""The loss inside other people's autograd: situations, and whether each form of the loss is right in them.

This is not a test. A situation is a short program around a loss. It computes some logits (or hidden states) from a
leaf, calls the loss, and runs a backward pass. It is run once with the loss under test and once with a plain PyTorch
loss in float64. The outcome is `right`, `refused` (one clear error) or `WRONG`. Runs on any device and any number of
ranks.

Shapes: T tokens, V vocabulary, D hidden, J support ids, W vocabulary shard of one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tropd_mcore.errors import LossInputError
from tropd_mcore.losses.kernel.backend import Backend, Kernel
from tropd_mcore.losses.kernel.choose import backend as choose_backend
from tropd_mcore.losses.kernel.full_vocabulary import FullVocabulary
from tropd_mcore.losses.kernel.shard import Scaling, VocabShard
from tropd_mcore.losses.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.losses.kernel.support_loss import support_loss
from tropd_mcore.losses.objectives.inputs import ObjectiveOutput

TOKENS, VOCABULARY, HIDDEN, SLOTS, CHUNK = 7, 40, 6, 4, 3
TEMPERATURE, TOLERANCE = 0.7, 1e-10
MASKED_ROWS = (1, 4)
REFUSALS = (
    "has no second derivative",
    "second backward pass",
    "functional transform",
    "no forward-mode derivative",
    "two dtypes",
    "run again inside a backward pass",
    "modified by an inplace operation",
    "Inference tensors cannot be saved for backward",
)
"""Words of the errors that count as clear: ours, and autograd's own about changes in place and inference tensors."""

FORMS: dict[str, dict[str, Any]] = {
    "logits": {"given": True},
    "logits, preserve": {"given": True, "preserve": True},
    "logits, full vocabulary": {"given": True, "dense": True},
    "logits, full vocabulary, preserve": {"given": True, "dense": True, "preserve": True},
    "fused, deferred": {"mode": "deferred"},
    "fused, deferred, main_grad": {"mode": "deferred", "main_grad": True},
    "fused, folded, main_grad": {"mode": "folded", "main_grad": True},
    "fused, recompute": {"mode": "recompute"},
    "fused, recompute, main_grad": {"mode": "recompute", "main_grad": True},
    "fused, deferred, full vocabulary": {"mode": "deferred", "dense": True},
    "fused, folded, full vocabulary, main_grad": {"mode": "folded", "dense": True, "main_grad": True},
}
"""Every way to make a gradient: form, mode, and where dW goes."""


@dataclass(frozen=True)
class Setting:
    """One form of the loss on one backend, or the truth."""

    backend: str = "eager"
    given: bool = False
    preserve: bool = False
    mode: Any = "deferred"
    main_grad: bool = False
    dense: bool = False
    device: str = "cpu"


def backend_of(setting: Setting) -> Backend:
    """The backend by its name; Triton also on a CPU, where its interpreter runs it."""
    if setting.backend == "triton":
        from tropd_mcore.losses.kernel.triton_backend import TritonBackend

        return TritonBackend()
    return choose_backend(setting.backend, torch.device(setting.device))


class Numbers:
    """Fixed numbers of a case, the same on every rank; the leaf is what the situation starts from."""

    def __init__(self, setting: Setting) -> None:
        random = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(setting.device)

        self.logits_TV = 2.0 * normal(TOKENS, VOCABULARY)
        self.hidden_TD, self.weight_VD = normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN)
        self.teacher_TV = 2.0 * normal(TOKENS, VOCABULARY)
        self.a_TJ, self.b_TJ = normal(TOKENS, SLOTS), normal(TOKENS, SLOTS)
        self.c_T, self.d_T = normal(TOKENS), normal(TOKENS)
        ids = [torch.randperm(VOCABULARY, generator=random)[:SLOTS] for _ in range(TOKENS)]
        self.ids_TJ = torch.stack(ids).to(setting.device)
        self.ids_TJ[2, 0] = self.ids_TJ[2, 2]  # an id of both runs


class Program:
    """What a situation runs: a leaf, and a loss of what it makes of the leaf."""

    def __init__(self, setting: Setting, *, truth: bool) -> None:
        self.setting, self.truth, self.numbers = setting, truth, Numbers(setting)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        edges = [VOCABULARY * part // ranks + (part if part < ranks else 0) for part in range(ranks + 1)]
        self.shard = VocabShard(edges[rank], edges[rank + 1], VOCABULARY)
        if truth:
            self.shard = VocabShard(0, VOCABULARY, VOCABULARY)
        start = self.numbers.logits_TV if setting.given else self.numbers.hidden_TD
        self.leaf = start.clone().requires_grad_(True)
        self.weight = self.numbers.weight_VD[self.shard.start : self.shard.stop].clone().requires_grad_(True)
        if setting.main_grad and not truth:
            self.weight.main_grad = torch.zeros_like(self.weight, requires_grad=False)  # type: ignore[attr-defined]
        self.live_T = torch.ones(TOKENS, dtype=torch.bool, device=setting.device)
        self.value: Tensor | None = None

    def mask(self) -> None:
        """Leave some rows out of the loss."""
        self.live_T[list(MASKED_ROWS)] = False

    def loss(self, z: Tensor) -> Tensor:
        """The loss of logits [T, V], or of hidden states [T, D]; of the rows in `z`, which are the first ones."""
        return self.rows_loss(z, slice(0, len(z)))

    def rows_loss(self, z: Tensor, at: slice) -> Tensor:
        """The loss of some rows of the case."""
        if self.truth:
            return self._plain(z, at)
        kernel = Kernel(
            self.shard,
            dist.group.WORLD,  # type: ignore[arg-type]
            backend_of(self.setting),
            Scaling(TEMPERATURE),
            CHUNK,
        )
        source: LogitSource = OutputLayer(z, self.weight)
        if self.setting.given:
            whole = self.shard.width == VOCABULARY
            shard_TW = z if whole else z[:, self.shard.start : self.shard.stop]
            source = GivenLogits(shard_TW, preserve=self.setting.preserve)
        dense = None
        if self.setting.dense:
            teacher_TW = self.numbers.teacher_TV[at, self.shard.start : self.shard.stop]
            dense = FullVocabulary(GivenLogits(teacher_TW), kernel, teacher_shard=self.shard, divergence="fkl")
        output = support_loss(
            source,
            self.numbers.ids_TJ[at],
            functools.partial(self._token_loss, at),
            kernel,
            distinct=(1, SLOTS - 1),
            weight_gradient=self.setting.mode,
            dense=dense,
        )
        return output.loss_sum

    def _token_loss(
        self, at: slice, logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice
    ) -> ObjectiveOutput:
        """Not linear, so that its graph saves tensors; masked rows have no influence."""
        here = slice(at.start + rows.start, at.start + rows.stop)
        numbers, live_C = self.numbers, self.live_T[here]
        dtype = logp_CJ.dtype
        a, b, c, d = (n[here].to(dtype) for n in (numbers.a_TJ, numbers.b_TJ, numbers.c_T, numbers.d_T))
        logp_CJ = torch.where(live_C[:, None], logp_CJ, 0.0)
        loss = (a * logp_CJ).sum() + (b * logp_CJ.square()).sum()
        loss = loss + (c * torch.where(live_C, entropy_C, 0.0)).sum()
        if divergence_C is not None:
            loss = loss + (d * torch.where(live_C, divergence_C, 0.0).square()).sum()
        return ObjectiveOutput(loss, live_C.sum(), {})

    def _plain(self, z: Tensor, at: slice) -> Tensor:
        """The same by log_softmax over the whole vocabulary, on the live rows alone."""
        numbers, live = self.numbers, self.live_T[at].nonzero()[:, 0]
        logits = z[live] if self.setting.given else F.linear(z[live], self.weight)
        scaled = logits / TEMPERATURE
        logp = scaled.log_softmax(-1)
        possible = logp.masked_fill(scaled.isneginf(), 0.0)
        picked = logp.gather(1, numbers.ids_TJ[at][live])
        entropy = -(logp.exp() * possible).sum(1)
        a, b, c, d = (n[at][live] for n in (numbers.a_TJ, numbers.b_TJ, numbers.c_T, numbers.d_T))
        loss = (a * picked).sum() + (b * picked.square()).sum() + (c * entropy).sum()
        if self.setting.dense:
            teacher = numbers.teacher_TV[at][live].log_softmax(-1)
            gap = teacher.masked_fill(teacher.isneginf(), 0.0) - possible
            loss = loss + (d * (teacher.exp() * gap).sum(1).square()).sum()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """What the backward pass has left, of the whole vocabulary."""
        found: dict[str, Tensor] = {} if self.value is None else {"value": self.value}
        if self.leaf.grad is not None:
            gradient = self.leaf.grad.clone()
            if self.setting.given and not self.truth and dist.get_world_size() > 1:
                dist.all_reduce(gradient)
            found["leaf"] = gradient
        if not self.setting.given:
            weight = getattr(self.weight, "main_grad", self.weight.grad)
            if weight is not None:
                start = self.shard.start
                found["weight"] = F.pad(weight, (0, 0, start, VOCABULARY - self.shard.stop))
        return found


# ---- situations ----

Situation = Callable[[Program], None]


def plain(program: Program) -> None:
    program.loss(program.leaf * 1.0).backward()


def leaf_logits(program: Program) -> None:
    """The caller owns the logits: they must be as they were."""
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
    """Another loss on the same numbers, which saves them. Each rank adds its own columns of given logits."""
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
    """Hidden states in the dtype of autocast, a weight in the parameters' dtype; given logits have no weight."""
    z = program.leaf * 1.0
    program.loss(z if program.truth or program.setting.given else z.float()).backward()


def without_gradients(program: Program) -> None:
    with torch.no_grad():
        program.value = program.loss(program.leaf * 1.0)


def inference_mode(program: Program) -> None:
    with torch.inference_mode():
        program.value = program.loss(program.leaf * 1.0).clone()


def inference_logits(program: Program) -> None:
    """Numbers made in inference mode, used outside of it; PyTorch's own operations refuse to save them."""
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
    """The truth has the gradient of the numbers that the loss saw."""
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
    """-inf among given logits, as banned tokens have it, outside the support; hidden states have none."""
    if program.setting.given:
        with torch.no_grad():
            for row in range(TOKENS):
                free = [v for v in range(VOCABULARY) if v not in program.numbers.ids_TJ[row].tolist()]
                program.leaf[row, free[:5]] = -torch.inf
            if program.setting.dense:
                program.numbers.teacher_TV[program.leaf.isneginf()] = -torch.inf
    program.loss(program.leaf * 1.0).backward()


def compiled_caller(program: Program) -> None:
    """torch.compile of the caller: a graph break at the loss."""

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
"""What the table of docs/autograd.md has, in its order."""


def outcome(setting: Setting, situation: Situation) -> str:
    """`right`, `refused: why`, or `WRONG: how`. Runs the situation with the loss and with the truth."""
    found, expected = Program(setting, truth=False), Program(setting, truth=True)
    try:
        situation(found)
    except (LossInputError, RuntimeError) as error:
        why = next((words for words in REFUSALS if words in str(error)), None)
        return f"refused: {why}" if why else f"WRONG: {type(error).__name__}: {error}"
    situation(expected)
    right, numbers = expected.gradients(), found.gradients()
    missing = right.keys() - numbers.keys() - ({"weight"} if setting.given else set())
    if missing:
        return f"WRONG: no {missing}"
    for name, number in numbers.items():
        error = _difference(number, right.get(name, torch.zeros_like(number)), found)
        if not error <= TOLERANCE:
            return f"WRONG: {name} off by {error:.1e}"
    return "right"


def _difference(number: Tensor, right: Tensor, program: Program) -> float:
    """Relative to the largest entry; of a weight, this rank's rows."""
    if number.shape == program.numbers.weight_VD.shape and not program.setting.given:
        rows = slice(program.shard.start, program.shard.stop)
        number, right = number[rows], right[rows]
    scale = max(1.0, float(right.detach().abs().max()))
    return float((number.detach() - right.detach()).abs().max()) / scale


def outcomes(backend: str, device: str = "cpu") -> dict[str, dict[str, str]]:
    """{situation: {form: outcome}} of one backend."""
    settings = {name: replace(Setting(backend, device=device), **given) for name, given in FORMS.items()}
    return {
        name: {form: outcome(setting, situation) for form, setting in settings.items()}
        for name, situation in SITUATIONS.items()
    }
