"""The start of a launch: its first step, its checkpoint, the comparison with earlier launches, and the new record.

This module does not judge the comparison (`resume`) or build parts (`job`). Invariants: only `accept` replaces records,
after everything that can refuse the launch. All ranks have the same start.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.record import Change
from tropd_mcore.mcore.checkpoint_info import INFO_FILE, latest, without_info
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks
from tropd_mcore.train.beginning import Source, find_source
from tropd_mcore.train.ground import Ground
from tropd_mcore.train.inputs import Inputs, load_inputs, save_inputs
from tropd_mcore.train.phases import PhaseState, resumed
from tropd_mcore.train.resume import Before, check_config, check_inputs, read_before

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A launch whose configuration may continue in its run directory. Contents were not compared yet."""

    first_step: int
    """Number of steps that are done."""
    checkpoint: Path | None
    """The newest checkpoint of this run; None before the first."""
    source: Source | None
    """The checkpoint of another run that this run starts from; None once it has its own, or without run.init_from."""
    before: Before
    by_content: list[Change]
    """Changed paths, which are allowed if the content is the same."""
    phase: PhaseState | None = None
    """The phase in which the run continues; None if it has no phases."""


@dataclass(frozen=True)
class Start:
    """Information about a launch that its parts need."""

    first_step: int
    checkpoint: Path | None
    source: Source | None
    inputs: Inputs
    resolved: str
    """The configuration as YAML, with the source of each value."""
    run: str
    """Name of the run, which is stored in its checkpoints."""
    phase: PhaseState | None = None
    """The phase in which the run continues; None if it has no phases."""


def open_launch(ground: Ground) -> Opened:
    """Find where a launch continues, and compare its configuration with the recorded one.

    Raises ConfigError as `check_config` and `phases.resumed` do, and errors of `find_source` if the run starts from
    another checkpoint.
    """
    config, run_dir = ground.config, ground.run_dir
    for path in without_info(run_dir.checkpoints):
        log.warning("%s has no %s and is left out; it is damaged", path, INFO_FILE)
    checkpoint = latest(run_dir.checkpoints)
    before = read_before(run_dir, checkpoint)
    by_content = check_config(before, config)
    first_step = int(checkpoint.name.removeprefix("step_")) if checkpoint is not None else 0
    if first_step > config.run.steps:
        log.warning("run.steps = %d but %d steps are done: nothing is left to train", config.run.steps, first_step)
    source = find_source(ground) if checkpoint is None else None
    return Opened(first_step, checkpoint, source, before, by_content, resumed(config, checkpoint))


def compare_contents(ground: Ground, opened: Opened, inputs: Inputs) -> Inputs:
    """Compare the inputs of the launch with the recorded ones; returns them, with the checkpoint of run.init_from.

    Raises ConfigError as `check_inputs` does.
    """
    recorded, source = load_inputs(ground.run_dir), opened.source
    begun_from = source.record if source is not None else None
    if opened.checkpoint is not None and recorded is not None:
        begun_from = recorded.init_from
    now = inputs.model_copy(update={"init_from": begun_from})
    check_inputs(opened.before, recorded, now, opened.by_content, ground.config)
    return now


def make_start(context: JobContext, opened: Opened, inputs: Inputs, sources: Mapping[str, str]) -> Start:
    """Return the information that the parts of a launch need; `inputs` have been compared. Collective."""
    run = on_rank_zero(lambda: context.run_dir.recorded_id() or uuid.uuid4().hex[:12], context.layout.groups.control)
    resolved = resolved_yaml(context.config, sources)
    return Start(opened.first_step, opened.checkpoint, opened.source, inputs, resolved, run, opened.phase)


def accept(context: JobContext, start: Start, day: date) -> None:
    """Record the launch, so the next launch is compared with it. Collective; raises DataError on a full disk.

    `day` is the date that the prompts were rendered with. Later launches keep it if the configuration sets none.
    """
    with raise_on_all_ranks(context.layout.groups.control):
        if context.layout.rank == 0:
            save_inputs(context.run_dir, start.inputs)
            context.run_dir.record_id(start.run)
            if context.config.data.template_date is None:
                context.run_dir.record_template_date(day)
            context.run_dir.record_config(start.resolved)
