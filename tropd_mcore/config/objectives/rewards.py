"""The keys of the objectives that teach by a reward on the sampled token (docs/objectives.md)."""

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
    """What all of them share."""

    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""


class ReopoldObjective(RewardObjective):
    """Relaxed OPD: the reward floored; in two stages, first without very negative tokens, then uncertain ones only."""

    kind: Literal["reopold"] = "reopold"
    stages: Literal[1, 2] = 1
    """1 floors the reward of every token (Clip Outlier of TrOPD's tables); 2 adds the phases of the paper, each a mean
    over the tokens that it trains."""
    floor: float = default(catalogue.reopold, "floor")
    """Least reward, nats: log(lambda / (1 - lambda)). Source: REOPOLD eq. 7, lambda = 0.3."""
    switch_at: Fraction = 0.5
    """Fraction of run.steps after which the second phase begins (stages: 2)."""
    entropy_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the batch's tokens, by student entropy, that the second phase trains. Source: REOPOLD eq. 8 (0.2)."""
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
        """Which tokens are trained at `progress`: the keyword `train` of the loss function."""
        if self.stages == 1:
            return "all"
        return "above_floor" if progress < self.switch_at else "selected"


class EntropyOpdObjective(RewardObjective):
    """OPD on the tokens where the student is most uncertain."""

    kind: Literal["entropy_opd"] = "entropy_opd"
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the global batch's tokens, by student entropy, that are trained. Source: TrOPD section 4 (20 %)."""
    denominator: Literal["selected", "all"] = default(catalogue.entropy_opd, "denominator")
    """The loss is the mean over the selected tokens, or the sum over them divided by the number of all tokens."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.entropy_opd)

    @property
    def counts_trained_only(self) -> bool:
        return self.denominator == "selected"

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("most_uncertain", {"fraction": self.fraction})


class ExopdObjective(RewardObjective):
    """G-OPD: the reward relative to a reference, scaled; above 1 it extrapolates past the teacher (ExOPD)."""

    kind: Literal["exopd"] = "exopd"
    scale: PositiveFloat = default(catalogue.exopd, "scale")
    """lambda of the G-OPD reward; 1 is plain OPD. Source: ExOPD (1.25)."""
    reference: Path | None = None
    """Hugging Face folder of the reference model; None = the student as the run found it."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.exopd)
    """Source of the mismatch weight: G-OPD's code, token level, at most 5.0."""

    def reference_folder(self, student: Path) -> Path | None:
        return self.reference or student


class TopdObjective(RewardObjective):
    """TOP-D: a reward bounded by mixing probabilities, with the mean of what follows, normalised over the group."""

    kind: Literal["topd"] = "topd"
    mixing: float = Field(default=default(catalogue.topd, "mixing"), gt=0, lt=1)
    """alpha of log(alpha rho + 1 - alpha), rho = teacher's / student's probability; bounded below by log(1 - alpha).
    Source: TOP-D (0.9)."""
    future_mean: bool = True
    """Add the mean reward of the tokens that follow."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation over all tokens of a prompt's samples."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.topd)
    clips_log_ratio: ClassVar[bool] = False

    @property
    def compares_samples(self) -> bool:
        return self.normalise

    def statistic(self, progress: float) -> BatchStatistic | None:
        names = ("mixing", "future_mean", "normalise")
        return BatchStatistic("mixed_return", {name: getattr(self, name) for name in names})


class VopdObjective(RewardObjective):
    """vOPD: the log-ratio with the state's own baseline, KL(p || q) on the student's top tokens, a constant."""

    kind: Literal["vopd"] = "vopd"
    student_topk: PositiveInt = 100
    """Student candidates of the baseline, renormalised on both sides. Source: vOPD's code (100)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.vopd)

    def problems(self) -> Iterator[str]:
        if self.student_topk == 1:
            yield (
                "objective.student_topk = 1: renormalised on one candidate, student and teacher are equal and the "
                "baseline of vopd is always 0; set it to 2 or more, or objective.kind=opd"
            )


class IwOpdObjective(RewardObjective):
    """IW-OPD: early tokens weigh more, by how much of the sample's advantage is still to come."""

    kind: Literal["iw_opd"] = "iw_opd"
    gamma: float = Field(default=0.5, ge=0)
    """h_t = 1 + gamma (1 - share of the sample's |A| that is before t). Source: IW-OPD (0.5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.iw_opd)

    def statistic(self, progress: float) -> BatchStatistic | None:
        return BatchStatistic("history_weight", {"gamma": self.gamma})


class PowerOpdObjective(RewardObjective):
    """PowerOPD: the reward q^a - p^a, bounded in [-1, 1]."""

    kind: Literal["power_opd"] = "power_opd"
    power: PositiveFloat = default(catalogue.power_opd, "power")
    """a of q^a - p^a: the larger it is, the less a token counts that both models find unlikely. Towards 0 the reward
    divided by a becomes the log-ratio. Source: PowerOPD's code (5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig.of(catalogue.power_opd)
    clips_log_ratio: ClassVar[bool] = False
