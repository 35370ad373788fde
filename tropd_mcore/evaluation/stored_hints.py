"""The hints that a stored run gives: the lines that the run and `tropd eval` printed, or would print today.

This module has no rules (see `config.hints`). Invariant: a hint follows from stored numbers and from the configuration
that the run was made with.
"""

from __future__ import annotations

from pathlib import Path

from tropd_mcore.config.derived import phase_configs
from tropd_mcore.config.hints import of_evaluation, of_first_step
from tropd_mcore.config.record import read_record
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.evaluation.evaluation_view import trained
from tropd_mcore.evaluation.run_records import RunRecords, read_run


def hints_of_run(run_dir: Path) -> list[str]:
    """Return the hints of a run directory, each in one line; empty if there are none.

    Raises DataError if there is no run, or if its configuration cannot be read by this release.
    """
    return hints_of(read_run(run_dir, token_steps=0))


def hints_of(run: RunRecords) -> list[str]:
    """Return the hints of a run that was read: of its first step, then of the evaluation of the trained student.

    Raises DataError if the run has numbers to judge and no configuration that this release can read.
    """
    first, after = run.at_step(0), trained(run)
    sampled = after is not None and after.sampled is not None
    if first is None and not sampled:
        return []
    phases = phase_configs(_config(run))
    found = list(of_first_step(first, phases[0])) if first is not None else []
    if after is not None and after.sampled is not None:
        found += of_evaluation(after.greedy.accuracy, after.sampled.accuracy, phases[-1])
    return found


def _config(run: RunRecords) -> Config:
    """The configuration of the run, without keys that this release does not have."""
    path = run.root / "config.resolved.yaml"
    if not run.config_text:
        raise DataError(f"{path}: not found, so it is unknown what the run trained, and its hints are left out")
    try:
        config = read_record(run.config_text, str(path)).config
    except ConfigError as error:
        reason = error.problems[0].partition(" (the record of")[0]
        raise DataError(f"{reason}; this release cannot read it, so the hints of the run are left out") from error
    assert config is not None, "a record that was read has its configuration"
    return config
