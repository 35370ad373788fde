"""The checks of `distill_loss`: each refuses in one line, before any collective.

Problems that only the kernel can see are not checked here (docs/autograd.md). Invariant: no host sync on a GPU, except
under `VocabParallel.debug`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tropd_mcore.errors import LossInputError
from tropd_mcore.kernel.group import OneRank, all_gather
from tropd_mcore.library.arguments import OutputLayer, TeacherLogits, TeacherTopK, VocabParallel
from tropd_mcore.objectives.catalogue import Objective

CALL = "distill_loss"
"""The function that messages name, unless `speaks_as` sets another one."""

REMEDIES = {
    "trust_u_T": 'pass trust_u_T=trust_uniforms(...) for its Bernoulli gate, or use trust_mode="soft"',
    "target_ids_T": "pass the token predicted at each position",
    "teacher.logp_T": "pass TeacherTopK(logp_T=...), the teacher's log-prob of the target",
    "teacher.ids_TK": "pass TeacherTopK(ids_TK=..., logp_TK=...), as distributed_topk finds them",
    "teacher.logp_TK": "pass TeacherTopK(ids_TK=..., logp_TK=...), as distributed_topk finds them",
    "teacher.entropy_T": "pass TeacherTopK(entropy_T=...), as distributed_topk finds it",
    "teacher logits": "pass TeacherLogits, or use full_vocabulary=False",
    "old_logp_T": "pass the log-probs from before the first update, without which every ratio is 1",
    "student_topk.old_logp_TL": "pass StudentTopK(old_logp_TL=...), without which every ratio is 1",
    "rollout_logp_T": "pass the log-probs that the rollout engine reported",
    "reference_logp_T": "pass the log-probs of the targets under the reference model",
    "student_topk": "pass StudentTopK of distributed_topk, from before the first update",
    "selected_T": "pass which tokens are selected",
    "advantage_T": "pass the advantage of each token",
    "history_weight_T": "pass the weight of each token",
}
"""Need -> advice to the caller."""

STATISTICS = ("selected_T", "advantage_T", "history_weight_T")
"""Arguments computed from other tokens of the batch; an objective reads at most one of them."""

CHANGES_THE_RESULT = {
    "prefix_mask_T": "it has no term for a teacher's prefix, whose tokens would only enlarge the count; leave it out",
    "advantage_T": "it reads no advantage; leave it out",
}
"""Arguments that are refused if the objective does not read them; other unused arguments are accepted."""


@contextmanager
def speaks_as(name: str) -> Iterator[None]:
    """Make the messages of this block name another public function."""
    try:
        yield
    except LossInputError as error:
        if not str(error).startswith(CALL):
            raise
        raise LossInputError(name + str(error).removeprefix(CALL)) from error


ROUNDING = 1e-2
"""How far a log-prob may be above 0, and a mass above 1, because engines may report them rounded to bfloat16."""


def reads_prefixes(objective: Objective) -> bool:
    """Whether the objective has a term for the tokens of a teacher's prefix."""
    if objective.function is not None or objective.trains_prefixes:
        return True
    return bool(objective.values.get("prefix_loss", "none") != "none")


def refuse_what_does_not_fit(objective: Objective, given: Mapping[str, object | None]) -> None:
    """Raise LossInputError if a need is missing, or if an argument that is not read would change the result."""
    for need in sorted(objective.needs):
        if given.get(need) is None:
            what = f"{CALL}: {objective} needs {need}, which was not given"
            raise LossInputError(f"{what}; {REMEDIES.get(need, 'pass it')}")
    reads = {
        "prefix_mask_T": reads_prefixes(objective),
        "advantage_T": objective.function is not None or "advantage_T" in objective.needs,
    }
    for name, because in CHANGES_THE_RESULT.items():
        if given.get(name) is not None and not reads[name]:
            raise LossInputError(f"{CALL}: {name} was given to {objective}: {because}")


def refuse_vp(vp: object) -> None:
    """Raise LossInputError if `vp` is no VocabParallel."""
    if not isinstance(vp, VocabParallel):
        raise LossInputError(
            f"{CALL}: vp is a {type(vp).__name__}, expected VocabParallel(group, vocab_size), or "
            "VocabParallel.single(vocab_size) for one process"
        )


def refuse_kind(name: str, tensor: Tensor | None) -> None:
    """Raise LossInputError for ids that are not integers and for other numbers that are."""
    if tensor is None:
        return
    last = name.rpartition(".")[2]
    if last.startswith(("ids_", "target_ids_")):
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise LossInputError(f"{CALL}: {name} is {tensor.dtype}, expected integers, the ids of tokens")
    elif "mask" not in last and last not in ("scored_T", "selected_T") and not tensor.is_floating_point():
        raise LossInputError(f"{CALL}: {name} is {tensor.dtype}, expected floating-point numbers")


def refuse_candidates(name: str, ids: Tensor | None, logp: Tensor | None) -> None:
    """Raise LossInputError if ids of candidates and their log-probs differ in shape."""
    if ids is not None and logp is not None and ids.shape != logp.shape:
        raise LossInputError(
            f"{CALL}: {name} has ids {tuple(ids.shape)} and log-probs {tuple(logp.shape)}; expected one for each"
        )


def refuse_tensors(**named: Tensor | None) -> None:
    """Raise LossInputError for non-tensors, DTensors and tensors on different devices."""
    devices: dict[torch.device, str] = {}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise LossInputError(f"{CALL}: {name} is a {type(tensor).__name__}, expected a tensor")
        if type(tensor).__name__ == "DTensor":  # by name, because its module takes half a second to import
            raise LossInputError(
                f"{CALL}: {name} is a DTensor; pass the local shard (to_local()), and under FSDP call the loss inside "
                "the root module's forward, where the weight is whole"
            )
        devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise LossInputError(f"{CALL}: inputs on several devices: {where}; move them to one")


def refuse_layer(layer: OutputLayer, name: str) -> None:
    """Raise LossInputError for an output layer that this loss cannot multiply: weight type, dtypes, shapes."""
    hidden, weight = layer.hidden_TD, layer.weight_WD
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.dtype.itemsize == 1:
        raise LossInputError(
            f"{CALL}: the weight of {name} is a {type(weight).__name__} of {weight.dtype}; expected a plain tensor of "
            "float32, bfloat16, float16 or float64 (dequantise FP8 weights)"
        )
    if weight.dtype != hidden.dtype:
        raise LossInputError(
            f"{CALL}: {name} has two dtypes: hidden states {hidden.dtype}, weight {weight.dtype}; expected one (call "
            "Megatron's model with fp32_output=False; under autocast, cast the weight)"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise LossInputError(
            f"{CALL}: {name} has hidden states {tuple(hidden.shape)} and a weight {tuple(weight.shape)}; expected "
            "[*T, D] and [W, D]"
        )


def refuse_mask(name: str, mask: Tensor | None) -> None:
    """Raise LossInputError for a mask that is not bool."""
    if mask is not None and mask.dtype != torch.bool:
        raise LossInputError(
            f"{CALL}: {name} is {mask.dtype}, expected bool; pass mask != 0, and values that are weights as weight_T"
        )


def refuse_shape(name: str, tensor: Tensor | None, shape: torch.Size, *, extra: int = 0) -> None:
    """Raise LossInputError unless `tensor` has one number per token, or with `extra` = 1 one row of numbers."""
    if tensor is not None and (tensor.shape[: len(shape)] != shape or tensor.dim() != len(shape) + extra):
        expected = f"{tuple(shape)}{' and one more dimension' if extra else ''}"
        raise LossInputError(
            f"{CALL}: {name} has shape {tuple(tensor.shape)}, expected {expected} as the student's tokens"
        )


def refuse_groups(vp: VocabParallel, teacher: TeacherTopK | TeacherLogits) -> None:
    """Raise LossInputError if student and teacher are not split over the same ranks."""
    if not isinstance(teacher, TeacherLogits):
        return
    ours, theirs = vp.group, teacher.vp.group
    if ours is not theirs and not (isinstance(ours, OneRank) and isinstance(theirs, OneRank)):
        raise LossInputError(f"{CALL}: student and TeacherLogits have two groups; split both over the same ranks")


def refuse_impossible_numbers(columns: Mapping[str, Tensor], student: Mapping[str, Tensor] | None = None) -> None:
    """Raise LossInputError for numbers of counted tokens that no distribution has, such as positive log-probs.

    `student` has log-probs that the caller computed, [T] or [T, K], by argument. Called for tensors on a CPU only; on a
    GPU it would be a host sync.
    """
    counted_T = columns["student_mask_T"] | columns["prefix_mask_T"]
    found = {
        f"{name} has numbers above 0; log-probs are at most 0": (logp[counted_T] > ROUNDING).any()
        for name, logp in (student or {}).items()
    }
    if problems := [what for what, here in {**found, **impossible_numbers(columns)}.items() if here]:
        raise LossInputError(f"{CALL}: {'; '.join(problems)}")


def impossible_numbers(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return possible problems of the numbers of counted tokens -> whether each exists, a bool on their device."""
    counted_T = columns["student_mask_T"] | columns["prefix_mask_T"]
    logp_T, logp_TK, u_T = columns["teacher_logp_T"], columns["teacher_topk_logp_TK"], columns["trust_u_T"]
    mass_T = logp_TK.exp().sum(dim=1)
    return {
        "teacher.logp_T has numbers above 0; log-probs are at most 0": (counted_T & (logp_T > ROUNDING)).any(),
        "teacher.logp_TK has numbers above 0; pass log q, not probabilities or logits": (
            (counted_T[:, None] & (logp_TK > ROUNDING)).any()
        ),
        "teacher.logp_TK has more than probability 1 for a token; pass true log q of different ids": (
            counted_T & (mass_T > 1.0 + ROUNDING)
        ).any(),
        # 1 itself passes: a float64 number just below 1 becomes 1 in float32
        "trust_u_T is not all in [0, 1)": (counted_T & ((u_T < 0) | (u_T > 1))).any(),
    }


def check_contents(vp: VocabParallel, constants: Mapping[str, Tensor], logits: Tensor | None) -> None:
    """The checks of `VocabParallel.debug`: all ranks have the same constants, and the numbers are possible.

    One all-gather. Every rank raises what any rank has found, as LossInputError.
    """
    ordered_TK = constants["topk_ids_TK"].sort(dim=1).values
    repeated_TK = (ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)
    found = {
        "the student's logits are not all finite": logits is not None and not logits.isfinite().all(),
        "a token has a teacher's candidate twice": repeated_TK.any(),
        **impossible_numbers(constants),
    }
    device = ordered_TK.device
    flags = torch.stack([torch.as_tensor(flag, device=device, dtype=torch.float64) for flag in found.values()])
    every = all_gather(torch.cat([flags, torch.stack([_digest(tensor) for tensor in constants.values()])]), vp.group)
    flagged = (every[:, : len(found)] > 0).any(dim=0).tolist()
    differs = (every[:, len(found) :] != every[:1, len(found) :]).any(dim=0).tolist()
    problems = [what for what, here in zip(found, flagged, strict=True) if here]
    if names := [name for name, here in zip(constants, differs, strict=True) if here]:
        problems.append(f"the ranks of the group were given different {', '.join(names)}")
    if problems:
        raise LossInputError(f"{CALL} (debug): {'; '.join(problems)}")


def _digest(tensor: Tensor) -> Tensor:
    """A float64 checksum that depends on the value and position of every number."""
    numbers = tensor.detach().to(torch.float64).nan_to_num(nan=7.0, posinf=11.0, neginf=13.0).flatten()
    places = torch.arange(1, numbers.numel() + 1, device=numbers.device, dtype=torch.float64)
    return (numbers * places.sin()).sum()
