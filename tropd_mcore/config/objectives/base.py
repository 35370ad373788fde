"""What all objectives share: the section `policy_gradient` and the traits that the rest of the system reads.

This module does not have the keys of a single kind (see the modules beside it). Invariant: no other code asks which
kind an objective is. Whatever follows from a kind is a trait here, which the kind's class overrides beside the keys
that the trait depends on.
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
"""How a divergence treats the vocabulary outside the candidates (docs/method.md, 4)."""


class PolicyGradientConfig(Section):
    """How an advantage becomes a gradient."""

    ratio: Literal["none", "importance", "ppo_clip"] = PolicyGradient.ratio  # type: ignore[assignment]
    """Factor p / p_old of the policy gradient, where p_old is the student before the first update of the step. `none`:
    1, for one update per rollout batch. `importance`: the ratio itself. `ppo_clip`: PPO's clipped surrogate."""
    clip_low: float = Field(default=PolicyGradient.clip_low, gt=0, lt=1)
    """`ppo_clip` only. The ratio is clipped below 1 - clip_low. Source: PPO (0.2)."""
    clip_high: PositiveFloat = PolicyGradient.clip_high
    """`ppo_clip` only. The ratio is clipped above 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = PolicyGradient.dual_clip
    """`ppo_clip` only. If the advantage A is negative, the loss is at most -dual_clip * A. null = off. Source:
    dual-clip PPO, in verl with 3.0. Objectives whose source lacks it have null (docs/settings.md)."""
    mini_batches: PositiveInt = 1
    """Number of parts into which the prompts of a rollout batch are split, with one optimizer step per part. More than
    1 needs `ratio` (sdpo has its own)."""
    epochs: PositiveInt = 1
    """Number of passes over the rollout batch. More than 1 needs `ratio` (sdpo has its own)."""
    mismatch: Literal["off", "tis", "icepop", "mask"] = PolicyGradient.mismatch  # type: ignore[assignment]
    """Weight of each sampled token that corrects for the difference between trainer and sampler, from
    w = p_trainer / p_sampler. `off`: 1. `tis`: min(w, tis_cap), truncated importance sampling. `icepop`: w from
    icepop_low to icepop_high, else 0. `mask`: 1, but 0 if p_trainer - p_sampler < mask_below."""
    tis_cap: PositiveFloat = PolicyGradient.tis_cap
    """`tis` only. Upper bound of the truncated importance weight."""
    icepop_low: PositiveFloat = PolicyGradient.icepop_low
    """`icepop` only. Lower edge of the band. Weights below it become 0."""
    icepop_high: PositiveFloat = PolicyGradient.icepop_high
    """`icepop` only. Upper edge of the band. Weights above it become 0."""
    mask_below: float = PolicyGradient.mask_below
    """`mask` only. Probability difference p_trainer - p_sampler below which a token gets weight 0."""
    advantage_clip: PositiveFloat | None = PolicyGradient.advantage_clip
    """Clamp the log-ratio in the advantage to [-c, c], in nats. null = off (the paper)."""

    @classmethod
    def of(cls, factory: catalogue.Factory) -> PolicyGradientConfig:
        """Return the section's defaults for one objective."""
        return cls(**asdict(default(factory, "policy")))

    @property
    def constants(self) -> PolicyGradient:
        """The keys that the loss reads: all but `mini_batches` and `epochs`, which only the trainer reads."""
        return PolicyGradient(**self.model_dump(exclude={"mini_batches", "epochs"}))


@dataclass(frozen=True)
class BatchStatistic:
    """A per-token number that depends on other tokens; its function is in `objectives.parts.batch_statistics`."""

    name: str
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfTeaching:
    """How the student becomes its own teacher."""

    average_rate: float
    """Fraction of the difference to the student by which the teacher's weights move after each optimizer step"""
    template: str
    """Text that the teacher reads instead of the prompt, with {prompt} and {solution}"""


@dataclass(frozen=True)
class FullVocabularyDivergence:
    """A divergence over the whole vocabulary."""

    name: str
    """fkl, rkl or jsd"""
    beta: float
    """Weight of the teacher in the mixture, for jsd"""


@dataclass(frozen=True)
class Unused:
    """Keys that have no effect, and the setting that makes them so. Changing such a key is an error."""

    section: Section
    key: str
    """Dotted key of the section"""
    names: tuple[str, ...]
    because: str
    defaults: Section | None = None
    """Holds the defaults if they differ from those of the section's class"""


class Objective(Section):
    """Base of all kinds. A subclass defines its `kind`, its keys, and the traits below that differ from the default."""

    if TYPE_CHECKING:
        kind: str

    samples: ClassVar[bool] = True
    """Whether it learns from answers of the student, which a rollout server samples; otherwise from stored responses of
    the teacher"""
    reads_teacher: ClassVar[bool] = True
    """Whether it needs the teacher's scores"""
    learns_from_verifier: ClassVar[bool] = False
    """Whether it needs the verifier's verdict on every sample"""
    needs_teacher_entropy: ClassVar[bool] = False
    """Whether it needs the teacher's entropy over the whole vocabulary"""
    has_own_ratio: ClassVar[bool] = False
    """Whether it corrects for several updates by a ratio of its own, without policy_gradient.ratio"""
    clips_log_ratio: ClassVar[bool] = True
    """Whether its advantage is a log-ratio, which policy_gradient.advantage_clip clamps"""
    needs_old_logp: ClassVar[bool] = False
    """Whether it needs log p from before the update even with a single update"""
    teacher_topk_key: ClassVar[str] = "topk"
    """The key under `objective` that sets the number of teacher candidates per token"""

    @property
    def family(self) -> str:
        """Name of the class's module. The equations and the oracle are in modules of the same name."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def label(self) -> str:
        """A short name for people, in console and messages."""
        return self.kind

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The objectives of the run in order: several if it has phases, else this one alone."""
        return (self,)

    @property
    def teacher_topk(self) -> int:
        """Number of teacher candidates per token that are scored."""
        return int(self.topk)  # type: ignore[attr-defined]

    @property
    def student_candidates(self) -> int:
        """Number of student candidates per token; 0 if none are needed."""
        return int(getattr(self, "student_topk", 0))

    @property
    def policy(self) -> PolicyGradientConfig:
        """The section `policy_gradient`; if there is none, the defaults, which change nothing."""
        return PolicyGradientConfig()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.policy.mini_batches * self.policy.epochs

    @property
    def active_guidance(self) -> GuidanceConfig | None:
        """The section `guidance` if there is one and it is enabled, else None."""
        return None

    @property
    def reads_responses(self) -> bool:
        """Whether it needs data.teacher_responses, for guidance or as its only data."""
        return self.active_guidance is not None or not self.samples

    @property
    def has_prefix_loss(self) -> bool:
        """Whether tokens of a teacher prefix have a loss. Only then are they rows of the loss."""
        return False

    @property
    def compares_samples(self) -> bool:
        """Whether the samples of a prompt are compared, which needs at least two of them."""
        return False

    @property
    def counts_trained_only(self) -> bool:
        """Whether the denominator is the number of tokens that are trained."""
        return False

    @property
    def self_teaching(self) -> SelfTeaching | None:
        """Set if the teacher is an average of the student that reads a correct solution, else None."""
        return None

    @property
    def full_vocabulary_divergence(self) -> FullVocabularyDivergence | None:
        """Set if the loss is a divergence over the whole vocabulary, which needs the teacher's hidden states, else
        None."""
        return None

    @property
    def leaves_confident_mistakes(self) -> bool | None:
        """Whether it leaves a confident mistake in a number of steps that grows with its logarithm only; None = not
        known. docs/choosing.md derives it, tests/unit/test_one_state.py computes it."""
        return None

    @property
    def keeps_rare_mistakes(self) -> bool | None:
        """Whether a rare mistake fades only like the square root of time; None = not known."""
        return None

    @property
    def stores_scores(self) -> bool:
        """Whether the teacher's scores are kept on disk: not if they hold hidden states, if the teacher's weights
        change, or if there are none."""
        return self.full_vocabulary_divergence is None and self.self_teaching is None and self.reads_teacher

    @property
    def function_path(self) -> str | None:
        """Import path of a loss function outside this package, else None."""
        return None

    @property
    def needs_statistic(self) -> bool:
        """Whether the loss of a token depends on other tokens at any step of the run."""
        return self.statistic(0.0) is not None or self.statistic(1.0) is not None

    def statistic(self, progress: float) -> BatchStatistic | None:
        """Return the number that the loss of a token takes from other tokens at `progress` = step / run.steps."""
        return None

    def reference_folder(self, student: Path) -> Path | None:
        """Return the folder of the frozen reference model, by default `student`; None if there is no reference."""
        return None

    def constants(self, progress: float) -> dict[str, Any]:
        """Return the constants under the keywords of `objectives.catalogue`. Names unknown there are ignored."""
        keys = {name: getattr(self, name) for name in type(self).model_fields}
        return keys | {"policy": self.policy.constants}

    def description(self) -> str:
        """Return the constants in one line, for the plan of a run."""
        left_out = {"kind", "policy_gradient", "reference", "template"}
        values = self.model_dump(exclude=left_out, exclude_none=True)
        return ", ".join(f"{name} {_short(value)}" for name, value in values.items())

    def problems(self) -> Iterator[str]:
        """Yield one line for each setting of this section that would train nothing or the wrong thing."""
        yield from ()

    def unused(self) -> Iterator[Unused]:
        """Yield the keys that have no effect because of other keys."""
        yield from ()


class PolicyGradientObjective(Objective):
    """An objective with the section `policy_gradient`, whose defaults follow the objective's source.

    Each class gives them as the default of that field (docs/settings.md). A key that the configuration leaves out has
    the default of the objective, even if other keys of the section are given.
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

    @property
    def leaves_confident_mistakes(self) -> bool | None:
        """Not by a reward of the sampled token: its expected gradient has a factor p at every token."""
        return False

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
    """Return the message about a divergence that is always 0."""
    return (
        f"{key} = 1 with norm=renorm: renormalised on one token, student and teacher are equal and the divergence "
        f"is always 0; set {key} to 2 or more, or another norm"
    )
