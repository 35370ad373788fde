"""Starts a new run from the weights of another run's checkpoint, with or without its optimizer state.

This module does not choose the checkpoint (`beginning`), resume a run (`job`) or read Hugging Face folders
(`student.path`). Invariants: only a run without a checkpoint starts from another run's. The schedule, the random
states and a self-teacher's average belong to the new run.
"""

from __future__ import annotations

import logging

from tropd_mcore.mcore.checkpoint import TrainState, load
from tropd_mcore.mcore.model import Model
from tropd_mcore.train.beginning import Source

log = logging.getLogger(__name__)


def begin_weights(source: Source, student: Model) -> None:
    """Fill the student. Call it before the optimizer is built, because the optimizer copies the weights. Collective."""
    load(source.path, TrainState(student), begin=True)
    _tell(source)


def begin_optimizer(source: Source, state: TrainState) -> None:
    """Fill student, main weights and moments. The schedule stays at its first step. Collective."""
    load(source.path, state, begin=True)
    _tell(source)


def _tell(source: Source) -> None:
    what = "weights and optimizer state" if source.record.with_optimizer else "weights"
    log.info("run.init_from: begins with the %s of %s, step %d", what, source.path, source.record.step)
