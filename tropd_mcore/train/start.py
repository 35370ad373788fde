"""Where a launch starts: its first step, what it goes on with, whether it is the same run as before, and its record.

Not for what the comparison says (`resume`) or for making parts (`job`). Invariants: records are replaced by `accept`
alone, after everything that can refuse the launch; all ranks have the same start.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.config.record import Change
from tropd_mcore.mcore.checkpoint_info import INFO_FILE, latest, without_info
from tropd_mcore.mcore.collective import on_rank_zero, shared_fate
from tropd_mcore.train.init_from import Source, find_source
from tropd_mcore.train.inputs import Inputs, load_inputs, read_inputs, save_inputs
from tropd_mcore.train.parts import Site
from tropd_mcore.train.replayed_run import check_replayed
from tropd_mcore.train.resume import Before, check_config, check_inputs, read_before

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A launch whose configuration may go on in its run directory; contents were not compared yet."""

    first_step: int
    """Steps that are done."""
    checkpoint: Path | None
    """The newest one of this run; None before the first."""
    source: Source | None
    """The checkpoint that the run begins from, where it has none of its own yet."""
    before: Before
    by_content: list[Change]
    """Changed paths, which may go on where the content is the same."""


@dataclass(frozen=True)
class Start:
    """What the parts of a launch need to know of it."""

    first_step: int
    checkpoint: Path | None
    source: Source | None
    inputs: Inputs
    resolved: str
    """The configuration, with the source of each value"""
    run: str
    """The name of the run, which its checkpoints carry"""


def open_launch(site: Site) -> Opened:
    """Compare the configuration with the recorded one. Collective; raises ConfigError as `check_config` does."""

    def opened() -> tuple[Path | None, Before, list[Change]]:
        for path in without_info(site.run_dir.checkpoints):
            log.warning("%s has no %s and is left out; it is damaged", path, INFO_FILE)
        checkpoint = latest(site.run_dir.checkpoints)
        before = read_before(site.run_dir, checkpoint)
        return checkpoint, before, check_config(before, site.config)

    checkpoint, before, by_content = on_rank_zero(opened, site.layout.groups.control)
    first_step = int(checkpoint.name.removeprefix("step_")) if checkpoint is not None else 0
    if first_step > site.config.run.steps:
        log.warning("run.steps = %d but %d steps are done: nothing is left to train", site.config.run.steps, first_step)
    source = find_source(site) if checkpoint is None else None
    return Opened(first_step, checkpoint, source, before, by_content)


def compare_contents(site: Site, opened: Opened, sources: Mapping[str, str]) -> Start:
    """Compare what the launch reads with what the launches before read. Collective; raises as `check_inputs` does."""
    inputs = read_inputs(site)
    source = opened.source

    def compared() -> Inputs:
        recorded = load_inputs(site.run_dir)
        begun_from = source.record if source is not None else None
        if opened.checkpoint is not None and recorded is not None:
            begun_from = recorded.init_from
        now = inputs.model_copy(update={"init_from": begun_from})
        check_inputs(opened.before, recorded, now, opened.by_content, site.config)
        check_replayed(site.config, now)
        return now

    now = on_rank_zero(compared, site.layout.groups.control)
    run = on_rank_zero(lambda: site.run_dir.recorded_id() or uuid.uuid4().hex[:12], site.layout.groups.control)
    return Start(opened.first_step, opened.checkpoint, source, now, resolved_yaml(site.config, sources), run)


def accept(site: Site, start: Start, day: date) -> None:
    """Record the launch as the one that the next is compared with. Collective; raises DataError on a full disk.

    `day` is the one that the prompts were rendered with; later launches keep it where the configuration sets none.
    """
    with shared_fate(site.layout.groups.control):
        if site.layout.rank == 0:
            save_inputs(site.run_dir, start.inputs)
            site.run_dir.record_id(start.run)
            if site.config.data.template_date is None:
                site.run_dir.record_template_date(day)
            site.run_dir.record_config(start.resolved)
