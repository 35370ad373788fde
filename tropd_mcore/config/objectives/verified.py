"""The keys of objectives whose advantage comes from a verifier (docs/objectives.md)."""

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
    """Base of both objectives: the advantage of a sample is relative to the other samples of its prompt."""

    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token, used for metrics only."""
    learns_from_verifier: ClassVar[bool] = True
    clips_log_ratio: ClassVar[bool] = False

    @property
    def compares_samples(self) -> bool:
        return True

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("group_advantage")


class KdrlObjective(VerifiedObjective):
    """KDRL: a group-relative advantage from a verifier, plus a K2 penalty towards the teacher."""

    kind: Literal["kdrl"] = "kdrl"
    beta_start: float = Field(default=default(catalogue.kdrl, "beta"), ge=0)
    """Weight of the penalty (log q - log p)^2 / 2 at the first step. It changes linearly to beta_end.
    Source: KDRL (5e-3 to 1e-3)."""
    beta_end: float = Field(default=1e-3, ge=0)
    """Weight of the penalty that is reached at run.steps. Source: as beta_start."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.kdrl)

    def constants(self, progress: float) -> dict[str, Any]:
        beta = self.beta_start + (self.beta_end - self.beta_start) * progress
        return super().constants(progress) | {"beta": beta}


class RladObjective(VerifiedObjective):
    """RLAD: a group-relative advantage from a verifier, with an importance ratio anchored between old policy and
    teacher."""

    kind: Literal["rlad"] = "rlad"
    anchor: Fraction = default(catalogue.rlad, "anchor")
    """alpha of the ratio p / (p_old^alpha q^(1 - alpha)). 1 = GRPO, 0 = the ratio is anchored at the teacher."""
    reference_weight: float = Field(default=default(catalogue.rlad, "reference_weight"), ge=0)
    """Weight of the KL to the reference model, estimated from one sample (K3). 0 = no reference model is needed."""
    reference: Path | None = None
    """Hugging Face folder of the reference model. null = student.path, the student before training."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.rlad)
    """If student and teacher disagree, the ratio is far from 1 even before any update. A dual clip would therefore
    leave tokens with A < 0 and q much below p without a gradient."""
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
