"""The phase that a run is in: which objective trains the next step, and when the next phase begins.

The keys are in `config.phases`. Invariants: the state is part of every checkpoint, so a resumed run is in the phase in
which the checkpoint was written and ends it at the same step. The decision depends on the step and on reproducible
metrics only, is made once per step on rank 0, and is the same on all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd_mcore.config.phases import PhasesObjective, UntilConfig
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.checkpoint_info import read_info

if TYPE_CHECKING:
    from tropd_mcore.train.trainer import Components

EXTRA = "phase"
"""Name of the state in a checkpoint's JSON."""


@dataclass(frozen=True)
class PhaseState:
    """Where a run is."""

    index: int = 0
    """Place of the phase in objective.phases."""
    began: int = 0
    """Number of steps of the run that were done when it began."""
    met: int = 0
    """Number of steps in a row, up to the last one, whose `until.metric` was beyond its bound."""

    def after(self, done: int, metrics: Mapping[str, float], until: UntilConfig | None) -> PhaseState:
        """Return the state after the step that makes `done` steps in all; `metrics` are those of that step.

        A step whose metric has no value (NaN) neither counts nor interrupts the row.
        """
        if until is None:
            return self
        met = self.met
        if until.metric is not None:
            value = metrics.get(until.metric, float("nan"))
            if value == value:  # not NaN
                met = met + 1 if until.is_met_by(value) else 0
        by_metric = until.metric is not None and met >= until.consecutive
        by_step = until.step is not None and done >= until.step
        return PhaseState(self.index + 1, done) if by_metric or by_step else dataclasses.replace(self, met=met)


def resumed(config: Config, checkpoint: Path | None) -> PhaseState | None:
    """Return the state that `checkpoint` holds, or that of the beginning without one; None if the run has no phases.

    Raises ConfigError if the checkpoint was written in other phases, ModelError if it is damaged.
    """
    objective = config.objective
    if not isinstance(objective, PhasesObjective):
        return None
    if checkpoint is None:
        return PhaseState()
    info = read_info(checkpoint)
    saved = info.extra.get(EXTRA)
    names = list(objective.names)
    way_out = "restore objective.phases, or begin a new run with another run.dir and run.init_from"
    if saved is None:
        raise ConfigError(
            [f"{checkpoint}: written by a run without phases, found objective.phases of {', '.join(names)}; {way_out}"]
        )
    if saved["names"] != names:
        raise ConfigError(
            [
                f"{checkpoint}: written in phase {saved['index']} of {', '.join(saved['names'])}, found "
                f"objective.phases of {', '.join(names)}; {way_out}"
            ]
        )
    return PhaseState(saved["index"], saved["began"], saved["met"])


def remaining(config: Config, state: PhaseState | None) -> Config:
    """Return the configuration with the phases that are not over, which needs no more servers and models than they
    do."""
    objective = config.objective
    if state is None or not isinstance(objective, PhasesObjective):
        return config
    rest = objective.model_copy(update={"phases": objective.phases[state.index :]})
    return config.model_copy(update={"objective": rest})


class PhaseRun:
    """The phases of a run and the parts that the loop uses in each. `parts` are those of `state.index` and later."""

    def __init__(self, objective: PhasesObjective, state: PhaseState, parts: list[Components]) -> None:
        self.objective = objective
        self.state = state
        self._first = state.index
        self._parts = parts

    @property
    def parts(self) -> Components:
        """The parts of the present phase."""
        return self._parts[self.state.index - self._first]

    @property
    def name(self) -> str:
        """The present phase, for a message."""
        return f"phase {self.state.index} ({self.objective.names[self.state.index]})"

    @property
    def until(self) -> UntilConfig | None:
        """The end of the present phase."""
        return self.objective.ends[self.state.index]

    def extra(self) -> dict[str, Any]:
        """Return what a checkpoint records."""
        return {EXTRA: {**dataclasses.asdict(self.state), "names": list(self.objective.names)}}

    def unfinished(self, steps: int) -> str | None:
        """Return the message if the run is over, after `steps` steps, before its last phase had one; else None."""
        until, place, names = self.until, self.state.index, self.objective.names
        if self.state.began == steps:
            return (
                f"run.steps = {steps} are done just as {self.name} would begin, so no step was trained with "
                f"{', '.join(names[place:])}; raise run.steps, or change objective.phases.{place - 1}.until"
            )
        if until is None:
            return None
        return (
            f"run.steps = {steps} are done but {self.name}, which began after step {self.state.began}, has not ended "
            f"(until {until.description()}; {until.metric} was beyond the bound at the last {self.state.met} steps in "
            f"a row), so no step was trained with {', '.join(names[place + 1 :])}; raise run.steps, or change "
            f"objective.phases.{place}.until"
        )
