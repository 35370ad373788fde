"""The keys of objectives with a policy gradient on several candidates per position (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tropd_mcore.config.fields import PositiveInt
from tropd_mcore.config.objectives.base import PolicyGradientConfig, PolicyGradientObjective
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default


class RethinkingObjective(PolicyGradientObjective):
    """Rethinking OPD: a policy gradient on several candidates per position instead of the sampled token alone."""

    kind: Literal["rethinking"] = "rethinking"
    support: Literal["student", "teacher", "intersection", "union", "xor"] = default(catalogue.rethinking, "support")
    """Which top-k tokens are the candidates: the student's, the teacher's, those in both (`intersection`), in either
    (`union`), or in exactly one (`xor`)."""
    topk: PositiveInt = 16
    """Number of teacher candidates per token. Source: Rethinking OPD (16)."""
    student_topk: PositiveInt = 16
    """Number of student candidates per token."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.rethinking)

    def problems(self) -> Iterator[str]:
        """A single candidate is allowed: its log-probs are over the whole vocabulary, only its weight is 1."""
        if self.policy_gradient.mismatch != "off":
            yield (
                f"objective.policy_gradient.mismatch={self.policy_gradient.mismatch} weighs sampled tokens, but the "
                "candidates of objective.kind=rethinking were not sampled; set mismatch=off"
            )
        if self.updates_per_step > 1 and self.support in ("teacher", "union", "xor"):
            yield (
                f"objective.support={self.support} with {self.updates_per_step} updates per rollout batch: the "
                "student's log-probs of the teacher's candidates are not kept from before the first update, so they "
                "have no ratio; set support=student or intersection, or make one update"
            )

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False
