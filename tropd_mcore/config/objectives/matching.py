"""The keys of objectives with a differentiable divergence from the teacher (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from tropd_mcore.config.fields import PositiveFloat, PositiveInt
from tropd_mcore.config.objectives.base import (
    FullVocabularyDivergence,
    Norm,
    Objective,
    PolicyGradientConfig,
    PolicyGradientObjective,
    Unused,
    renormalised_on_one,
)
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default


class EopdObjective(PolicyGradientObjective):
    """Entropy-aware OPD: the log-ratio reward on every token, plus a forward KL on tokens with an uncertain teacher."""

    kind: Literal["eopd"] = "eopd"
    entropy_threshold: float = Field(default=default(catalogue.eopd, "entropy_threshold"), ge=0)
    """Teacher entropy over the full vocabulary, in nats, above which the forward KL is added. Source: EOPD (0.8)."""
    topk: PositiveInt = 16
    """Number of teacher candidates (top-k) per token. Source: EOPD (16); TrOPD's tables use 64."""
    norm: Norm = default(catalogue.eopd, "norm")
    """How the forward KL treats the vocabulary outside the top-k (docs/method.md, 4)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.eopd)
    needs_teacher_entropy: ClassVar[bool] = True

    def problems(self) -> Iterator[str]:
        if self.topk == 1 and self.norm == "renorm":
            yield renormalised_on_one("objective.topk")

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class JsdObjective(PolicyGradientObjective):
    """TrOPD's JSD baseline: the teacher's half on its top-k, the student's half estimated from the sampled token."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=default(catalogue.jsd, "beta"), gt=0, lt=1)
    """Weight of the teacher in the mixture. Source: TrOPD section 4 (0.5)."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.jsd)

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class GkdObjective(Objective):
    """Generalised knowledge distillation on the student's rollouts."""

    kind: Literal["gkd"] = "gkd"
    divergence: Literal["fkl", "rkl", "jsd", "k1"] = default(catalogue.gkd, "divergence")
    """Divergence of student p and teacher q. `fkl`: KL(q || p). `rkl`: KL(p || q). `jsd`: the Jensen-Shannon divergence
    with `beta`. `k1`, the one-sample estimate, is an error."""
    beta: float = Field(default=default(catalogue.gkd, "beta"), gt=0, lt=1)
    """`jsd` only. Weight of the teacher: beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p."""
    full_vocabulary: bool = default(catalogue.gkd, "full_vocabulary")
    """Compute the divergence over the whole vocabulary instead of the teacher's top-k. Needs teacher.kind=megatron."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token."""
    norm: Literal["truncated", "tail", "renorm"] = default(catalogue.gkd, "norm")
    """How the divergence treats the vocabulary outside the top-k (docs/method.md, 4). A `truncated` reverse KL is an
    error."""
    gradient: Literal["direct", "advantage"] = "direct"
    """`direct`: differentiate the divergence. `advantage`, minus the divergence as reward of the sampled token, is an
    error, because it does not depend on that token."""

    @property
    def label(self) -> str:
        return f"{self.kind} {self.divergence}"

    @property
    def full_vocabulary_divergence(self) -> FullVocabularyDivergence | None:
        return FullVocabularyDivergence(self.divergence, self.beta) if self.full_vocabulary else None

    def problems(self) -> Iterator[str]:
        if self.divergence == "k1":
            yield (
                "objective.divergence=k1: the expected gradient of the one-sample estimate itself is zero, because "
                "the expected gradient of log p over the student's own samples is zero; set objective.kind=opd, which "
                "uses the estimate as reward of the sampled token"
            )
        if self.gradient == "advantage":
            yield (
                "objective.gradient=advantage: a divergence does not depend on the sampled token, so the expected "
                "gradient of such an advantage is zero; set objective.gradient=direct"
            )
        if self.divergence == "rkl" and self.norm == "truncated" and not self.full_vocabulary:
            yield (
                "objective.norm=truncated with objective.divergence=rkl: the sum over the top-k falls as the student "
                "leaves the top-k, so its gradient pushes probability out even if the student equals the teacher; "
                "set objective.norm=tail or renorm"
            )
        if self.topk == 1 and self.norm == "renorm" and not self.full_vocabulary:
            yield renormalised_on_one("objective.topk")

    def unused(self) -> Iterator[Unused]:
        if self.divergence != "jsd":
            yield Unused(self, "objective", ("beta",), f"objective.divergence={self.divergence}")
        if self.full_vocabulary:
            yield Unused(self, "objective", ("norm",), "objective.full_vocabulary=true")

    @property
    def leaves_confident_mistakes(self) -> bool:
        return self.divergence == "fkl"

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class LsmObjective(Objective):
    """Local support matching: reverse KL renormalised on the teacher's top-k."""

    kind: Literal["lsm"] = "lsm"
    topk: PositiveInt = 32
    """Number of teacher candidates (top-k) per token. Source: Revisiting OPD (32)."""
    sampled_tail: bool = default(catalogue.lsm, "sampled_tail")
    """Add the sampled token to the candidates if it is not one of them."""
    clip_log_ratio: PositiveFloat | None = default(catalogue.lsm, "clip_log_ratio")
    """Bound c in nats. The log-ratio log(p~ / q~), which is a constant factor of the gradient, is clamped to [-c, c].
    p~ and q~ are p and q renormalised on the candidates. null = off, the authors' default."""

    def problems(self) -> Iterator[str]:
        if self.topk == 1 and not self.sampled_tail:
            yield renormalised_on_one("objective.topk")

    @property
    def leaves_confident_mistakes(self) -> bool:
        return False

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False
