"""The keys of the objectives whose advantage comes from a verifier (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tropd_mcore.config.fields import Fraction, PositiveInt
from tropd_mcore.config.objectives.base import (
    BatchStatistic,
    PolicyGradientConfig,
    PolicyGradientObjective,
    Unused,
)
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default


class VerifiedObjective(PolicyGradientObjective):
    """What both share: the advantage of a sample relative to the others of its prompt."""

    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""
    learns_from_verifier: ClassVar[bool] = True
    clips_log_ratio: ClassVar[bool] = False

    @property
    def compares_samples(self) -> bool:
        return True

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("group_advantage")


class KdrlObjective(VerifiedObjective):
    """KDRL: a verifier's group-relative advantage plus a K2 penalty towards the teacher."""

    kind: Literal["kdrl"] = "kdrl"
    beta_start: float = Field(default=default(catalogue.kdrl, "beta"), ge=0)
    """Weight of (log q - log p)^2 / 2 at the first step, then linear to beta_end. Source: KDRL (5e-3 to 1e-3)."""
    beta_end: float = Field(default=1e-3, ge=0)
    """Weight that is reached at run.steps."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.kdrl)

    def constants(self, progress: float) -> dict[str, Any]:
        beta = self.beta_start + (self.beta_end - self.beta_start) * progress
        return super().constants(progress) | {"beta": beta}


class RladObjective(VerifiedObjective):
    """RLAD: a verifier's group-relative advantage whose importance ratio is anchored between old policy and teacher."""

    kind: Literal["rlad"] = "rlad"
    anchor: Fraction = default(catalogue.rlad, "anchor")
    """alpha of p / (p_old^alpha q^(1 - alpha)); 1 is GRPO, 0 anchors at the teacher."""
    reference_weight: float = Field(default=default(catalogue.rlad, "reference_weight"), ge=0)
    """Weight of the KL to the reference (one-sample K3); 0 needs no reference model."""
    reference: Path | None = None
    """Hugging Face folder of the reference model; None = the student as the run found it."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.rlad)
    """The ratio is far from 1 before any update, where student and teacher disagree. A dual clip would therefore leave
    tokens with A < 0 and q much below p without gradient."""
    needs_old_logp: ClassVar[bool] = True

    def reference_folder(self, student: Path) -> Path | None:
        return None if self.reference_weight == 0 else self.reference or student

    def problems(self) -> Iterator[str]:
        if self.policy_gradient.ratio == "none":
            yield (
                "objective.policy_gradient.ratio=none leaves objective.kind=rlad without the ratio that it anchors; "
                "set ratio=ppo_clip"
            )

    def unused(self) -> Iterator[Unused]:
        yield from super().unused()
        if self.reference_weight == 0:
            yield Unused(self, "objective", ("reference",), "objective.reference_weight=0")
