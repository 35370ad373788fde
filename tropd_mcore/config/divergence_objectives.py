"""The keys of the objectives that have a differentiable divergence from the teacher (docs/objectives.md)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tropd_mcore.config.fields import Fraction, PositiveFloat, PositiveInt, Section
from tropd_mcore.config.tropd_objectives import PolicyGradientConfig, PolicyGradientObjective, TropdObjective

Norm = Literal["truncated", "tail", "renorm", "teacher_renorm"]


class EopdObjective(PolicyGradientObjective):
    """Entropy-aware OPD: the log-ratio reward on every token plus a forward KL where the teacher is uncertain."""

    kind: Literal["eopd"] = "eopd"
    entropy_threshold: float = Field(default=0.8, ge=0)
    """Teacher entropy over the full vocabulary, nats, above which the forward KL is added. Source: EOPD (0.8)."""
    topk: PositiveInt = 16
    """Teacher support size. Source: EOPD (16); TrOPD's tables use 64."""
    norm: Norm = "truncated"
    """Support normalisation of the forward KL."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class AopdObjective(PolicyGradientObjective):
    """Asymmetric OPD: forward KL where the teacher gives the token no more than the student, else the reward."""

    kind: Literal["aopd"] = "aopd"
    threshold: float = Field(default=0.0, ge=-1, le=1)
    """Gate q(x) - p(x) <= threshold; -1 is OPD, 1 is a forward KL everywhere. Source: AOPD (0)."""
    topk: PositiveInt = 64
    """Teacher support size."""
    norm: Norm = "truncated"
    """Support normalisation of the forward KL."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class TropdAopdObjective(TropdObjective):
    """TrOPD plus AOPD's forward KL on the tokens that the teacher gives no more than the student."""

    kind: Literal["tropd_aopd"] = "tropd_aopd"  # type: ignore[assignment]
    aopd_threshold: float = Field(default=0.0, ge=-1, le=1)
    """Gate q(x) - p(x) <= aopd_threshold of the added forward KL."""
    aopd_weight: float = Field(default=1.0, ge=0)
    """Weight of the added forward KL."""


class JsdObjective(PolicyGradientObjective):
    """TrOPD's JSD baseline: a top-k half from the teacher's side, a one-sample half from the student's."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture. Source: TrOPD section 4 (0.5)."""
    topk: PositiveInt = 64
    """Teacher support size."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()


class GkdObjective(Section):
    """Generalised knowledge distillation on the student's rollouts."""

    kind: Literal["gkd"] = "gkd"
    divergence: Literal["fkl", "rkl", "jsd", "k1"] = "fkl"
    """KL(q || p), KL(p || q), the JSD of `beta`; `k1` (the one-sample estimate itself) is refused."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; `jsd` only."""
    full_vocabulary: bool = False
    """Over the whole vocabulary instead of the teacher's top-k; needs teacher.kind=megatron."""
    topk: PositiveInt = 64
    """Teacher support size."""
    norm: Literal["truncated", "tail", "renorm"] = "tail"
    """Support normalisation on the top-k; a truncated reverse KL is refused."""
    gradient: Literal["direct", "advantage"] = "direct"
    """`advantage` (minus the divergence as reward of the sampled token) is refused: it depends on the state only."""


class LsmObjective(Section):
    """Local support matching: reverse KL renormalised on the teacher's top-k."""

    kind: Literal["lsm"] = "lsm"
    topk: PositiveInt = 32
    """Teacher support size. Source: Revisiting OPD (32)."""
    sampled_tail: bool = False
    """Append the sampled token to the support where it is outside."""
    clip_log_ratio: PositiveFloat | None = None
    """Bound of |log p~ - log q~|, nats, as a constant factor of the gradient; None = off, the authors' default."""


class SdpoObjective(PolicyGradientObjective):
    """Self-distillation: the teacher is the student (an average of its weights) that has seen a solution."""

    kind: Literal["sdpo"] = "sdpo"
    alpha: Fraction = 0.5
    """(1 - alpha) KL(p || m) + alpha KL(q || m), m = (1 - alpha) p + alpha q; 0 is KL(q || p), 1 is KL(p || q)."""
    own_topk: PositiveInt = 100
    """Student candidates. Source: SDPO (100)."""
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""
    norm: Literal["tail", "renorm"] = "tail"
    """The rest of the vocabulary as one bucket, or both sides renormalised on the candidates."""
    ratio_cap: PositiveFloat = 2.0
    """Upper bound of the detached ratio p / p_old that multiplies the divergence."""
    average_rate: float = Field(default=0.05, ge=0, le=1)
    """Weights of the teacher move by this fraction of the difference after each optimizer step; 0 keeps the first
    student, 1 is the last one. Source: SDPO (0.05)."""
    template: str = "{prompt}\n\nA correct solution:\n\n{solution}\n\nNow solve the original problem yourself."
    """What the teacher reads instead of the prompt's last user message, or of a text prompt; {prompt} and {solution},
    which has to be there, are filled in."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None, mismatch="tis", tis_cap=2.0)
    """`mini_batches`, `epochs` and `mismatch`, whose weight also multiplies the divergence; there is no advantage.
    Source of the weight: SDPO's code, token level, at most 2.0."""


class CustomObjective(PolicyGradientObjective):
    """An objective of one's own: a function like those in `losses.objectives`."""

    kind: Literal["custom"] = "custom"
    function: str
    """Import path `package.module:function` of a function (TokenInputs, *, ...) -> ObjectiveOutput."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function; `policy` is policy_gradient, for a function that has such a keyword."""
    topk: PositiveInt = 64
    """Teacher support size."""
    own_topk: int = Field(default=0, ge=0)
    """Student candidates; 0 = none."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()


DivergenceObjective = (
    EopdObjective
    | AopdObjective
    | TropdAopdObjective
    | JsdObjective
    | GkdObjective
    | LsmObjective
    | SdpoObjective
    | CustomObjective
)
