"""Errors about settings of an objective that would train nothing, the wrong thing, or not what the keys say.

Elsewhere: ranges of single keys (`schema`), conflicts between the keys of one kind (`Objective.problems` in
`config.objectives`), other sections (`checks`). Invariants: no kind is named here; only traits are read. Each problem
is one line that names the keys to change. Nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.effect_checks import keys_without_effect
from tropd_mcore.config.objectives.base import Objective
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import teachers_of


def objective_problems(config: Config) -> Iterator[str]:
    """Yield every problem of the objective's own settings and of its needs from other sections."""
    objective = config.objective
    yield from section_problems(objective)
    yield from _needs_other_sections(config)
    served = [f"{teacher.key}.kind" for teacher in teachers_of(config) if teacher.served]
    if served:
        yield from _needs_the_teacher_in_the_job(objective, f"set {' and '.join(served)}=megatron")
    yield from _full_vocabulary(config)
    yield from keys_without_effect(objective)


def section_problems(objective: Objective) -> Iterator[str]:
    """Yield every problem of the objective's section that is visible without the other sections."""
    policy, updates, key = objective.policy, objective.updates_per_step, "objective.policy_gradient"
    if updates > 1 and policy.ratio == "none" and not objective.has_own_ratio:
        yield (
            f"{key}: mini_batches * epochs = {policy.mini_batches} * {policy.epochs} = {updates} updates per rollout "
            "batch with ratio=none, which ignores that the policy has changed since the rollout; "
            "set ratio=ppo_clip or importance, or make one update"
        )
    if not objective.clips_log_ratio and policy.advantage_clip is not None:
        yield (
            f"{key}.advantage_clip clamps a log-ratio, but the advantage of objective.kind={objective.kind} is not a "
            "log-ratio; remove it"
        )
    yield from objective.problems()


def _needs_other_sections(config: Config) -> Iterator[str]:
    objective = config.objective
    if objective.learns_from_verifier and config.verifier.kind == "none":
        yield (
            f"objective.kind={objective.kind} learns from a verifier, but verifier.kind=none; "
            "set verifier.kind=exact_match or math_verify, and give the prompts an `answer`"
        )
    if objective.compares_samples and config.rollout.samples_per_prompt < 2:
        yield (
            f"objective.kind={objective.kind} compares the samples of a prompt, but rollout.samples_per_prompt = "
            f"{config.rollout.samples_per_prompt}; set it to 2 or more"
        )
    if objective.self_teaching is not None:
        yield from _self_teacher(config)
    if objective.counts_trained_only and config.loss.aggregation == "sequence_mean":
        yield (
            "loss.aggregation=sequence_mean divides by the number of all tokens of a sample, but objective.kind="
            f"{objective.kind} by the number of tokens that it trains; set loss.aggregation=token_mean"
        )


def _self_teacher(config: Config) -> Iterator[str]:
    kind = config.objective.kind
    if config.teacher.path != config.student.path:
        yield (
            f"objective.kind={kind} uses the student as its own teacher, but teacher.path={config.teacher.path} is not "
            f"student.path={config.student.path}; set teacher.path={config.student.path}"
        )
    if config.rollout.samples_per_prompt < 2:
        yield (
            f"objective.kind={kind} shows the teacher the solution of another sample of the prompt, but "
            f"rollout.samples_per_prompt = {config.rollout.samples_per_prompt}; set it to 2 or more"
        )


def _needs_the_teacher_in_the_job(objective: Objective, remedy: str) -> Iterator[str]:
    if objective.needs_teacher_entropy:
        yield (
            f"objective.kind={objective.kind} needs the teacher's entropy over the whole vocabulary, which a server "
            f"does not give (that of its top-k is too low); {remedy}"
        )
    if objective.student_candidates > 0:
        yield (
            f"objective.kind={objective.kind} needs the teacher's log-probs of the student's own candidates, which a "
            "server gives only for a list of ids that is the same for all positions, so that its work grows with the "
            f"square of the length; {remedy}"
        )
    if objective.full_vocabulary_divergence is not None:
        yield f"objective.full_vocabulary needs the teacher's logits, which a server does not give; {remedy}"


def _full_vocabulary(config: Config) -> Iterator[str]:
    if config.objective.full_vocabulary_divergence is None:
        return
    if config.teacher.extra_tokens == "exclude":
        yield (
            "teacher.extra_tokens=exclude takes tokens out of the teacher's candidates, and objective.full_vocabulary "
            "has none: it compares every column; set objective.full_vocabulary=false, or choose a teacher without "
            "further tokens"
        )
    if config.loss.form != "fused":
        yield (
            f"objective.full_vocabulary is computed in the fused output layer, found loss.form={config.loss.form}; "
            "set loss.form=fused"
        )
