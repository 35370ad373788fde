"""The only object that the trainer logs to.

This module computes no metrics (see `catalogue`). Invariant: it does something on rank 0 only, so its callers need no
branch.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tropd_mcore.config import hints
from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import TropdError
from tropd_mcore.files import writing
from tropd_mcore.logs import has_colour
from tropd_mcore.monitor.catalogue import compute_metrics
from tropd_mcore.monitor.console import Console
from tropd_mcore.monitor.jsonl import JsonLines
from tropd_mcore.monitor.record import StepRecord
from tropd_mcore.monitor.tensorboard import TensorBoard
from tropd_mcore.monitor.wandb import WeightsAndBiases
from tropd_mcore.types import HeldOutDistance

log = logging.getLogger(__name__)


class Sink(Protocol):
    """A destination of metrics. NaN means that there is no value."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""

    def close(self) -> None:
        """Finish and close whatever is open."""


class Monitor:
    """Writes each step to the console, to <run.dir>/metrics.jsonl, and to TensorBoard and W&B if configured.

    `start_step` is the first step of this launch. Metrics that an earlier launch logged for this step or later are
    dropped.
    """

    def __init__(self, config: Config, run_dir: Path, rank: int, start_step: int = 0) -> None:
        self._config = config
        self._sinks: list[Sink] = []
        if rank == 0:
            with writing(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            self._sinks = _sinks(config, run_dir, start_step)

    def log(self, step: int, record: StepRecord | None) -> Mapping[str, float]:
        """Compute, write and return all metrics of one step. `record` is None on ranks that write nothing, which get
        no metrics."""
        if not self._sinks:
            return {}
        assert record is not None, "rank 0 logs a record"
        metrics = compute_metrics(record)
        for sink in self._sinks:
            with writing(Path("standard output"), key="the redirection of the output"):
                sink.write(step, metrics)
        if record.held_out is not None:
            log.info("step %d: %s", step, described(record.held_out))
        if step == 0:
            for line in hints.of_first_step(metrics, phase_configs(self._config)[0]):
                log.warning("%s", line)
        return metrics

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            try:
                sink.close()
            except TropdError as error:  # too late to act on it, and another error may be in flight
                log.warning("%s", error)


def described(held_out: HeldOutDistance) -> str:
    """Return the measurement as text; without a teacher's scores only -log p."""
    where = f"{held_out.responses} held-out responses ({held_out.tokens:,} tokens)"
    if math.isnan(held_out.forward_kl):
        return f"{where}: -log p {held_out.nll:.4f} nats per token"
    left_out = f", without {held_out.unscored} tokens that the teacher did not score" if held_out.unscored else ""
    kl = f"KL(teacher || student) {held_out.forward_kl:.4f}{left_out}"
    return f"{where}: {kl}, -log p {held_out.nll:.4f} nats per token"


def _sinks(config: Config, run_dir: Path, start_step: int) -> list[Sink]:
    steps, stop_after = config.run.steps, config.run.stop_after
    last_step = steps if stop_after is None else min(steps, start_step + stop_after)
    labels = [part.label for part in config.objective.parts]
    phases = labels if len(labels) > 1 else []
    console = Console(sys.stdout, steps=steps, last_step=last_step, phases=phases, colour=has_colour(sys.stdout))
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", start_step), console]
    if config.monitor.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", start_step))
    if config.monitor.wandb_project is not None:
        sinks.append(WeightsAndBiases(config.monitor.wandb_project, run_dir, config.model_dump(mode="json")))
    return sinks
