"""The keys of objectives with a reward on the sampled token (docs/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tropd_mcore.config.fields import Fraction, PositiveFloat, PositiveInt
from tropd_mcore.config.objectives.base import (
    BatchStatistic,
    PolicyGradientConfig,
    PolicyGradientObjective,
    Unused,
)
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import default


class RewardObjective(PolicyGradientObjective):
    """Base of these objectives."""

    topk: PositiveInt = 64
    """Number of teacher candidates (top-k) per token, used for metrics only."""


class ReopoldObjective(RewardObjective):
    """Relaxed OPD: the reward has a floor. With two stages, it first trains tokens above the floor, then only tokens on
    which the student is uncertain."""

    kind: Literal["reopold"] = "reopold"
    stages: Literal[1, 2] = 1
    """1: floor the reward of every token (Clip Outlier in TrOPD's tables). 2: also use the two phases of the paper. The
    loss of a phase is the mean over the tokens that it trains."""
    floor: float = default(catalogue.reopold, "floor")
    """Lowest reward in nats, log(lambda / (1 - lambda)). Source: REOPOLD eq. 7, lambda = 0.3."""
    switch_at: Fraction = 0.5
    """Only with stages=2. Fraction of run.steps after which the second phase begins."""
    entropy_fraction: float = Field(default=0.2, gt=0, le=1)
    """Only with stages=2. Share of the batch's tokens that the second phase trains: those with the highest student
    entropy. Source: REOPOLD eq. 8 (0.2)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.reopold)

    @property
    def counts_trained_only(self) -> bool:
        return self.stages == 2

    def statistic(self, progress: float) -> BatchStatistic | None:
        if self._phase(progress) != "selected":
            return None
        return BatchStatistic("most_uncertain", {"fraction": self.entropy_fraction})

    def constants(self, progress: float) -> dict[str, Any]:
        return super().constants(progress) | {"train": self._phase(progress)}

    def unused(self) -> Iterator[Unused]:
        yield from super().unused()
        if self.stages == 1:
            yield Unused(self, "objective", ("switch_at", "entropy_fraction"), "objective.stages=1")

    def _phase(self, progress: float) -> str:
        """Which tokens are trained at `progress`, as the keyword `train` of the loss function."""
        if self.stages == 1:
            return "all"
        return "above_floor" if progress < self.switch_at else "selected"

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class EntropyOpdObjective(RewardObjective):
    """OPD on the tokens on which the student is most uncertain."""

    kind: Literal["entropy_opd"] = "entropy_opd"
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the global batch's tokens that are trained: those with the highest student entropy. Source: TrOPD
    section 4 (20 %)."""
    denominator: Literal["selected", "all"] = default(catalogue.entropy_opd, "denominator")
    """The sum of the loss over the selected tokens is divided by their number (`selected`) or by the number of all
    tokens (`all`)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.entropy_opd)

    @property
    def counts_trained_only(self) -> bool:
        return self.denominator == "selected"

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("most_uncertain", {"fraction": self.fraction})


class ExopdObjective(RewardObjective):
    """G-OPD: a scaled reward relative to a reference model. A scale above 1 extrapolates past the teacher (ExOPD)."""

    kind: Literal["exopd"] = "exopd"
    scale: PositiveFloat = default(catalogue.exopd, "scale")
    """lambda of the G-OPD reward scale (log q - log ref) - (log p - log ref), with reference model ref. 1 is plain OPD.
    Source: ExOPD (1.25)."""
    reference: Path | None = None
    """Hugging Face folder of the reference model. null = student.path, the student before training."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.exopd)
    """Source of the mismatch weight: G-OPD's code, token level, at most 5.0."""

    def reference_folder(self, student: Path) -> Path | None:
        return self.reference or student


class TopdObjective(RewardObjective):
    """TOP-D: a reward that mixing probabilities bounds below, plus the mean reward of later tokens, normalised over the
    samples of a prompt."""

    kind: Literal["topd"] = "topd"
    mixing: float = Field(default=default(catalogue.topd, "mixing"), gt=0, lt=1)
    """alpha of the reward log(alpha rho + 1 - alpha), with rho = teacher's / student's probability. The reward is never
    below log(1 - alpha). Source: TOP-D (0.9)."""
    future_mean: bool = True
    """Add to each token's reward the mean reward of the tokens after it."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation, both over all tokens of a prompt's samples."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.topd)
    clips_log_ratio: ClassVar[bool] = False

    @property
    def compares_samples(self) -> bool:
        return self.normalise

    def statistic(self, progress: float) -> BatchStatistic | None:
        names = ("mixing", "future_mean", "normalise")
        return BatchStatistic("mixed_return", {name: getattr(self, name) for name in names})


class VopdObjective(RewardObjective):
    """vOPD: the log-ratio plus a baseline per position, KL(p || q) on the student's top-k, which is a constant."""

    kind: Literal["vopd"] = "vopd"
    student_topk: PositiveInt = 100
    """Number of student candidates for the baseline KL(p || q). p and q are renormalised on them. Source: vOPD's code
    (100)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.vopd)

    def problems(self) -> Iterator[str]:
        if self.student_topk == 1:
            yield (
                "objective.student_topk = 1: renormalised on one candidate, student and teacher are equal and the "
                "baseline of vopd is always 0; set it to 2 or more, or objective.kind=opd"
            )

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class IwOpdObjective(RewardObjective):
    """IW-OPD: a token weighs more, the more of the sample's total |advantage| comes after it."""

    kind: Literal["iw_opd"] = "iw_opd"
    gamma: float = Field(default=0.5, ge=0)
    """Strength of the weight h_t = 1 + gamma (1 - share of the sample's sum of |advantage| before token t).
    Source: IW-OPD (0.5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.iw_opd)

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("history_weight", {"gamma": self.gamma})

    @property
    def keeps_rare_mistakes(self) -> bool:
        return False


class PowerOpdObjective(RewardObjective):
    """PowerOPD: the reward q^a - p^a, which is in [-1, 1]."""

    kind: Literal["power_opd"] = "power_opd"
    power: PositiveFloat = default(catalogue.power_opd, "power")
    """Exponent a of the reward q^a - p^a. The larger it is, the less weight tokens have that both models find unlikely.
    As a tends to 0, the reward divided by a tends to the log-ratio. Source: PowerOPD's code (5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.power_opd)
    clips_log_ratio: ClassVar[bool] = False

    @property
    def keeps_rare_mistakes(self) -> bool:
        return True
