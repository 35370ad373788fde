"""The claims about divergences are sharp: each fault, planted in a copy of our source, makes its claim fail.

A mutant is the source of one module with one text replaced. The modules that import from it are executed again, so that
they use it. All other modules are the real ones. The real modules keep every claim.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import divergence_oracles, oracles
from tests.objective_batch import Batch
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits
from tropd_mcore.kernel.support_loss import support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.parts.policy_gradient import PolicyGradient

PACKAGE = "tropd_mcore"
MODULES = (
    "kernel.full_vocabulary",
    "objectives.parts.divergences",
    "objectives.trust_region",
    "objectives.matching",
    "objectives.self_distillation",
)
"""In an order in which each module comes after those that it imports."""
UNCHANGED = "from __future__ import annotations"
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tropd_vector.json").read_text(encoding="utf-8"))
LOG_P = oracles.log_softmax(np.array(GOLDEN["student_logits"]))
LOG_Q = oracles.log_softmax(np.array(GOLDEN["teacher_logits"]))
TOP, BETA, PLAIN = [1, 3, 0], 0.3, PolicyGradient()

Modules = dict[str, ModuleType]
Claim = Callable[[Modules], None]


def load(module: str, right: str, wrong: str) -> Modules:
    """All modules, with `right` replaced by `wrong` in one of them. The text must occur exactly once."""
    loaded: Modules = {}
    with mock.patch.dict(sys.modules):
        for name in MODULES:
            original = importlib.import_module(f"{PACKAGE}.{name}")
            assert original.__file__ is not None
            source = Path(original.__file__).read_text(encoding="utf-8")
            if name == module:
                assert source.count(right) == 1, f"{name} has {source.count(right)} times {right!r}"
                source = source.replace(right, wrong)
            copy = ModuleType(original.__name__)
            sys.modules[copy.__name__] = copy  # what comes after imports from the copy
            exec(compile(source, f"<mutant of {name}>", "exec"), copy.__dict__)  # source of this project
            loaded[name] = copy
    return loaded


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def golden_batch(topk: int = 3) -> Batch:
    """Every outcome x once, weighted by p(x)."""
    batch = Batch(tokens=8, vocabulary=8, topk=topk, student_topk=3)
    batch.origin = ["student"] * 8
    batch.z_TV = torch.tensor(GOLDEN["student_logits"], dtype=torch.float64).repeat(8, 1).requires_grad_(True)
    batch.old_z_TV = batch.z_TV.detach().clone()
    batch.log_q_TV = torch.from_numpy(LOG_Q).repeat(8, 1)
    batch.x_T, batch.weight_T = torch.arange(8), torch.from_numpy(np.exp(LOG_P))
    return batch


def gradient(output: TokenLosses, batch: Batch) -> oracles.Array:
    return batch.gradient(output.loss_sum).sum(dim=0).numpy()


# ---- claims ----


def every_divergence_and_norm_equals_the_oracle(modules: Modules) -> None:
    batch = golden_batch()
    for kind in ("fkl", "rkl", "jsd"):
        for norm in ("truncated", "tail", "renorm"):
            output = modules["objectives.matching"].gkd(
                batch.inputs(), divergence=kind, beta=BETA, norm=norm, full_vocabulary=False
            )
            assert_close(output.columns["loss"], divergence_oracles.divergence(kind, LOG_Q, LOG_P, TOP, norm, BETA))
            expected = divergence_oracles.divergence_gradient(kind, LOG_Q, LOG_P, TOP, norm, BETA)
            assert_close(gradient(output, batch), expected)


def an_absent_candidate_does_not_count(modules: Modules) -> None:
    batch = golden_batch(topk=4)
    inputs = batch.inputs()
    inputs.teacher_topk_logp_TK[:, 3] = -math.inf
    for kind in ("fkl", "rkl", "jsd"):
        output = modules["objectives.matching"].gkd(
            inputs, divergence=kind, beta=BETA, norm="tail", full_vocabulary=False
        )
        assert_close(output.columns["loss"], divergence_oracles.divergence(kind, LOG_Q, LOG_P, TOP, "tail", BETA))


def a_certain_student_stays_finite_in_float32(modules: Modules) -> None:
    log_p = torch.tensor([[0.0, -120.0]], requires_grad=True)
    for name in ("topk_forward_kl", "topk_reverse_kl"):
        value_T = getattr(modules["objectives.parts.divergences"], name)(
            log_p, torch.tensor([[-0.5, -90.0]]), norm="tail"
        )
        (grad,) = torch.autograd.grad(value_T.sum(), log_p)
        assert value_T.isfinite().all() and grad.isfinite().all(), "value or gradient is not finite"


def the_mixture_is_exact_where_both_agree(modules: Modules) -> None:
    logp = torch.tensor([-7.3, -0.1], requires_grad=True)
    mixture = modules["kernel.full_vocabulary"].log_mixture(logp, logp.detach(), BETA)
    (grad,) = torch.autograd.grad(mixture.sum(), logp)
    assert_close(mixture.detach(), logp.detach(), 0.0)
    assert_close(grad, [1 - BETA, 1 - BETA], 1e-6)


def the_clamped_log_ratio_has_no_gradient(modules: Modules) -> None:
    batch = golden_batch()
    output = modules["objectives.matching"].lsm(batch.inputs(), sampled_tail=False, clip_log_ratio=0.8)
    p, q = np.exp(LOG_P[TOP]), np.exp(LOG_Q[TOP])
    p, q = p / p.sum(), q / q.sum()
    clamped, expected = np.clip(np.log(p / q), -0.8, 0.8), np.zeros(8)
    expected[TOP] = p * (clamped - (p * clamped).sum())
    assert_close(gradient(output, batch), expected)


def the_sampled_token_joins_the_support_once(modules: Modules) -> None:
    batch = golden_batch()
    output = modules["objectives.matching"].lsm(batch.inputs(), sampled_tail=True, clip_log_ratio=None)
    supports = [list(dict.fromkeys([*TOP, x])) for x in range(8)]
    expected = [divergence_oracles.divergence("rkl", LOG_Q, LOG_P, support, "renorm") for support in supports]
    assert_close(output.columns["loss"], expected)


def eopd_adds_the_forward_kl_where_the_teacher_is_uncertain(modules: Modules) -> None:
    forward = np.array(GOLDEN["forward_kl_topk_gradient"]["truncated"])
    for threshold, adds in ((0.8, 1.0), (1.3, 0.0)):
        batch = golden_batch()
        output = modules["objectives.matching"].eopd(
            batch.inputs(), entropy_threshold=threshold, norm="truncated", policy=PLAIN
        )
        assert_close(gradient(output, batch), np.array(GOLDEN["reverse_kl_gradient"]) + adds * forward, 3e-6)


def an_unknown_entropy_is_not_taken_for_certainty(modules: Modules) -> None:
    inputs = golden_batch().inputs()
    inputs = replace(inputs, teacher_entropy_T=torch.full_like(inputs.teacher_entropy_T, math.nan))
    output = modules["objectives.matching"].eopd(inputs, entropy_threshold=0.8, norm="truncated", policy=PLAIN)
    assert output.loss_sum.isnan(), "the loss is a number"


def the_aopd_gate_is_golden_and_replaces_the_reward(modules: Modules) -> None:
    batch = golden_batch()
    output = modules["objectives.trust_region"].aopd(batch.inputs(), threshold=0.0, norm="truncated", policy=PLAIN)
    p, closed = np.exp(LOG_P), np.array([1, 0, 1, 0, 0, 1, 1, 0])
    assert_close(output.columns["trusted"], 1 - closed)
    expected = (p * closed).sum() * divergence_oracles.divergence_gradient("fkl", LOG_Q, LOG_P, TOP, "truncated")
    for x in range(8):
        expected += p[x] * (1 - closed[x]) * (LOG_Q[x] - LOG_P[x]) * (p - np.eye(8)[x])
    assert_close(gradient(output, batch), expected)


def the_expected_gradient_of_the_jsd_is_exact(modules: Modules) -> None:
    batch = golden_batch(topk=8)
    output = modules["objectives.matching"].jsd(batch.inputs(), beta=BETA, policy=PLAIN)
    assert_close(gradient(output, batch), divergence_oracles.exact_gradient("jsd", LOG_Q, LOG_P, BETA))


def sdpo_has_the_capped_ratio_and_its_ends(modules: Modules) -> None:
    for alpha, kind in ((0.0, "fkl"), (BETA, "jsd"), (1.0, "rkl")):
        batch = golden_batch()
        inputs = batch.inputs()
        inputs = replace(inputs, old_logp_T=inputs.old_logp_T + torch.linspace(-1.5, 1.0, 8, dtype=torch.float64))
        output = modules["objectives.self_distillation"].sdpo(
            inputs, alpha=alpha, norm="tail", ratio_cap=2.0, policy=PLAIN
        )
        factor = np.minimum(np.exp(-np.linspace(-1.5, 1.0, 8)), 2.0)
        own = divergence_oracles.divergence_gradient(kind, LOG_Q, LOG_P, [0, 1, 2], "tail", BETA)
        assert_close(gradient(output, batch), (np.exp(LOG_P) * factor).sum() * own)


def opsd_bounds_each_entry_and_gives_a_bounded_one_no_gradient(modules: Modules) -> None:
    """Golden student and teacher, candidates 0, 1, 2: entries 0.0, ... of which those above the bound are constant."""
    p, q, own, bound = np.exp(LOG_P), np.exp(LOG_Q), [0, 1, 2], 0.1
    batch = golden_batch()
    output = modules["objectives.self_distillation"].opsd(batch.inputs(), entry_clip=bound, norm="tail")
    events = [(p[v], q[v]) for v in own] + [(1 - p[own].sum(), 1 - q[own].sum())]
    entries = np.array([b * math.log(b / a) for a, b in events])
    held = entries > bound
    assert held.any() and not held.all()
    assert_close(output.columns["loss"], np.minimum(entries, bound).sum())
    assert_close(output.columns["clipped_entries"], held.sum())
    tail = [v for v in range(8) if v not in own]
    expected = np.zeros(8)
    for (a, b), members, constant in zip(events, [[0], [1], [2], tail], held, strict=True):
        if not constant:  # d/dz_v of -b log a, a the probability of the members
            expected -= b * (np.array([p[v] / a if v in members else 0.0 for v in range(8)]) - p)
    assert_close(gradient(output, batch), expected)


def the_divergence_over_the_whole_vocabulary_is_exact_on_shards(modules: Modules) -> None:
    start, stop = (0, 3, 8)[dist.get_rank() : dist.get_rank() + 2] if dist.get_world_size() == 2 else (0, 8)
    shard, group = VocabShard(start, stop, 8), dist.group.WORLD
    assert group is not None
    kernel = Kernel(shard, group, EagerBackend(), Scaling(temperature=0.5), chunk_tokens=1)
    z_TV = torch.tensor([GOLDEN["student_logits"]] * 2, dtype=torch.float64)
    log_p = oracles.log_softmax(np.array(GOLDEN["student_logits"]), 0.5)

    def loss(logp_CJ: Any, entropy_C: Any, divergence_C: Any, rows: slice) -> TokenLosses:
        return TokenLosses(divergence_C, divergence_C == divergence_C, {"divergence": divergence_C.detach()})

    for kind in ("fkl", "rkl", "jsd"):
        teacher = GivenLogits(torch.from_numpy(LOG_Q).repeat(2, 1)[:, start:stop] + 3.0)
        dense = modules["kernel.full_vocabulary"].FullVocabulary(
            teacher, kernel, teacher_shard=shard, divergence=kind, beta=BETA
        )
        z_TW = z_TV[:, start:stop].clone().requires_grad_(True)
        ids = torch.zeros(2, 1, dtype=torch.int64)
        output = support_loss(
            GivenLogits(z_TW * 1.0), ids, loss, kernel, unique_run_lengths=(1,), full_vocab_term=dense
        )
        output.loss_sum.backward()
        assert_close(output.columns["divergence"], divergence_oracles.exact(kind, LOG_Q, log_p, BETA))
        expected = 2.0 * divergence_oracles.exact_gradient(kind, LOG_Q, log_p, BETA)[start:stop]
        assert z_TW.grad is not None
        assert_close(z_TW.grad, [expected, expected])


# ---- faults ----


@dataclass(frozen=True)
class Mutation:
    module: str
    right: str
    """Text of the source, found exactly once"""
    wrong: str
    claim: Claim
    ranks: int = 1


DIVERGENCE = every_divergence_and_norm_equals_the_oracle
DENSE = the_divergence_over_the_whole_vocabulary_is_exact_on_shards
MUTATIONS = {
    "forward KL with its arguments swapped": Mutation(
        "objectives.parts.divergences",
        "logq_TE.exp() * (logq_TE - logp_TE)",
        "logp_TE.exp() * (logp_TE - logq_TE)",
        DIVERGENCE,
    ),
    "reverse KL without a gradient in its weights": Mutation(
        "objectives.parts.divergences",
        "logp_TE.exp() * (logp_TE - logq_TE)",
        "logp_TE.exp().detach() * (logp_TE - logq_TE)",
        DIVERGENCE,
    ),
    "weights of the mixture swapped": Mutation(
        "objectives.parts.divergences",
        "mixture_TE = log_mixture(logp_TE, logq_TE, beta)",
        "mixture_TE = log_mixture(logp_TE, logq_TE, 1.0 - beta)",
        DIVERGENCE,
    ),
    "halves of the JSD swapped": Mutation(
        "objectives.parts.divergences",
        "beta * teacher_TE + (1.0 - beta) * student_TE",
        "(1.0 - beta) * teacher_TE + beta * student_TE",
        DIVERGENCE,
    ),
    "only the student renormalised": Mutation(
        "objectives.parts.divergences",
        "return logp_TK.log_softmax(dim=1), logq_TK.log_softmax(dim=1), absent_TK",
        "return logp_TK.log_softmax(dim=1), logq_TK, absent_TK",
        DIVERGENCE,
    ),
    "absent candidates added up": Mutation(
        "objectives.parts.divergences",
        "value_TE.masked_fill(absent_TE, 0.0)",
        "value_TE.masked_fill(absent_TE, 1.0)",
        an_absent_candidate_does_not_count,
    ),
    "absent candidates in the student's mass": Mutation(
        "objectives.parts.divergences",
        "student_TK.masked_fill(absent_TK, LOGP_FLOOR)",
        "student_TK",
        an_absent_candidate_does_not_count,
    ),
    "no floor of the tail": Mutation(
        "objectives.parts.divergences",
        ".clamp_max(-torch.finfo(logp_TK.dtype).eps)",
        "",
        a_certain_student_stays_finite_in_float32,
    ),
    "mixture by the sum of probabilities": Mutation(
        "kernel.full_vocabulary",
        "torch.where(logq <= logp, below, above)",
        "(beta * logq.exp() + (1.0 - beta) * logp.exp()).log()",
        the_mixture_is_exact_where_both_agree,
    ),
    "clamp differentiated": Mutation(
        "objectives.parts.divergences",
        "(logp_TE - logq_TE).detach().clamp(",
        "(logp_TE - logq_TE).clamp(",
        the_clamped_log_ratio_has_no_gradient,
    ),
    "sampled token appended although it is inside": Mutation(
        "objectives.matching",
        "inputs.teacher_logp_T.masked_fill(inside_T, ABSENT)",
        "inputs.teacher_logp_T",
        the_sampled_token_joins_the_support_once,
    ),
    "eopd's gate turned around": Mutation(
        "objectives.matching",
        "entropy_T > entropy_threshold",
        "entropy_T < entropy_threshold",
        eopd_adds_the_forward_kl_where_the_teacher_is_uncertain,
    ),
    "unknown entropy taken for certainty": Mutation(
        "objectives.matching",
        "torch.where(entropy_T.isnan(), torch.nan, (entropy_T > entropy_threshold).to(fkl_T.dtype))",
        "(entropy_T > entropy_threshold).to(fkl_T.dtype)",
        an_unknown_entropy_is_not_taken_for_certainty,
    ),
    "aopd's gate of log-probs": Mutation(
        "objectives.trust_region",
        "inputs.teacher_logp_T.exp() - inputs.old_logp_T.exp() <= threshold",
        "inputs.teacher_logp_T - inputs.old_logp_T >= threshold",
        the_aopd_gate_is_golden_and_replaces_the_reward,
    ),
    "aopd adds instead of replacing": Mutation(
        "objectives.trust_region",
        "torch.where(closed_T, 0.0, clipped_reward(log_ratio(inputs), policy.advantage_clip))",
        "clipped_reward(log_ratio(inputs), policy.advantage_clip)",
        the_aopd_gate_is_golden_and_replaces_the_reward,
    ),
    "the mixture's part of the sampled half forgotten": Mutation(
        "objectives.matching",
        "-student_half_T - from_mixture_T",
        "-student_half_T",
        the_expected_gradient_of_the_jsd_is_exact,
    ),
    "the direct half of the JSD without its weight": Mutation(
        "objectives.matching",
        "teacher_half_T = beta * _forward_kl_to_mixture",
        "teacher_half_T = _forward_kl_to_mixture",
        the_expected_gradient_of_the_jsd_is_exact,
    ),
    "sdpo without its cap": Mutation(
        "objectives.self_distillation", ".clamp_max(ratio_cap)", "", sdpo_has_the_capped_ratio_and_its_ends
    ),
    "sdpo's ratio with a gradient": Mutation(
        "objectives.self_distillation",
        "(inputs.student_logp_T - inputs.old_logp_T).detach()",
        "(inputs.student_logp_T - inputs.old_logp_T)",
        sdpo_has_the_capped_ratio_and_its_ends,
    ),
    "sdpo's ends swapped": Mutation(
        "objectives.self_distillation", "if alpha == 0.0:", "if alpha == 1.0:", sdpo_has_the_capped_ratio_and_its_ends
    ),
    "opsd without its bound": Mutation(
        "objectives.parts.divergences",
        "clipped_TE = entry_TE.detach() > bound",
        "clipped_TE = entry_TE.detach() > 1e9",
        opsd_bounds_each_entry_and_gives_a_bounded_one_no_gradient,
    ),
    "opsd drops what it should hold": Mutation(
        "objectives.parts.divergences",
        "entry_TE.masked_fill(clipped_TE, bound)",
        "entry_TE.masked_fill(clipped_TE, 0.0)",
        opsd_bounds_each_entry_and_gives_a_bounded_one_no_gradient,
    ),
    "cross sums not moved to the global log-probs": Mutation(
        "kernel.full_vocabulary", "cross_CN + student_sum_CN * gap_CN", "cross_CN", DENSE
    ),
    "shards weighted alike": Mutation(
        "kernel.full_vocabulary",
        "weight_CN = (max_CN - max_CN.amax(dim=1, keepdim=True)).exp()",
        "weight_CN = torch.ones_like(max_CN)",
        DENSE,
        ranks=2,
    ),
    "the teacher at the student's temperature": Mutation(
        "kernel.full_vocabulary",
        "Scaling(temperature=1.0, softcap=kernel.scaling.softcap)",
        "kernel.scaling",
        DENSE,
    ),
    "the JSD of this shard only": Mutation(
        "kernel.full_vocabulary",
        "all_reduce(slots_C2N, kernel.group)",
        "pass",
        DENSE,
        ranks=2,
    ),
    "the dense gradient of the JSD without its weight": Mutation(
        "kernel.full_vocabulary", "grad_C * (1.0 - self._beta)", "grad_C", DENSE
    ),
    "the dense gradient without the expectation": Mutation("kernel.full_vocabulary", ".sub_(chunk.mean_C1)", "", DENSE),
}


def _message_of(mutation: Mutation) -> str:
    """The claim's failure. An error of another kind is not a detection and is raised."""
    modules = load(mutation.module, mutation.right, mutation.wrong)
    try:
        mutation.claim(modules)
    except AssertionError as failure:
        return str(failure)
    raise LookupError(f"{mutation.claim.__name__} did not notice: {mutation.right!r} -> {mutation.wrong!r}")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_in_a_divergence_breaks_its_claim(name: str) -> None:
    mutation = MUTATIONS[name]
    if mutation.claim is DENSE:
        assert all(run_on_ranks(_message_of, mutation.ranks, mutation))
    else:
        assert _message_of(mutation)


def _keep_every_claim(module: str, claims: list[Claim]) -> None:
    modules = load(module, UNCHANGED, UNCHANGED)
    for claim in claims:
        claim(modules)


@pytest.mark.parametrize("module", MODULES)
def test_an_unchanged_copy_of_the_divergences_keeps_every_claim(module: str) -> None:
    claims = {mutation.claim for mutation in MUTATIONS.values()}
    _keep_every_claim(module, [claim for claim in claims if claim is not DENSE])
    run_on_ranks(_keep_every_claim, 2, module, [DENSE])
