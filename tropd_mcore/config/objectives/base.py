"""What all objectives share: the section `policy_gradient`, and the questions that the rest of the system asks.

Not for the keys of one kind (the modules beside this one). Invariant: nobody outside asks which kind an objective is;
what follows from a kind is answered here, by a trait that the kind's class overrides beside the keys it depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from tropd_mcore.config.fields import PositiveFloat, PositiveInt, Section
from tropd_mcore.objectives import catalogue
from tropd_mcore.objectives.catalogue import PolicyGradient, default

if TYPE_CHECKING:
    from tropd_mcore.config.objectives.trust_region import GuidanceConfig

Norm = Literal["truncated", "tail", "renorm", "teacher_renorm"]
"""What becomes of the vocabulary outside the candidates (docs/method.md, 4)."""


class PolicyGradientConfig(Section):
    """How an advantage becomes a gradient."""

    ratio: Literal["none", "importance", "ppo_clip"] = PolicyGradient.ratio  # type: ignore[assignment]
    """p / p_old of the loss: 1 (one update a rollout batch), the ratio itself, or PPO's clipped surrogate."""
    clip_low: float = Field(default=PolicyGradient.clip_low, gt=0, lt=1)
    """PPO clips the ratio below 1 - clip_low (`ppo_clip`). Source: PPO (0.2)."""
    clip_high: PositiveFloat = PolicyGradient.clip_high
    """PPO clips the ratio above 1 + clip_high (`ppo_clip`)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = PolicyGradient.dual_clip
    """With an advantage A < 0, the loss is at most -dual_clip * A (`ppo_clip`); None = off. Source: dual-clip PPO, in
    verl with 3.0. Objectives whose source lacks it have None (docs/settings.md)."""
    mini_batches: PositiveInt = 1
    """Optimizer steps a rollout batch makes, each on its own part of the prompts; more than 1 needs a ratio."""
    epochs: PositiveInt = 1
    """Passes over the rollout batch; more than 1 needs a ratio."""
    mismatch: Literal["off", "tis", "icepop", "mask"] = PolicyGradient.mismatch  # type: ignore[assignment]
    """Weight of trainer/sampler probability: off, truncated at tis_cap, zero outside the icepop band, or zero where
    p_trainer - p_sampler < mask_below."""
    tis_cap: PositiveFloat = PolicyGradient.tis_cap
    """Upper bound of the truncated importance weight."""
    icepop_low: PositiveFloat = PolicyGradient.icepop_low
    """Lower edge of the IcePop band."""
    icepop_high: PositiveFloat = PolicyGradient.icepop_high
    """Upper edge of the IcePop band."""
    mask_below: float = PolicyGradient.mask_below
    """Probability difference below which `mask` drops a token."""
    advantage_clip: PositiveFloat | None = PolicyGradient.advantage_clip
    """Clamp of the log-ratio advantage to [-c, c], nats; None = off (the paper)."""

    @classmethod
    def of(cls, factory: catalogue.Factory) -> PolicyGradientConfig:
        """Return the defaults of an objective."""
        return cls(**asdict(default(factory, "policy")))

    @property
    def constants(self) -> PolicyGradient:
        """The part of the section that the loss knows; mini-batches and epochs are the trainer's."""
        return PolicyGradient(**self.model_dump(exclude={"mini_batches", "epochs"}))


@dataclass(frozen=True)
class BatchStatistic:
    """A number of each token that depends on other tokens: a function of `objectives.parts.batch_statistics`."""

    name: str
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfTeaching:
    """How the student becomes its own teacher."""

    average_rate: float
    """Fraction of the difference by which the teacher's weights move after each optimizer step"""
    template: str
    """What the teacher reads instead of the prompt, with {prompt} and {solution}"""


@dataclass(frozen=True)
class FullVocabularyDivergence:
    """A divergence over the whole vocabulary."""

    name: str
    """fkl, rkl or jsd"""
    beta: float
    """Weight of the teacher in the mixture of the jsd"""


@dataclass(frozen=True)
class Unused:
    """Keys without effect where they are not at their default, and the setting that makes them so."""

    section: Section
    key: str
    """Of the section, dotted"""
    names: tuple[str, ...]
    because: str
    defaults: Section | None = None
    """Has the defaults where they are not those of the section's class"""


class Objective(Section):
    """Base of all kinds. A subclass has its `kind`, its keys, and those of the traits below that are not the usual."""

    if TYPE_CHECKING:
        kind: str

    learns_from_verifier: ClassVar[bool] = False
    """Whether it needs the verifier's verdict on every sample"""
    needs_teacher_entropy: ClassVar[bool] = False
    """Whether it needs the teacher's entropy over the whole vocabulary"""
    has_own_ratio: ClassVar[bool] = False
    """Whether it corrects for a policy that moved by itself, without policy_gradient.ratio"""
    clips_log_ratio: ClassVar[bool] = True
    """Whether its advantage is a log-ratio, which policy_gradient.advantage_clip clamps"""
    needs_old_logp: ClassVar[bool] = False
    """Whether it needs log p from before the update even with a single update"""
    teacher_topk_key: ClassVar[str] = "topk"
    """The key under `objective` that says how many teacher candidates a token are scored"""

    @property
    def family(self) -> str:
        """The module that has the class; its equations and its oracle are in modules of the same name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def teacher_topk(self) -> int:
        """Teacher candidates per token that are scored."""
        return int(self.topk)  # type: ignore[attr-defined]

    @property
    def student_candidates(self) -> int:
        """The student's own candidates per token; 0 where none are needed."""
        return int(getattr(self, "student_topk", 0))

    @property
    def policy(self) -> PolicyGradientConfig:
        """The section `policy_gradient`; without one, the defaults, which change nothing."""
        return PolicyGradientConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps that a rollout batch makes."""
        return self.policy.mini_batches * self.policy.epochs

    @property
    def active_guidance(self) -> GuidanceConfig | None:
        """The section `guidance` where there is one that is enabled."""
        return None

    @property
    def has_prefix_loss(self) -> bool:
        """Whether there is a term for the tokens of a teacher prefix: only then are they rows."""
        return False

    @property
    def compares_samples(self) -> bool:
        """Whether the samples of a prompt are compared, so that one is not enough."""
        return False

    @property
    def counts_trained_only(self) -> bool:
        """Whether the denominator is the number of tokens that are trained."""
        return False

    @property
    def self_teaching(self) -> SelfTeaching | None:
        """Set where the teacher is an average of the student, which reads a correct solution."""
        return None

    @property
    def full_vocabulary_divergence(self) -> FullVocabularyDivergence | None:
        """Set where the loss is a divergence over the whole vocabulary, which needs the teacher's hidden states."""
        return None

    @property
    def function_path(self) -> str | None:
        """The import path of a function that is not in this package."""
        return None

    @property
    def needs_statistic(self) -> bool:
        """Whether the loss of a token depends on other tokens at any time of the run."""
        return self.statistic(0.0) is not None or self.statistic(1.0) is not None

    def statistic(self, progress: float) -> BatchStatistic | None:
        """Return what the loss of a token takes from other tokens at `progress` = step / run.steps."""
        return None

    def reference_folder(self, student: Path) -> Path | None:
        """Return the folder of the frozen reference model, of which `student` is the default; None without one."""
        return None

    def constants(self, progress: float) -> dict[str, Any]:
        """Return the constants by the keywords of `objectives.catalogue`; names that it does not have are ignored."""
        keys = {name: getattr(self, name) for name in type(self).model_fields}
        return keys | {"policy": self.policy.constants}

    def description(self) -> str:
        """Return the constants in one line, for the plan of a run."""
        left_out = {"kind", "policy_gradient", "reference", "template"}
        values = self.model_dump(exclude=left_out, exclude_none=True)
        return ", ".join(f"{name} {_short(value)}" for name, value in values.items())

    def problems(self) -> Iterator[str]:
        """Yield a line for each setting that would train nothing or the wrong thing, as far as this section shows."""
        yield from ()

    def unused(self) -> Iterator[Unused]:
        """Yield the keys that other keys leave without effect."""
        yield from ()


class PolicyGradientObjective(Objective):
    """An objective with the section `policy_gradient`, whose defaults are those of the objective's source.

    A class states them as the default of that field (docs/settings.md). A key that the configuration leaves out has the
    default of the objective, also where other keys of the section are given.
    """

    if TYPE_CHECKING:
        policy_gradient: PolicyGradientConfig

    @field_validator("policy_gradient", mode="before", check_fields=False)
    @classmethod
    def _with_the_defaults_of_the_objective(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {**cls.default_policy_gradient().model_dump(), **value}

    @classmethod
    def default_policy_gradient(cls) -> PolicyGradientConfig:
        """Return the defaults of `policy_gradient` for this objective."""
        found = cls.model_fields["policy_gradient"].default
        assert isinstance(found, PolicyGradientConfig)
        return found

    @property
    def policy(self) -> PolicyGradientConfig:
        return self.policy_gradient

    def unused(self) -> Iterator[Unused]:
        policy, usual, key = self.policy_gradient, self.default_policy_gradient(), "objective.policy_gradient"
        if policy.ratio != "ppo_clip":
            names = ("clip_low", "clip_high", "dual_clip")
            yield Unused(policy, key, names, f"{key}.ratio={policy.ratio}", usual)
        constants = {"tis": ("tis_cap",), "icepop": ("icepop_low", "icepop_high"), "mask": ("mask_below",)}
        for mode, of_mode in constants.items():
            if policy.mismatch != mode:
                yield Unused(policy, key, of_mode, f"{key}.mismatch={policy.mismatch}", usual)


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def renormalised_on_one(key: str) -> str:
    """Return the line about a divergence that is always 0."""
    return (
        f"{key} = 1 with norm=renorm: renormalised on one token, student and teacher are equal and the divergence "
        f"is always 0; set {key} to 2 or more, or another norm"
    )
