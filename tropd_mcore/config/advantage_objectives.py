"""The keys of the objectives that teach by a reward on the sampled token (docs/objectives.md)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from tropd_mcore.config.fields import Fraction, PositiveFloat, PositiveInt
from tropd_mcore.config.tropd_objectives import PolicyGradientConfig, PolicyGradientObjective


class RewardObjective(PolicyGradientObjective):
    """What all of them share."""

    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""


class ReopoldObjective(RewardObjective):
    """Relaxed OPD: the reward floored; in two stages, first without very negative tokens, then uncertain ones only."""

    kind: Literal["reopold"] = "reopold"
    stages: Literal[1, 2] = 1
    """1 floors the reward of every token (Clip Outlier of TrOPD's tables); 2 adds the phases of the paper, each a mean
    over the tokens that it trains."""
    floor: float = math.log(0.3 / 0.7)
    """Least reward, nats: log(lambda / (1 - lambda)). Source: REOPOLD eq. 7, lambda = 0.3."""
    switch_at: Fraction = 0.5
    """Fraction of run.steps after which the second phase begins (stages: 2)."""
    entropy_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the batch's tokens, by student entropy, that the second phase trains. Source: REOPOLD eq. 8 (0.2)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class EntropyOpdObjective(RewardObjective):
    """OPD on the tokens where the student is most uncertain."""

    kind: Literal["entropy_opd"] = "entropy_opd"
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the global batch's tokens, by student entropy, that are trained. Source: TrOPD section 4 (20 %)."""
    denominator: Literal["selected", "all"] = "selected"
    """The loss is the mean over the selected tokens, or the sum over them divided by the number of all tokens."""


class ExopdObjective(RewardObjective):
    """G-OPD: the reward relative to a reference, scaled; above 1 it extrapolates past the teacher (ExOPD)."""

    kind: Literal["exopd"] = "exopd"
    scale: PositiveFloat = 1.25
    """lambda of the G-OPD reward; 1 is plain OPD. Source: ExOPD (1.25)."""
    reference: Path | None = None
    """Hugging Face folder of the reference model; None = the student as the run found it."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(mismatch="tis", tis_cap=5.0)
    """Source of the mismatch weight: G-OPD's code, token level, at most 5.0."""


class TopdObjective(RewardObjective):
    """TOP-D: a reward bounded by mixing probabilities, with the mean of what follows, normalised over the group."""

    kind: Literal["topd"] = "topd"
    mixing: float = Field(default=0.9, gt=0, lt=1)
    """alpha of log(alpha rho + 1 - alpha), bounded below by log(1 - alpha). Source: TOP-D (0.9)."""
    future_mean: bool = True
    """Add the mean reward of the tokens that follow."""
    normalise: bool = True
    """Subtract the mean and divide by the standard deviation over all tokens of a prompt's samples."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class VopdObjective(RewardObjective):
    """vOPD: the log-ratio with the state's own baseline, KL(p || q) on the student's top tokens, a constant."""

    kind: Literal["vopd"] = "vopd"
    own_topk: PositiveInt = 100
    """Student candidates of the baseline, renormalised on both sides. Source: vOPD's code (100)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class IwOpdObjective(RewardObjective):
    """IW-OPD: early tokens weigh more, by how much of the sample's advantage is still to come."""

    kind: Literal["iw_opd"] = "iw_opd"
    gamma: float = Field(default=0.5, ge=0)
    """h_t = 1 + gamma (1 - share of the sample's |A| that is before t). Source: IW-OPD (0.5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class PowerOpdObjective(RewardObjective):
    """PowerOPD: the reward q^a - p^a, bounded in [-1, 1]."""

    kind: Literal["power_opd"] = "power_opd"
    power: PositiveFloat = 5.0
    """a of q^a - p^a: the larger it is, the less a token counts that both models find unlikely. Towards 0 the reward
    divided by a becomes the log-ratio. Source: PowerOPD's code (5)."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class KdrlObjective(RewardObjective):
    """KDRL: a verifier's group-relative advantage plus a K2 penalty towards the teacher."""

    kind: Literal["kdrl"] = "kdrl"
    beta_start: float = Field(default=5e-3, ge=0)
    """Weight of (log q - log p)^2 / 2 at the first step, then linear to beta_end. Source: KDRL (5e-3 to 1e-3)."""
    beta_end: float = Field(default=1e-3, ge=0)
    """Weight that is reached at run.steps."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(dual_clip=None)


class RladObjective(RewardObjective):
    """RLAD: a verifier's group-relative advantage whose importance ratio is anchored between old policy and teacher."""

    kind: Literal["rlad"] = "rlad"
    anchor: Fraction = 0.5
    """alpha of p / (p_old^alpha q^(1 - alpha)); 1 is GRPO, 0 anchors at the teacher."""
    reference_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference (one-sample K3); 0 needs no reference model."""
    reference: Path | None = None
    """Hugging Face folder of the reference model; None = the student as the run found it."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(ratio="ppo_clip", dual_clip=None)
    """The ratio is far from 1 before any update, where student and teacher disagree. A dual clip would therefore leave
    tokens with A < 0 and q much below p without gradient."""


class RethinkingObjective(PolicyGradientObjective):
    """Rethinking OPD: a policy gradient on several candidates of each state instead of the sampled token alone."""

    kind: Literal["rethinking"] = "rethinking"
    support: Literal["student", "teacher", "intersection", "union", "xor"] = "student"
    """Whose top-k the candidates are; xor = in one of the two only."""
    topk: PositiveInt = 16
    """Candidates of the teacher. Source: Rethinking OPD (16)."""
    own_topk: PositiveInt = 16
    """Candidates of the student."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig(ratio="ppo_clip")


AdvantageObjective = (
    ReopoldObjective
    | EntropyOpdObjective
    | ExopdObjective
    | TopdObjective
    | VopdObjective
    | IwOpdObjective
    | PowerOpdObjective
    | KdrlObjective
    | RladObjective
    | RethinkingObjective
)
