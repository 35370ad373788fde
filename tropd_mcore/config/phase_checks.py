"""Checks of `objective.kind: phases`: ends that can never come, and what one run cannot have in several phases.

Problems of a phase's objective are found by the checks of every objective, which `of_each_phase` runs once per phase.
Invariant: each problem is one line with the key to change. Nothing is raised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.phase_metrics import PHASE_METRICS, near
from tropd_mcore.config.phases import PhasesObjective, UntilConfig
from tropd_mcore.config.schema import Config

Check = Callable[[Config], Iterable[str]]


def in_phase(problem: str, number: int) -> str:
    """Return a problem of a phase's objective with the keys that the phase has in the whole configuration."""
    key = f"objective.phases.{number}"
    placed = re.sub(r"\bobjective\.(?!phases\b)(?=\w)", f"{key}.objective.", problem)
    return placed if placed != problem else f"{key}: {problem}"


def of_each_phase(check: Check) -> Check:
    """Return `check` run on the configuration of each phase; on the configuration itself if it has no phases."""

    def run(config: Config) -> Iterator[str]:
        phases = phase_configs(config)
        if phases == [config]:
            yield from check(config)
            return
        for number, phase in enumerate(phases):
            yield from (in_phase(problem, number) for problem in check(phase))

    return run


def phases_problems(config: Config) -> Iterator[str]:
    """Yield the problems of the list of phases and of their ends."""
    objective = config.objective
    if not isinstance(objective, PhasesObjective):
        return
    yield from objective.problems()
    if len(objective.phases) < 2:
        return
    yield from _missing_ends(objective)
    for number, (phase, until) in enumerate(zip(phase_configs(config), objective.ends, strict=True)):
        if until is not None and number < len(objective.phases) - 1:
            asked = any(part.reads_teacher for part in objective.parts[number:])
            yield from _own_problems(until, phase, f"objective.phases.{number}.until", asked=asked)
    yield from _places(config, objective)
    yield from _one_of_each(config, objective)


def _missing_ends(objective: PhasesObjective) -> Iterator[str]:
    last = len(objective.ends) - 1
    for number, until in enumerate(objective.ends):
        key = f"objective.phases.{number}.until"
        if number == last and until is not None:
            yield f"{key}: the last phase runs to run.steps and has no end of its own; remove the key"
        if number < last and until is None:
            yield f"{key} is missing: the phase would never end; set step, or metric with below or above"


def _own_problems(until: UntilConfig, phase: Config, key: str, *, asked: bool) -> Iterator[str]:
    """Yield the problems of one end that its neighbours have no part in."""
    bounds = {name: getattr(until, name) for name in ("below", "above") if getattr(until, name) is not None}
    if until.metric is None:
        given = [*bounds, *(["consecutive"] if until.consecutive > 1 else [])]
        if given:
            yield f"{key}.{given[0]} needs {key}.metric, which is not set; name the metric, or remove {given[0]}"
        elif until.step is None:
            yield f"{key} is empty: the phase would never end; set step, or metric with below or above"
        return
    if until.metric not in PHASE_METRICS:
        yield f"{key}.metric: no metric that can end a phase, found {until.metric!r}; {near(until.metric)}"
        return
    if len(bounds) != 1:
        found = "both" if bounds else "none"
        yield f"{key}: expected one bound of {until.metric}, below or above, found {found}; give one"
        return
    metric = PHASE_METRICS[until.metric]
    if (lack := metric.lack(phase, asked)) is not None:
        yield f"{key}.metric: {until.metric} {lack}, so the phase would never end by it; choose another metric or step"
        return
    ((name, bound),) = bounds.items()
    at_lowest, at_highest = until.is_met_by(metric.lowest), until.is_met_by(metric.highest)
    if at_lowest == at_highest:  # all values are on one side of the bound
        low, high = (f"{value:g}" for value in (metric.lowest, metric.highest))
        yield (
            f"{key}.{name} = {bound:g} with metric {until.metric}, whose values are from {low} to {high}: the value "
            f"would {'always' if at_lowest else 'never'} be {name} the bound; choose a bound between the two"
        )


def _places(config: Config, objective: PhasesObjective) -> Iterator[str]:
    """Yield the problems of ends that leave their own phase, or a later one, without a step."""
    count, total = len(objective.phases), config.run.steps
    earliest, latest = 0, 0  # bounds on the step at which the phase begins
    unbounded: int | None = None  # an earlier phase that may run to the end of the run
    for number, until in enumerate(objective.ends[:-1]):
        if until is None or (until.step is None and until.metric is None):
            return  # reported above
        key, after = f"objective.phases.{number}.until", count - 1 - number
        if until.step is not None and until.step > total - after:
            yield (
                f"{key}.step = {until.step} leaves {max(total - until.step, 0)} of run.steps = {total} for the "
                f"{after} phases after it; lower it to {total - after} or less, or raise run.steps"
            )
            return
        if until.step is not None and unbounded is not None:
            yield (
                f"{key}.step = {until.step} may pass before the phase begins, because objective.phases.{unbounded} "
                f"ends by a metric alone; set objective.phases.{unbounded}.until.step to less than {until.step}"
            )
            return
        if until.step is not None and until.step <= latest:
            yield (
                f"{key}.step = {until.step} is not after the {latest} steps at which the phase begins at the latest, "
                f"so it could be left without a step; raise it (steps are counted from the start of the run)"
            )
            return
        room = (until.step if until.step is not None else total - after) - earliest
        every = PHASE_METRICS[until.metric].every(config) if until.metric in PHASE_METRICS else 1
        if until.metric is not None and until.consecutive > math.ceil(room / every):
            measured = f", and {until.metric} is measured at every {every}th step" if every > 1 else ""
            yield (
                f"{key}.consecutive = {until.consecutive} steps in a row do not fit into the {room} steps that the "
                f"phase has at most{measured}, so its metric would never end it; lower it"
            )
            return
        by_metric = earliest + until.consecutive if until.metric is not None else total
        earliest = min(by_metric, until.step if until.step is not None else total)
        if until.step is None:
            unbounded = number
        else:
            latest = until.step


def _one_of_each(config: Config, objective: PhasesObjective) -> Iterator[str]:
    """Yield what the phases want differently and the run has once."""
    references: dict[Path, int] = {}
    for number, part in enumerate(objective.parts):
        if part.self_teaching is not None:
            yield (
                f"objective.phases.{number}.objective.kind={part.kind}: the student teaches itself, and the average of "
                "its weights would have to begin with the phase, which is not supported; run it as a run of its own "
                "from a checkpoint (run.init_from)"
            )
        if (folder := part.reference_folder(config.student.path)) is not None:
            references.setdefault(folder, number)
    if len(references) > 1:
        (one, first), (other, second) = list(references.items())[:2]
        yield (
            f"objective.phases.{second}.objective.reference={other} differs from that of phase {first}, {one}; a run "
            "has one reference model: name the same folder in both"
        )
    updates = [part.updates_per_step for part in objective.parts]
    if len(set(updates)) > 1 and config.optimizer.schedule != "constant":
        yield (
            f"optimizer.schedule={config.optimizer.schedule} needs the number of optimizer steps of the run, and "
            f"objective.phases make {', '.join(map(str, updates))} of them per step; set schedule=constant, or the "
            "same mini_batches * epochs in each phase"
        )
