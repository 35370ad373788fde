"""The keys of objectives whose teacher is the student itself (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from tropd_mcore.config.fields import Fraction, PositiveFloat, PositiveInt
from tropd_mcore.config.objectives.base import (
    Objective,
    PolicyGradientConfig,
    PolicyGradientObjective,
    SelfTeaching,
    renormalised_on_one,
)
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default

_TEMPLATE = "{prompt}\n\nA correct solution:\n\n{solution}\n\nNow solve the original problem yourself."


class SdpoObjective(PolicyGradientObjective):
    """Self-distillation: the teacher is the student, with an average of its weights, that has seen a solution."""

    kind: Literal["sdpo"] = "sdpo"
    alpha: Fraction = default(catalogue.sdpo, "alpha")
    """Weight of the teacher in the divergence (1 - alpha) KL(p || m) + alpha KL(q || m), with m = (1 - alpha) p + alpha
    q. 0 = KL(q || p), 1 = KL(p || q)."""
    student_topk: PositiveInt = 100
    """Number of student candidates per token, on which the divergence is computed. Source: SDPO (100)."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token, used for metrics only."""
    norm: Literal["tail", "renorm"] = default(catalogue.sdpo, "norm")
    """How the divergence treats the vocabulary outside the candidates. `tail`: as one bucket. `renorm`: student and
    teacher are renormalised on the candidates."""
    ratio_cap: PositiveFloat = default(catalogue.sdpo, "ratio_cap")
    """Upper bound of the ratio p / p_old, a constant that multiplies the divergence."""
    average_rate: float = Field(default=0.05, ge=0, le=1)
    """After each optimizer step, the teacher's weights move towards the student's by this fraction of the difference.
    0 = the teacher stays the initial student, 1 = it is always the latest student. Source: SDPO (0.05)."""
    template: str = _TEMPLATE
    """Text that the teacher reads instead of the prompt's last user message, or instead of a text prompt. {prompt} and
    {solution} are filled in. {solution} is required."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.sdpo)
    """Only `mini_batches`, `epochs` and `mismatch` apply, because there is no advantage. The mismatch weight multiplies
    the divergence too. Source of the weight: SDPO's code, token level, at most 2.0."""
    learns_from_verifier: ClassVar[bool] = True
    has_own_ratio: ClassVar[bool] = True

    @property
    def self_teaching(self) -> SelfTeaching | None:
        return SelfTeaching(self.average_rate, self.template)

    def problems(self) -> Iterator[str]:
        """The divergence has no advantage, and it has its own ratio."""
        policy = self.policy_gradient
        if self.student_topk == 1 and self.norm == "renorm":
            yield renormalised_on_one("objective.student_topk")
        if policy.ratio != "none":
            yield (
                f"objective.policy_gradient.ratio={policy.ratio}: objective.kind=sdpo has no policy gradient, "
                "its divergence has the factor p / p_old, at most objective.ratio_cap; set ratio=none"
            )
        if policy.advantage_clip is not None:
            yield "objective.policy_gradient.advantage_clip: objective.kind=sdpo has no advantage; remove it"
        yield from _template_problems(self.template)

    @property
    def leaves_confident_mistakes(self) -> None:
        """Not known: its teacher changes."""
        return None


class OpsdObjective(Objective):
    """On-policy self-distillation: forward KL from the student that has seen a solution, with each entry bounded."""

    kind: Literal["opsd"] = "opsd"
    entry_clip: PositiveFloat = default(catalogue.opsd, "entry_clip")
    """Upper bound of the contribution q log(q / p) of one entry to the divergence, in nats. An entry above it has no
    gradient. Source: OPSD for the bound. The value is chosen here, because the authors' code at 590ec26 has none."""
    student_topk: PositiveInt = 100
    """Number of student candidates per token, on which the divergence is computed. Source: as `sdpo`; OPSD uses the
    whole vocabulary."""
    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token, used for metrics only."""
    norm: Literal["truncated", "tail"] = default(catalogue.opsd, "norm")
    """How the divergence treats the vocabulary outside the candidates. `truncated`: left out. `tail`: as one more
    entry, which is bounded too."""
    average_rate: float = Field(default=0.0, ge=0, le=1)
    """After each optimizer step, the teacher's weights move towards the student's by this fraction of the difference.
    0 = the teacher stays the initial student, 1 = it is always the latest student. Source: OPSD's scripts (a fixed
    teacher)."""
    template: str = _TEMPLATE
    """Text that the teacher reads instead of the prompt's last user message, or instead of a text prompt. {prompt} and
    {solution} are filled in. {solution} is required."""
    learns_from_verifier: ClassVar[bool] = True

    @property
    def self_teaching(self) -> SelfTeaching | None:
        return SelfTeaching(self.average_rate, self.template)

    def problems(self) -> Iterator[str]:
        yield from _template_problems(self.template)


def _template_problems(template: str) -> Iterator[str]:
    """Yield a line if the teacher would not read the solution."""
    if "{solution}" not in template:
        yield (
            "objective.template: expected {solution}, where the teacher reads the correct solution, found "
            f"{template[:60]!r}; add it, and {{prompt}} for the question"
        )
