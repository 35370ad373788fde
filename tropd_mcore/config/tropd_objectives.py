"""The keys of TrOPD and of plain on-policy distillation, and those that all objectives with a policy gradient share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tropd_mcore.config.fields import PositiveFloat, PositiveInt, Section


class TrustConfig(Section):
    mode: Literal["bernoulli", "soft", "threshold", "none"] = "bernoulli"
    """How a token is trusted: u < rho (TrOPD eq. of P_trust), weight min(rho, 1), rho > exp(threshold), or always."""
    threshold: float = math.log(0.3 / 0.7)
    """Log-ratio above which a token is trusted, `threshold` mode only. Source: REOPOLD, lambda = 0.3."""


class OutlierConfig(Section):
    mode: Literal["fkl_direct", "fkl_scalar", "mask", "clip"] = "fkl_direct"
    """Loss of a distrusted token: differentiable top-k FKL (paper), the same as a scalar advantage, none, or a
    reward floored at clip_tau. `mask` and `clip` use the static region r > clip_tau (TrOPD table 1)."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the outlier term. Source: TrOPD eq. of J_on (1:1)."""
    topk: PositiveInt = 64
    """Teacher support size k. Source: TrOPD section 4."""
    norm: Literal["truncated", "tail", "renorm", "teacher_renorm"] = "truncated"
    """Support normalisation of the FKL (docs/method.md, 4)."""
    clip_tau: float = math.log(0.3 / 0.7)
    """Log-ratio floor of `clip` and `mask`. Source: REOPOLD, lambda = 0.3."""


class GuidanceConfig(Section):
    enabled: bool = True
    """Continue teacher prefixes; needs data.teacher_responses."""
    beta: float = Field(default=1e-3, ge=0)
    """Weight of the prefix loss. Source: TrOPD section 3.3."""
    loss: Literal["nll", "none", "topk_fkl", "scalar_adv"] = "nll"
    """Prefix loss: NLL (gradient of the K1 forward KL), none, top-k FKL, or the detached advantage of the authors."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """alpha(t): (1 + cos(pi t / T)) / 2, 1 - t / T, or 1; 0 after T (constant: 1)."""
    total_steps: PositiveInt | None = None
    """T of the schedule; None = run.steps."""
    length_mode: Literal["proportional", "cap"] = "proportional"
    """Prefix length: floor(alpha * len(response)), or min(floor(alpha * longest response), len(response))."""
    min_continuation: PositiveInt = 64
    """Tokens of the teacher response that are always left to the student."""
    continuation_budget: Literal["full", "shared"] = "full"
    """New tokens after the prefix: rollout.max_new_tokens, or that minus the prefix."""


class PolicyGradientConfig(Section):
    """How an advantage becomes a gradient."""

    ratio: Literal["none", "importance", "ppo_clip"] = "none"
    """p / p_old of the loss: 1 (one update a rollout batch), the ratio itself, or PPO's clipped surrogate."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """PPO clips the ratio below 1 - clip_low (`ppo_clip`). Source: PPO (0.2)."""
    clip_high: PositiveFloat = 0.2
    """PPO clips the ratio above 1 + clip_high (`ppo_clip`)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """With an advantage A < 0, the loss is at most -dual_clip * A (`ppo_clip`); None = off. Source: dual-clip PPO, in
    verl with 3.0. Objectives whose source lacks it have None (docs/settings.md)."""
    mini_batches: PositiveInt = 1
    """Optimizer steps a rollout batch makes, each on its own part of the prompts; more than 1 needs a ratio."""
    epochs: PositiveInt = 1
    """Passes over the rollout batch; more than 1 needs a ratio."""
    mismatch: Literal["off", "tis", "icepop", "mask"] = "off"
    """Weight of trainer/sampler probability: off, truncated at tis_cap, zero outside the icepop band, or zero where
    p_trainer - p_sampler < mask_below."""
    tis_cap: PositiveFloat = 2.0
    """Upper bound of the truncated importance weight."""
    icepop_low: PositiveFloat = 0.5
    """Lower edge of the IcePop band."""
    icepop_high: PositiveFloat = 5.0
    """Upper edge of the IcePop band."""
    mask_below: float = -0.2
    """Probability difference below which `mask` drops a token."""
    advantage_clip: PositiveFloat | None = None
    """Clamp of the log-ratio advantage to [-c, c], nats; None = off (the paper)."""


class PolicyGradientObjective(Section):
    """An objective with the section `policy_gradient`, whose defaults are those of the objective's source.

    A class states them as the default of that field (docs/settings.md). A key that the configuration leaves out has the
    default of the objective, also where other keys of the section are given.
    """

    @field_validator("policy_gradient", mode="before", check_fields=False)
    @classmethod
    def _with_the_defaults_of_the_objective(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {**cls.default_policy_gradient().model_dump(), **value}

    @classmethod
    def default_policy_gradient(cls) -> PolicyGradientConfig:
        """Return the defaults of `policy_gradient` for this objective."""
        default = cls.model_fields["policy_gradient"].default
        assert isinstance(default, PolicyGradientConfig)
        return default


class TropdObjective(PolicyGradientObjective):
    """TrOPD, docs/method.md."""

    kind: Literal["tropd"] = "tropd"
    trust: TrustConfig = TrustConfig()
    outlier: OutlierConfig = OutlierConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()


class OpdObjective(PolicyGradientObjective):
    """Plain on-policy distillation: the same code with the gate open and no guidance."""

    kind: Literal["opd"] = "opd"
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""
