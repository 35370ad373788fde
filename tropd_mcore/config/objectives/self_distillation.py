"""The keys of the objectives whose teacher is the student itself (docs/objectives.md)."""

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
    """Self-distillation: the teacher is the student (an average of its weights) that has seen a solution."""

    kind: Literal["sdpo"] = "sdpo"
    alpha: Fraction = default(catalogue.sdpo, "alpha")
    """(1 - alpha) KL(p || m) + alpha KL(q || m), m = (1 - alpha) p + alpha q; 0 is KL(q || p), 1 is KL(p || q)."""
    student_topk: PositiveInt = 100
    """Student candidates. Source: SDPO (100)."""
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""
    norm: Literal["tail", "renorm"] = default(catalogue.sdpo, "norm")
    """The rest of the vocabulary as one bucket, or both sides renormalised on the candidates."""
    ratio_cap: PositiveFloat = default(catalogue.sdpo, "ratio_cap")
    """Upper bound of the detached ratio p / p_old that multiplies the divergence."""
    average_rate: float = Field(default=0.05, ge=0, le=1)
    """Weights of the teacher move by this fraction of the difference after each optimizer step; 0 keeps the first
    student, 1 is the last one. Source: SDPO (0.05)."""
    template: str = _TEMPLATE
    """What the teacher reads instead of the prompt's last user message, or of a text prompt; {prompt} and {solution},
    which has to be there, are filled in."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.sdpo)
    """`mini_batches`, `epochs` and `mismatch`, whose weight also multiplies the divergence; there is no advantage.
    Source of the weight: SDPO's code, token level, at most 2.0."""
    learns_from_verifier: ClassVar[bool] = True
    has_own_ratio: ClassVar[bool] = True

    @property
    def self_teaching(self) -> SelfTeaching | None:
        return SelfTeaching(self.average_rate, self.template)

    def problems(self) -> Iterator[str]:
        """The divergence has no advantage, and a ratio of its own."""
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


class OpsdObjective(Objective):
    """On-policy self-distillation: forward KL to the student that has seen a solution, each entry bounded."""

    kind: Literal["opsd"] = "opsd"
    entry_clip: PositiveFloat = default(catalogue.opsd, "entry_clip")
    """Upper bound of what one entry adds to the divergence, q log(q / p), nats; an entry above it has no gradient.
    Source: OPSD for the bound; the value is ours, because the authors' code at 590ec26 has none."""
    student_topk: PositiveInt = 100
    """Student candidates, on which the divergence is taken. Source: as `sdpo`; OPSD has the whole vocabulary."""
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""
    norm: Literal["truncated", "tail"] = default(catalogue.opsd, "norm")
    """The rest of the vocabulary left out, or as one more entry, which is bounded too."""
    average_rate: float = Field(default=0.0, ge=0, le=1)
    """Weights of the teacher move by this fraction of the difference after each optimizer step; 0 keeps the first
    student, 1 is the last one. Source: OPSD's scripts (a fixed teacher)."""
    template: str = _TEMPLATE
    """What the teacher reads instead of the prompt's last user message, or of a text prompt; {prompt} and {solution},
    which has to be there, are filled in."""
    learns_from_verifier: ClassVar[bool] = True

    @property
    def self_teaching(self) -> SelfTeaching | None:
        return SelfTeaching(self.average_rate, self.template)

    def problems(self) -> Iterator[str]:
        yield from _template_problems(self.template)


def _template_problems(template: str) -> Iterator[str]:
    """Yield a line where the teacher would not read the solution."""
    if "{solution}" not in template:
        yield (
            "objective.template: expected {solution}, where the teacher reads the correct solution, found "
            f"{template[:60]!r}; add it, and {{prompt}} for the question"
        )
