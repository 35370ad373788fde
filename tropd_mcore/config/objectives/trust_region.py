"""The keys of TrOPD, of plain on-policy distillation (which trusts every token) and of AOPD's gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from tropd_mcore.config.fields import PositiveInt, Section
from tropd_mcore.config.objectives.base import (
    Norm,
    PolicyGradientConfig,
    PolicyGradientObjective,
    Unused,
    renormalised_on_one,
)
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default


class TrustConfig(Section):
    """Which sampled tokens learn from the log-ratio."""

    mode: Literal["bernoulli", "soft", "threshold", "none"] = default(catalogue.tropd, "trust_mode")
    """How a student token is trusted, by rho = min(teacher's / student's probability, 1): `bernoulli` u < rho with a
    stored uniform u (TrOPD eq. of P_trust), `soft` with weight rho, `threshold` log-ratio above `threshold`,
    `none` always."""
    threshold: float = default(catalogue.tropd, "trust_threshold")
    """Log-ratio, in nats, above which a token is trusted, `threshold` mode only. Source: REOPOLD, lambda = 0.3."""


class OutlierConfig(Section):
    """What distrusted tokens (outliers) learn from."""

    mode: Literal["fkl_direct", "fkl_scalar", "mask", "clip"] = default(catalogue.tropd, "outlier_mode")
    """Loss of a distrusted token. `fkl_direct`: the differentiable forward KL on the teacher's top-k (the paper).
    `fkl_scalar`: minus that forward KL as a scalar advantage. `mask`: none. `clip`: the reward with the floor clip_tau.
    `mask` and `clip` trust tokens with a log-ratio above clip_tau, whatever trust.mode is (TrOPD table 1)."""
    weight: float = Field(default=default(catalogue.tropd, "outlier_weight"), ge=0)
    """Factor of the outlier term. Source: TrOPD eq. of J_on (1:1)."""
    topk: PositiveInt = 64
    """Number k of teacher candidates (top-k) per token. Source: TrOPD section 4."""
    norm: Norm = default(catalogue.tropd, "outlier_norm")
    """How the forward KL treats the vocabulary outside the top-k (docs/method.md, 4)."""
    clip_tau: float = default(catalogue.tropd, "clip_tau")
    """`mask` and `clip` only. Log-ratio, in nats, above which a token is trusted; with `clip` also the floor of the
    reward. Source: REOPOLD, lambda = 0.3."""


class GuidanceConfig(Section):
    """Guidance: the student continues prefixes of teacher responses."""

    enabled: bool = True
    """Let the student continue prefixes of teacher responses. Needs data.teacher_responses."""
    beta: float = Field(default=default(catalogue.tropd, "beta"), ge=0)
    """Weight of the loss on prefix tokens. Source: TrOPD section 3.3."""
    loss: Literal["nll", "none", "topk_fkl", "scalar_adv"] = default(catalogue.tropd, "prefix_loss")
    """Loss of a prefix token. `nll`: negative log-likelihood, the gradient of the K1 estimate of the forward KL.
    `none`: no loss. `topk_fkl`: forward KL on the teacher's top-k. `scalar_adv`: the authors' detached advantage."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Fraction alpha of the teacher response that is used as prefix at step t. `cosine`: (1 + cos(pi t / T)) / 2.
    `linear`: 1 - t / T. Both are 0 after T = total_steps. `constant`: always 1."""
    total_steps: PositiveInt | None = None
    """Number of steps T of the schedule. null = run.steps."""
    length_mode: Literal["proportional", "cap"] = "proportional"
    """Length of the prefix in tokens. `proportional`: floor(alpha * len(response)). `cap`:
    min(floor(alpha * longest response), len(response))."""
    min_continuation: PositiveInt = 64
    """Smallest number of tokens of the teacher response that are left to the student."""
    continuation_budget: Literal["full", "shared"] = "full"
    """Limit on new tokens after the prefix. `full`: rollout.max_new_tokens. `shared`: rollout.max_new_tokens minus the
    prefix length."""


class TropdSections(PolicyGradientObjective):
    """The sections of TrOPD, shared by TrOPD and the objectives that extend it."""

    trust: TrustConfig = TrustConfig()
    outlier: OutlierConfig = OutlierConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.tropd)
    teacher_topk_key: ClassVar[str] = "outlier.topk"

    @property
    def teacher_topk(self) -> int:
        return self.outlier.topk

    @property
    def active_guidance(self) -> GuidanceConfig | None:
        return self.guidance if self.guidance.enabled else None

    @property
    def has_prefix_loss(self) -> bool:
        """True if guidance.loss is not `none`. With beta = 0 the term has weight 0 and its rows still count."""
        return self.guidance.enabled and self.guidance.loss != "none"

    @property
    def leaves_confident_mistakes(self) -> bool:
        return self.outlier.mode == "fkl_direct" and self.trust.mode != "none" and self.outlier.weight > 0

    @property
    def keeps_rare_mistakes(self) -> bool:
        return self.outlier.mode != "clip" and self.trust.mode != "none"

    def constants(self, progress: float) -> dict[str, Any]:
        return {
            "trust_mode": self.trust.mode,
            "trust_threshold": self.trust.threshold,
            "outlier_mode": self.outlier.mode,
            "outlier_weight": self.outlier.weight,
            "outlier_norm": self.outlier.norm,
            "clip_tau": self.outlier.clip_tau,
            "beta": self.guidance.beta,
            "prefix_loss": self.guidance.loss if self.guidance.enabled else "none",
            "policy": self.policy_gradient.constants,
        }

    def description(self) -> str:
        outlier = self.outlier
        support = f"{outlier.norm} top-{outlier.topk}"
        return f"trust {self.trust.mode}, outliers {outlier.mode} x {outlier.weight:g} ({support})"

    def unused(self) -> Iterator[Unused]:
        yield from super().unused()
        trust, outlier, guidance = self.trust, self.outlier, self.guidance
        mode = f"objective.outlier.mode={outlier.mode}"
        if outlier.mode in ("mask", "clip"):  # they trust where the log-ratio is above outlier.clip_tau
            yield Unused(trust, "objective.trust", ("mode", "threshold"), mode)
        else:
            yield Unused(outlier, "objective.outlier", ("clip_tau",), mode)
            if trust.mode != "threshold":
                yield Unused(trust, "objective.trust", ("threshold",), f"objective.trust.mode={trust.mode}")
        if outlier.mode == "mask":
            yield Unused(outlier, "objective.outlier", ("weight",), mode)
        if guidance.loss == "none":
            yield Unused(guidance, "objective.guidance", ("beta",), "objective.guidance.loss=none")
        if guidance.schedule == "constant":
            because = "objective.guidance.schedule=constant"
            yield Unused(guidance, "objective.guidance", ("total_steps",), because)


class TropdObjective(TropdSections):
    """TrOPD (docs/method.md)."""

    kind: Literal["tropd"] = "tropd"

    def problems(self) -> Iterator[str]:
        outlier, guidance = self.outlier, self.guidance
        trusts_all = self.trust.mode == "none"
        as_outlier = outlier.mode in ("fkl_direct", "fkl_scalar") and outlier.weight > 0 and not trusts_all
        as_prefix = guidance.enabled and guidance.loss == "topk_fkl"
        if outlier.topk == 1 and outlier.norm == "renorm" and (as_outlier or as_prefix):
            yield (
                "objective.outlier.topk = 1 with norm=renorm: renormalised on one token, student and teacher are equal "
                "and the forward KL is always 0; set topk to 2 or more, or another norm"
            )


class OpdObjective(PolicyGradientObjective):
    """Plain on-policy distillation: the code of TrOPD with every token trusted and no guidance."""

    kind: Literal["opd"] = "opd"
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.opd)
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token, used for metrics only."""

    def description(self) -> str:
        return f"every token trusted, top-{self.topk} of the teacher for the metrics"

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class AopdObjective(PolicyGradientObjective):
    """Asymmetric OPD: a forward KL if the teacher's probability of the token does not exceed the student's, else the
    reward."""

    kind: Literal["aopd"] = "aopd"
    threshold: float = Field(default=default(catalogue.aopd, "threshold"), ge=-1, le=1)
    """A token x learns from the forward KL if q(x) - p(x) <= threshold. -1 = OPD, 1 = the forward KL on every token.
    Source: AOPD (0)."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token."""
    norm: Norm = default(catalogue.aopd, "norm")
    """How the forward KL treats the vocabulary outside the top-k (docs/method.md, 4)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.aopd)

    def problems(self) -> Iterator[str]:
        if self.topk == 1 and self.norm == "renorm":
            yield renormalised_on_one("objective.topk")

    @property
    def leaves_confident_mistakes(self) -> bool:
        return True

    @property
    def keeps_rare_mistakes(self) -> bool:
        return True


class TropdAopdObjective(TropdSections):
    """TrOPD plus AOPD's forward KL on tokens whose teacher probability does not exceed the student's."""

    kind: Literal["tropd_aopd"] = "tropd_aopd"
    aopd_threshold: float = Field(default=default(catalogue.tropd_aopd, "aopd_threshold"), ge=-1, le=1)
    """A token x also learns from AOPD's forward KL if q(x) - p(x) <= aopd_threshold."""
    aopd_weight: float = Field(default=default(catalogue.tropd_aopd, "aopd_weight"), ge=0)
    """Weight of AOPD's forward KL."""

    def constants(self, progress: float) -> dict[str, Any]:
        return super().constants(progress) | {"aopd_threshold": self.aopd_threshold, "aopd_weight": self.aopd_weight}

    def problems(self) -> Iterator[str]:
        if self.outlier.topk == 1 and self.outlier.norm == "renorm":
            yield renormalised_on_one("objective.outlier.topk")

    def description(self) -> str:
        added = f"forward KL x {self.aopd_weight:g} where q - p <= {self.aopd_threshold:g}"
        return f"{super().description()}, plus {added}"
