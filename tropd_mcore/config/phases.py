"""The keys of `objective.kind: phases`: other objectives one after the other, each with an end.

This module has no losses; each phase's objective has its own. Its checks are in `phase_checks`. Invariant: what the
whole run needs (servers, scores, responses) is what any of its phases needs. What only one objective can answer (its
constants, its guidance) is asked of the phase's configuration (`derived.phase_configs`), never here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Union

from pydantic import Field

from tropd_mcore.config.fields import PositiveInt, Section
from tropd_mcore.config.objectives import KINDS, ObjectiveConfig
from tropd_mcore.config.objectives.base import (
    BatchStatistic,
    FullVocabularyDivergence,
    Objective,
    PolicyGradientConfig,
)

if TYPE_CHECKING:
    from tropd_mcore.config.objectives.trust_region import GuidanceConfig


def without_phase(key: str) -> str:
    """Return a dotted key of a phase's objective as that of a run with this objective alone; other keys unchanged."""
    return re.sub(r"^objective\.phases\.(\d+\.)?(?=objective\.)", "", key)


class UntilConfig(Section):
    """The end of a phase. With `step` and `metric`, the phase ends at whichever comes first."""

    step: PositiveInt | None = None
    """End when this many steps of the run are done. null = no such end."""
    metric: str | None = None
    """End by this metric of metrics.jsonl. null = no such end. docs/objectives.md lists the metrics that can be
    used."""
    below: float | None = None
    """With `metric`: the value must be below this bound."""
    above: float | None = None
    """With `metric`: the value must be above this bound."""
    consecutive: PositiveInt = 1
    """With `metric`: number of steps in a row whose value must be beyond the bound. Steps without a value are left
    out."""

    def is_met_by(self, value: float) -> bool:
        """Return whether a value of the metric is beyond the bound; not if it is NaN."""
        return (self.below is not None and value < self.below) or (self.above is not None and value > self.above)

    def description(self) -> str:
        """Return the end in words."""
        ends = [f"{self.step} steps of the run are done"] if self.step is not None else []
        if self.metric is not None:
            bound = f"below {self.below:g}" if self.below is not None else f"above {self.above:g}"
            times = f" at {self.consecutive} steps in a row" if self.consecutive > 1 else ""
            ends.append(f"{self.metric} is {bound}{times}")
        return " or ".join(ends)


class PhaseConfig(Section):
    """One phase."""

    objective: ObjectiveConfig
    """The phase's objective: `kind` and keys as in a run with this objective alone."""
    until: UntilConfig | None = None
    """The phase's end; the last phase has none."""


class PhasesObjective(Objective):
    """Objectives in phases. A phase begins with the weights and the optimizer state that the previous one left."""

    kind: Literal["phases"] = "phases"
    phases: tuple[PhaseConfig, ...] = ()
    """Two or more phases in order. Each has `objective`, a section with a `kind` and its keys, and all but the last
    have `until`. The last phase runs to run.steps."""

    @property
    def parts(self) -> tuple[Objective, ...]:
        return tuple(phase.objective for phase in self.phases)

    @property
    def ends(self) -> tuple[UntilConfig | None, ...]:
        """The end of each phase."""
        return tuple(phase.until for phase in self.phases)

    @property
    def names(self) -> tuple[str, ...]:
        """The label of each phase's objective."""
        return tuple(part.label for part in self.parts)

    @property
    def samples(self) -> bool:  # type: ignore[override]
        return any(part.samples for part in self.parts)

    @property
    def reads_teacher(self) -> bool:  # type: ignore[override]
        return any(part.reads_teacher for part in self.parts)

    @property
    def learns_from_verifier(self) -> bool:  # type: ignore[override]
        return any(part.learns_from_verifier for part in self.parts)

    @property
    def reads_responses(self) -> bool:
        return any(part.reads_responses for part in self.parts)

    @property
    def stores_scores(self) -> bool:
        return any(part.stores_scores for part in self.parts)

    @property
    def updates_per_step(self) -> int:
        """The most optimizer steps per rollout batch that a phase makes."""
        return max((part.updates_per_step for part in self.parts), default=1)

    def reference_folder(self, student: Path) -> Path | None:
        """Return the reference of the first phase that has one; the others have the same (`phase_checks`)."""
        folders = (part.reference_folder(student) for part in self.parts)
        return next((folder for folder in folders if folder is not None), None)

    def description(self) -> str:
        found = []
        for number, phase in enumerate(self.phases):
            end = f"until {phase.until.description()}" if phase.until is not None else "to the end"
            found.append(f"{number} {phase.objective.label} {end}")
        return ", then ".join(found)

    @property
    def teacher_topk(self) -> int:
        _ask_a_phase()

    @property
    def student_candidates(self) -> int:
        _ask_a_phase()

    @property
    def has_prefix_loss(self) -> bool:
        _ask_a_phase()

    @property
    def full_vocabulary_divergence(self) -> FullVocabularyDivergence | None:
        _ask_a_phase()

    @property
    def policy(self) -> PolicyGradientConfig:
        _ask_a_phase()

    @property
    def active_guidance(self) -> GuidanceConfig | None:
        _ask_a_phase()

    def statistic(self, progress: float) -> BatchStatistic | None:
        _ask_a_phase()

    def constants(self, progress: float) -> dict[str, Any]:
        _ask_a_phase()

    def problems(self) -> Iterator[str]:
        if len(self.phases) < 2:
            yield (
                f"objective.phases: expected two or more phases, found {len(self.phases)}; add phases, or give a "
                "single objective in the section objective itself"
            )


def _ask_a_phase() -> NoReturn:
    raise AssertionError("this depends on the phase; ask the configurations of `derived.phase_configs`")


if TYPE_CHECKING:
    RunObjective = Objective
else:
    RunObjective = Annotated[Union[*KINDS.values(), PhasesObjective], Field(discriminator="kind")]
