"""The claims are sharp: each fault, planted in a copy of our source, makes a claim fail.

A mutant is the package with one text of one module replaced (`tests.mutants`). A claim that the real modules keep (see
tests/golden) must raise AssertionError for the mutant.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests import claims, reward_claims
from tests.mutants import MODULES, mutant_losses, real_losses
from tests.ranks import run_on_ranks

UNCHANGED = "from __future__ import annotations"
"""A text that occurs once in every module. Replacing it by itself gives an unchanged copy."""


@dataclass(frozen=True)
class Mutation:
    module: str
    right: str
    """Text of the source, found exactly once"""
    wrong: str
    claim: claims.Claim


MUTATIONS = {
    "sign of the advantage flipped": Mutation(
        "objectives.parts.policy_gradient",
        "PolicyLoss(-advantage_T * student_logp_T",
        "PolicyLoss(advantage_T * student_logp_T",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "sign of the log-ratio flipped": Mutation(
        "objectives.inputs",
        "(inputs.teacher_logp_T - inputs.old_logp_T).detach()",
        "(inputs.old_logp_T - inputs.teacher_logp_T).detach()",
        claims.outlier_fraction_is_the_total_variation,
    ),
    "detach of the log-ratio dropped, seen by guidance": Mutation(
        "objectives.inputs",
        "(inputs.teacher_logp_T - inputs.old_logp_T).detach()",
        "(inputs.teacher_logp_T - inputs.old_logp_T)",
        claims.scalar_guidance_points_away_from_the_teacher,
    ),
    "detach of the advantage dropped": Mutation(
        "objectives.parts.policy_gradient",
        "engine_T * advantage_T.detach()",
        "engine_T * advantage_T",
        claims.fkl_scalar_has_the_golden_expected_gradient,
    ),
    "detach of the advantage dropped, seen by ExOPD": Mutation(
        "objectives.parts.policy_gradient",
        "engine_T * advantage_T.detach()",
        "engine_T * advantage_T",
        reward_claims.an_advantage_has_the_expected_gradient_of_its_closed_form,
    ),
    "detach of log p before the update dropped": Mutation(
        "objectives.parts.policy_gradient",
        "(old_logp_T if anchor_logp_T is None else anchor_logp_T).detach()",
        "(old_logp_T if anchor_logp_T is None else anchor_logp_T)",
        reward_claims.an_advantage_has_the_expected_gradient_of_its_closed_form,
    ),
    "labels shifted by one": Mutation(
        "kernel.shard",
        "local_CJ = ids_CJ - shard.start",
        "local_CJ = ids_CJ - shard.start - 1",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "padded columns forgotten": Mutation(
        "kernel.shard",
        "return max(0, min(self.stop, self.vocab_size) - self.start)",
        "return self.stop - self.start",
        claims.log_probs_entropy_and_masses_are_golden,
    ),
    "padded columns forgotten, seen by the gradient": Mutation(
        "kernel.shard",
        "return max(0, min(self.stop, self.vocab_size) - self.start)",
        "return self.stop - self.start",
        claims.a_student_equal_to_its_teacher_has_no_on_policy_gradient,
    ),
    "dense coefficient of the top-k FKL is 1 instead of the teacher mass": Mutation(
        "kernel.eager",
        "row_sum_C = row.grad_logp_CJ.sum(dim=1)",
        "row_sum_C = row.grad_logp_CJ.sum(dim=1).sign()",
        claims.topk_forward_kl_and_its_gradient_are_golden,
    ),
    "gate turned around": Mutation(
        "objectives.parts.trust",
        "trust_u_T.log() < log_ratio_T",
        "trust_u_T.log() > log_ratio_T",
        claims.outlier_fraction_is_the_total_variation,
    ),
    "support entries of other shards scattered to column 0": Mutation(
        "kernel.eager",
        "owned_CJ = row.grad_logp_CJ.masked_fill(~here_CJ, 0.0)",
        "owned_CJ = row.grad_logp_CJ",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "duplicate support entries overwrite instead of adding up": Mutation(
        "kernel.eager",
        "grad_BR.scatter_add_(1, local, owned)",
        "grad_BR.scatter_(1, local, owned)",
        claims.expected_k1_gradient_is_the_reverse_kl_gradient,
    ),
    "entropy moment not moved to the common maximum": Mutation(
        "kernel.exchange",
        "(moment_CN + shift_CN * sum_CN)",
        "moment_CN",
        claims.log_probs_entropy_and_masses_are_golden,
    ),
    "entropy gradient without the entropy": Mutation(
        "kernel.eager",
        "torch.add(grad_BR, row.entropy_C[rows, None], out=third_BR)",
        "third_BR.copy_(grad_BR)",
        claims.entropy_gradient_is_minus_p_times_log_p_plus_entropy,
    ),
    "tail bucket without its weight": Mutation(
        "objectives.parts.divergences",
        "(logq_TE.exp() * (logq_TE - logp_TE)).masked_fill(absent_TE, 0.0)",
        "(logq_TE[:, :3].exp() * (logq_TE - logp_TE)[:, :3]).masked_fill(absent_TE[:, :3], 0.0)",
        claims.topk_forward_kl_and_its_gradient_are_golden,
    ),
    "guidance pushes the teacher's token down": Mutation(
        "objectives.trust_region",
        "_Terms(beta_T, zero_T, beta_T * log_ratio_T)",
        "_Terms(-beta_T, zero_T, beta_T * log_ratio_T)",
        claims.nll_guidance_follows_the_forward_kl_gradient,
    ),
    "reward capped instead of floored": Mutation(
        "objectives.rewards",
        ".clamp_min(floor)",
        ".clamp_max(floor)",
        reward_claims.advantages_of_the_log_ratio_family_are_golden,
    ),
    "all of ExOPD's reward is scaled, not the teacher's half": Mutation(
        "objectives.rewards",
        "scale * teacher_T - student_T",
        "scale * (teacher_T - student_T)",
        reward_claims.advantages_of_the_log_ratio_family_are_golden,
    ),
    "weights of TOP-D's mixture do not add up to 1": Mutation(
        "objectives.rewards",
        "math.log1p(-mixing)",
        "math.log(mixing)",
        reward_claims.advantages_of_the_log_ratio_family_are_golden,
    ),
    "baseline of vOPD with the wrong sign": Mutation(
        "objectives.rewards",
        "clipped_reward(log_ratio_T, policy.advantage_clip) + baseline_T",
        "clipped_reward(log_ratio_T, policy.advantage_clip) - baseline_T",
        reward_claims.vopd_has_no_mean_advantage_and_the_gradient_of_the_reverse_kl,
    ),
    "K2 without its gradient": Mutation(
        "objectives.verified",
        "- inputs.student_logp_T).square() / 2.0",
        "- inputs.student_logp_T).square().detach() / 2.0",
        reward_claims.k2_has_the_gradient_of_the_reverse_kl,
    ),
    "K3 of the inverse ratio": Mutation(
        "objectives.verified",
        "k3(inputs.reference_logp_T.detach() - inputs.student_logp_T)",
        "k3(inputs.student_logp_T - inputs.reference_logp_T.detach())",
        reward_claims.k3_to_the_reference_is_golden,
    ),
    "anchor of RLAD turned around": Mutation(
        "objectives.verified",
        "old_T + (1.0 - anchor) *",
        "old_T + anchor *",
        reward_claims.rlad_clips_at_the_ratio_to_its_anchor,
    ),
    "PPO takes the better of the two surrogates": Mutation(
        "objectives.parts.policy_gradient",
        "torch.maximum(free_T, held_T)",
        "torch.minimum(free_T, held_T)",
        reward_claims.rlad_clips_at_the_ratio_to_its_anchor,
    ),
    "dual clip on the wrong sign": Mutation(
        "objectives.parts.policy_gradient",
        "(advantage_T < 0) & (loss_T.detach() > bound_T)",
        "(advantage_T > 0) & (loss_T.detach() > bound_T)",
        reward_claims.rlad_clips_at_the_ratio_to_its_anchor,
    ),
    "candidates weighted by their plain probability": Mutation(
        "objectives.candidates",
        "weight_TJ = mass_TJ / mass_TJ.sum(dim=1, keepdim=True).clamp_min(torch.finfo(mass_TJ.dtype).tiny)",
        "weight_TJ = mass_TJ",
        reward_claims.candidates_are_weighted_by_the_renormalised_student,
    ),
    "candidates of both lists counted twice": Mutation(
        "objectives.candidates",
        '"union": (own_TL, teacher_only_TK)',
        '"union": (own_TL, teacher_TK)',
        reward_claims.candidates_are_weighted_by_the_renormalised_student,
    ),
    "weight of the candidates live": Mutation(
        "objectives.candidates",
        "old_TJ=torch.cat([inputs.old_own_logp_TL, inputs.student_topk_logp_TK], dim=1).detach()",
        "old_TJ=torch.cat([inputs.old_own_logp_TL, inputs.student_topk_logp_TK], dim=1).roll(1, 1)",
        reward_claims.candidates_on_the_whole_vocabulary_have_the_reverse_kl_gradient,
    ),
    "selection forgotten": Mutation(
        "objectives.sampled",
        "on_T if terms.trained_T is None else on_T & terms.trained_T",
        "on_T",
        reward_claims.selection_counts_and_trains_the_selected_only,
    ),
    "denominator of all tokens instead of the selected": Mutation(
        "objectives.sampled",
        "counted_T = trained_T if count_trained_only else on_T | inputs.prefix_mask_T",
        "counted_T = on_T | inputs.prefix_mask_T",
        reward_claims.selection_counts_and_trains_the_selected_only,
    ),
    "the certain tokens selected": Mutation(
        "objectives.parts.batch_statistics",
        "np.argsort(-rows.student_entropy_T[on]",
        "np.argsort(rows.student_entropy_T[on]",
        reward_claims.statistics_of_a_batch_are_those_of_a_hand_count,
    ),
    "the token itself in the mean of what follows": Mutation(
        "objectives.parts.batch_statistics",
        "np.cumsum(values[::-1])[::-1] - values",
        "np.cumsum(values[::-1])[::-1]",
        reward_claims.statistics_of_a_batch_are_those_of_a_hand_count,
    ),
    "the token itself in its own history": Mutation(
        "objectives.parts.batch_statistics",
        "np.cumsum(magnitude) - magnitude",
        "np.cumsum(magnitude)",
        reward_claims.statistics_of_a_batch_are_those_of_a_hand_count,
    ),
    "returns normalised over the sample instead of the group": Mutation(
        "objectives.parts.batch_statistics",
        "_groups(on, rows.prompt_index_S[rows.sample_index_T])",
        "_groups(on, rows.sample_index_T)",
        reward_claims.statistics_of_a_batch_are_those_of_a_hand_count,
    ),
    "tokens taken in the order of the rows": Mutation(
        "objectives.parts.batch_statistics",
        "on[np.lexsort((rows.token_index_T[on], rows.sample_index_T[on]))]",
        "on",
        reward_claims.statistics_of_a_batch_are_those_of_a_hand_count,
    ),
}
SEVERAL_SHARDS_ONLY = {
    "support entries of other shards scattered to column 0",
    "entropy moment not moved to the common maximum",
}


def _check_mutant(mutation: Mutation) -> str:
    """The message of the claim's failure. An error of another kind is not a detection and is raised."""
    losses = mutant_losses(mutation.module, mutation.right, mutation.wrong)
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


def _check_unchanged_copy() -> None:
    losses = mutant_losses("objectives.parts.trust", UNCHANGED, UNCHANGED)
    assert all(losses[name] is not module for name, module in real_losses().modules.items())
    for claim in claims.CLAIMS + reward_claims.REWARD_CLAIMS:
        claim(losses)


def test_an_unchanged_copy_keeps_every_claim() -> None:
    run_on_ranks(_check_unchanged_copy, 1)


def test_a_mutant_does_not_change_the_real_modules() -> None:
    before = real_losses().modules
    mutant_losses("objectives.parts.trust", "trust_u_T.log() < log_ratio_T", "trust_u_T.log() > log_ratio_T")
    after = real_losses().modules
    assert all(after[name] is before[name] for name in MODULES)


def test_a_mutation_whose_text_is_missing_is_reported() -> None:
    with pytest.raises(AssertionError, match="has 0 times"):
        mutant_losses("objectives.parts.trust", "a text that is not in the source", "")
