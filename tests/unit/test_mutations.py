"""The claims of `tests.claims` are sharp: each fault, planted in a copy of our source, makes a claim fail.

A mutant is the source of one module with one text replaced, executed as a module of its own; the other modules are the
real ones. A claim that the real modules keep (see tests/golden) must raise AssertionError for the mutant.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

from tests import claims
from tests.ranks import run_on_ranks

PACKAGE = "tropd_mcore.losses"
UNCHANGED = "from __future__ import annotations"
"""A text that every module has once: replaced by itself it gives a copy."""


@dataclass(frozen=True)
class Mutation:
    module: str
    right: str
    """Text of the source, found exactly once"""
    wrong: str
    claim: claims.Claim


MUTATIONS = {
    "sign of the advantage flipped": Mutation(
        "objectives",
        "surrogate_T = -advantage_T * inputs.student_logp_T",
        "surrogate_T = advantage_T * inputs.student_logp_T",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "sign of the log-ratio flipped": Mutation(
        "objectives",
        "(inputs.teacher_logp_T - inputs.student_logp_T).detach()",
        "(inputs.student_logp_T - inputs.teacher_logp_T).detach()",
        claims.outlier_fraction_is_the_total_variation,
    ),
    "detach of the log-ratio dropped": Mutation(
        "objectives",
        "(inputs.teacher_logp_T - inputs.student_logp_T).detach()",
        "(inputs.teacher_logp_T - inputs.student_logp_T)",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "detach of the log-ratio dropped, seen by guidance": Mutation(
        "objectives",
        "(inputs.teacher_logp_T - inputs.student_logp_T).detach()",
        "(inputs.teacher_logp_T - inputs.student_logp_T)",
        claims.scalar_guidance_points_away_from_the_teacher,
    ),
    "detach of the scalar outlier advantage dropped": Mutation(
        "objectives",
        "    fkl_T = fkl_T.detach()\n",
        "",
        claims.fkl_scalar_has_the_golden_expected_gradient,
    ),
    "labels shifted by one": Mutation(
        "support",
        "local_CJ = ids_CJ - shard.start",
        "local_CJ = ids_CJ - shard.start - 1",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "padded columns forgotten": Mutation(
        "support",
        "return max(0, min(self.stop, self.vocab_size) - self.start)",
        "return self.stop - self.start",
        claims.log_probs_entropy_and_masses_are_golden,
    ),
    "padded columns forgotten, seen by the gradient": Mutation(
        "support",
        "return max(0, min(self.stop, self.vocab_size) - self.start)",
        "return self.stop - self.start",
        claims.a_student_equal_to_its_teacher_has_no_on_policy_gradient,
    ),
    "dense coefficient of the top-k FKL is 1 instead of the teacher mass": Mutation(
        "support",
        "row_sum_C1 = grad_logp_TJ[rows].sum(dim=1, keepdim=True)",
        "row_sum_C1 = grad_logp_TJ[rows].sum(dim=1, keepdim=True).sign()",
        claims.topk_forward_kl_and_its_gradient_are_golden,
    ),
    "gate turned around": Mutation(
        "trust",
        "trust_u_T.log() < log_ratio_T",
        "trust_u_T.log() > log_ratio_T",
        claims.outlier_fraction_is_the_total_variation,
    ),
    "support entries of other shards scattered to column 0": Mutation(
        "support",
        "owned_CJ = grad_logp_CJ.masked_fill(~here_CJ, 0.0)",
        "owned_CJ = grad_logp_CJ",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "duplicate support entries overwrite instead of adding up": Mutation(
        "support",
        "grad_CR.scatter_add_(1, local_CJ[:, 1:], owned_CJ[:, 1:])",
        "grad_CR.scatter_(1, local_CJ[:, 1:], owned_CJ[:, 1:])",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "entropy moment not moved to the common maximum": Mutation(
        "support",
        "(moment_CN + shift_CN * sum_CN)",
        "moment_CN",
        claims.log_probs_entropy_and_masses_are_golden,
    ),
    "entropy gradient without the entropy": Mutation(
        "support",
        "(logp_CR + entropy_T[rows, None])",
        "logp_CR.clone()",
        claims.entropy_gradient_is_minus_p_times_log_p_plus_entropy,
    ),
    "tail bucket without its weight": Mutation(
        "divergences",
        "log_q_tail_T.exp() * (log_q_tail_T - log_p_tail_T)",
        "(log_q_tail_T - log_p_tail_T)",
        claims.topk_forward_kl_and_its_gradient_are_golden,
    ),
}
SEVERAL_SHARDS_ONLY = {
    "support entries of other shards scattered to column 0",
    "entropy moment not moved to the common maximum",
}


def load_mutant(module: str, right: str, wrong: str) -> ModuleType:
    """The module with `right` replaced by `wrong`; the text must be there exactly once."""
    original = importlib.import_module(f"{PACKAGE}.{module}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{module} has {source.count(right)} times {right!r}"
    mutant = ModuleType(f"mutant_{module}")
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    exec(compile(source.replace(right, wrong), f"<mutant of {module}>", "exec"), mutant.__dict__)  # our own source
    return mutant


def load_losses(mutation: Mutation) -> claims.Losses:
    """The modules under test with the mutant in its place, also where another module imported a name from it."""
    names = ("support", "objectives", "divergences", "trust")
    losses = claims.Losses(**{name: importlib.import_module(f"{PACKAGE}.{name}") for name in names})
    losses = replace(losses, **{mutation.module: load_mutant(mutation.module, mutation.right, mutation.wrong)})
    if mutation.module in ("divergences", "trust"):
        objectives = load_mutant(
            "objectives", "from __future__ import annotations", "from __future__ import annotations"
        )
        vars(objectives).update(topk_forward_kl=losses.divergences.topk_forward_kl, trust_gate=losses.trust.trust_gate)
        losses = replace(losses, objectives=objectives)
    return losses


def _check_mutant(mutation: Mutation) -> str:
    """The message of the claim's failure; an error of another kind is not a detection and passes through."""
    losses = load_losses(mutation)
    try:
        mutation.claim(losses)
    except AssertionError as failure:
        return str(failure)
    raise LookupError(f"{mutation.claim.__name__} did not notice: {mutation.right!r} -> {mutation.wrong!r}")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_breaks_its_claim(name: str) -> None:
    world_size = 2 if name in SEVERAL_SHARDS_ONLY else 1
    messages = run_on_ranks(_check_mutant, world_size, MUTATIONS[name])
    assert all("error" in message or "gradient" in message for message in messages)


def _check_unchanged_copy(module: str) -> None:
    for claim in claims.CLAIMS:
        claim(load_losses(Mutation(module, UNCHANGED, UNCHANGED, claim)))


@pytest.mark.parametrize("module", ["support", "objectives", "divergences", "trust"])
def test_an_unchanged_copy_keeps_every_claim(module: str) -> None:
    run_on_ranks(_check_unchanged_copy, 1, module)


def test_a_mutation_whose_text_is_gone_is_reported() -> None:
    with pytest.raises(AssertionError, match="has 0 times"):
        load_mutant("support", "a text that is not in the source", "")
