"""Settings of the objectives with a divergence that would train nothing, or need what the teacher cannot give.

Not for ranges of single keys (`divergence_objectives`). Invariant: each problem is one line that names the keys to
change; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator

from tropd_mcore.config.derived import full_vocabulary, own_support_size
from tropd_mcore.config.divergence_objectives import (
    AopdObjective,
    EopdObjective,
    GkdObjective,
    LsmObjective,
    SdpoObjective,
    TropdAopdObjective,
)
from tropd_mcore.config.schema import Config, ObjectiveConfig


def divergence_problems(config: Config) -> Iterator[str]:
    """Return every problem of objectives with a divergence, and of the scores that they need."""
    objective = config.objective
    yield from divergence_objective_problems(objective)
    if config.teacher.kind != "megatron":
        yield from _needs_the_teacher_in_the_job(objective)
    if full_vocabulary(objective) and config.teacher.extra_tokens == "exclude":
        yield (
            "teacher.extra_tokens=exclude takes tokens out of the teacher's candidates, and objective.full_vocabulary "
            "has none: it compares every column; set objective.full_vocabulary=false, or choose a teacher without "
            "further tokens"
        )
    if full_vocabulary(objective) and config.loss.form != "fused":
        yield (
            f"objective.full_vocabulary is computed in the fused output layer, found loss.form={config.loss.form}; "
            "set loss.form=fused"
        )


def divergence_objective_problems(objective: ObjectiveConfig) -> Iterator[str]:
    """Return every problem of the objective's section that can be seen without the other sections."""
    if isinstance(objective, GkdObjective):
        yield from _gkd(objective)
    key = _candidates_that_are_renormalised(objective)
    if key is not None:
        yield (
            f"{key} = 1 with norm=renorm: renormalised on one token, student and teacher are equal and the divergence "
            f"is always 0; set {key} to 2 or more, or another norm"
        )
    if isinstance(objective, SdpoObjective):
        yield from _sdpo(objective)


def _gkd(objective: GkdObjective) -> Iterator[str]:
    if objective.divergence == "k1":
        yield (
            "objective.divergence=k1: the expected gradient of the one-sample estimate itself is zero, because that of "
            "log p over the student's own samples is; set objective.kind=opd, which rewards the sampled token with it"
        )
    if objective.gradient == "advantage":
        yield (
            "objective.gradient=advantage: a divergence is the same for whatever token was sampled, and the expected "
            "gradient of such an advantage is zero; set objective.gradient=direct"
        )
    if objective.divergence == "rkl" and objective.norm == "truncated" and not objective.full_vocabulary:
        yield (
            "objective.norm=truncated with objective.divergence=rkl: the sum over the top-k falls as the student "
            "leaves the top-k, so its gradient pushes probability out even where the student equals the teacher; "
            "set objective.norm=tail or renorm"
        )


def _candidates_that_are_renormalised(objective: ObjectiveConfig) -> str | None:
    """The key of a number of candidates that is 1, where the divergence is renormalised on that one."""
    if isinstance(objective, LsmObjective):
        return "objective.topk" if objective.topk == 1 and not objective.sampled_tail else None
    if isinstance(objective, SdpoObjective):
        return "objective.own_topk" if objective.own_topk == 1 and objective.norm == "renorm" else None
    if isinstance(objective, TropdAopdObjective):
        outlier = objective.outlier
        return "objective.outlier.topk" if outlier.topk == 1 and outlier.norm == "renorm" else None
    if isinstance(objective, GkdObjective) and objective.full_vocabulary:
        return None
    if isinstance(objective, EopdObjective | AopdObjective | GkdObjective):
        return "objective.topk" if objective.topk == 1 and objective.norm == "renorm" else None
    return None


def _sdpo(objective: SdpoObjective) -> Iterator[str]:
    """Its divergence has no advantage, and a ratio of its own."""
    policy = objective.policy_gradient
    if policy.ratio != "none":
        yield (
            f"objective.policy_gradient.ratio={policy.ratio}: objective.kind=sdpo has no policy gradient, "
            "its divergence has the factor p / p_old, at most objective.ratio_cap; set ratio=none"
        )
    if policy.advantage_clip is not None:
        yield "objective.policy_gradient.advantage_clip: objective.kind=sdpo has no advantage; remove it"
    if "{solution}" not in objective.template:
        yield (
            "objective.template: expected {solution}, where the teacher reads the correct solution, found "
            f"{objective.template[:60]!r}; add it, and {{prompt}} for the question"
        )


def _needs_the_teacher_in_the_job(objective: ObjectiveConfig) -> Iterator[str]:
    remedy = "set teacher.kind=megatron"
    if isinstance(objective, EopdObjective):
        yield (
            "objective.kind=eopd needs the teacher's entropy over the whole vocabulary, which a server does not give "
            f"(that of its top-k is too low); {remedy}"
        )
    if own_support_size(objective) > 0:
        yield (
            f"objective.kind={objective.kind} needs the teacher's log-probs of the student's own candidates, which a "
            "server gives only for a list of ids that is the same for all positions, so that its work grows with the "
            f"square of the length; {remedy}"
        )
    if full_vocabulary(objective):
        yield f"objective.full_vocabulary needs the teacher's logits, which a server does not give; {remedy}"
