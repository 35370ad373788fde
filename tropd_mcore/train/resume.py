"""Checks that a launch continues the same run as the previous launch. Changes are printed, or refused with advice.

This module does not decide which keys may change (`train.resume_rules`) and does not compute digests (`train.inputs`).
Invariants: every visible difference is printed or refused. A refused launch leaves the records unchanged. If nothing
was sampled or trained yet, nothing is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tropd_mcore.config.explain import of_teacher
from tropd_mcore.config.loader import leaves
from tropd_mcore.config.phases import without_phase
from tropd_mcore.config.record import NOTHING, Change, compare, read_record, show
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.inputs import DataInput, Inputs, ModelInput
from tropd_mcore.train.resume_rules import Rule, free, refused, rule_of
from tropd_mcore.weights.digest import short

log = logging.getLogger(__name__)

PRECISION_KEYS = frozenset({"teacher.kind", "teacher.dtype", "teacher.server.dtype"})
"""Keys that together determine the dtype of a teacher's computation; an entry of `teachers` has the same."""


@dataclass(frozen=True)
class Before:
    """Information about the launches before this one."""

    root: Path
    begun: bool
    """Whether there is anything that this launch would continue."""
    checkpoint: Path | None
    """The newest checkpoint; None before the first."""
    values: Mapping[str, Any] | None
    """{dotted key: value} of the last accepted launch; None if there is no record."""
    template_date: date | None = None
    """Recorded date that chat templates print if the configuration sets none; None if none is recorded."""

    @property
    def way_out(self) -> str:
        """Advice for a refused change."""
        if self.checkpoint is None:
            return "restore the recorded values, or begin a new run with another run.dir"
        return (
            "restore the recorded values, or begin a new run with the new ones: another run.dir and "
            f"run.init_from={self.checkpoint} (run.init_optimizer=true keeps the optimizer's state)"
        )


def read_before(run_dir: RunDir, checkpoint: Path | None) -> Before:
    """Read the record of the previous launch. Raises ConfigError or DataError if it is damaged."""
    text, begun = run_dir.recorded_config(), run_dir.has_begun()
    values = None
    if text is not None:
        record = read_record(text, str(run_dir.config))
        values = record.values
        for key in record.unknown:
            log.warning("%s: %s is a key of another version, so it was not compared", run_dir.config, key)
    elif begun:
        log.warning("%s is missing, so changes made by this launch cannot be detected", run_dir.config)
    return Before(run_dir.root, begun, checkpoint, values, run_dir.recorded_template_date())


def check_config(before: Before, config: Config) -> list[Change]:
    """Print the allowed changes; returns the changed paths, which `check_inputs` judges by content.

    Raises ConfigError that names every key that may not change, with the reason and advice.
    """
    if before.values is None:
        return []
    changes = compare(before.values, leaves(config))
    if not before.begun:
        _print(before, [f"{change} (nothing was trained yet)" for change in changes])
        return []
    printed, problems, by_content = [], [], []
    for change in changes:
        rule = _decided(change, before, config)
        if rule.kind == "content":
            by_content.append(change)
        elif rule.kind == "refused":
            problems.append(f"{change} is refused: {rule.reason}")
        else:
            printed.append(f"{change} ({rule.reason})" if rule.reason else str(change))
    if problems:
        problems += [f"{change} was not checked; it is allowed if the content is the same" for change in by_content]
        raise ConfigError([*problems, _conclusion(before)])
    _print(before, printed)
    return by_content


def _decided(change: Change, before: Before, config: Config) -> Rule:
    """Return the rule of the changed key as free, refused or content; other keys and the run decide the rest."""
    rule = rule_of(change.key)
    assert rule is not None, f"{change.key} has no rule"
    if _names_the_day(change, before):
        return free("the day that this run has printed so far")
    if of_teacher(change.key) in PRECISION_KEYS and before.values is not None:
        section = change.key.removesuffix(of_teacher(change.key).removeprefix("teacher"))
        old, new = _teacher_dtype(section, before.values), _teacher_dtype(section, leaves(config))
        if old != new:
            return refused(f"another rounding of the teacher, {old} -> {new}, is another teacher")
        return rule if rule.kind == "free" else free(f"the teacher computes in {new} as before")
    if rule.kind == "verdicts":
        return refused(rule.reason) if config.objective.learns_from_verifier else free()
    if rule.kind == "beginning":
        return free() if before.checkpoint is not None and _is_taken_back(change) else refused(rule.reason)
    return rule


def _teacher_dtype(section: str, values: Mapping[str, Any]) -> Any:
    """Return the dtype in which the teacher of `section` computes (`TeacherSection.computes_in`), for these values."""
    served = values.get(f"{section}.server.dtype") if values.get(f"{section}.kind") == "sglang" else None
    return served or values.get(f"{section}.dtype")


def check_inputs(
    before: Before, recorded: Inputs | None, now: Inputs, by_content: list[Change], config: Config
) -> None:
    """Print moved inputs and other differences; `by_content` are the changes of paths.

    Raises ConfigError that names every input whose content changed, with the reason and advice.
    """
    if not before.begun:
        return
    if recorded is None and before.values is not None:
        _print(before, ["earlier launches recorded no inputs, so contents were not compared; this launch records them"])
    renamed = {without_phase(change.key): change for change in by_content}
    printed, problems = [], []
    for key in sorted({*now.models, *now.data, *renamed}):
        difference = _difference(key, recorded, now)
        what = renamed.get(key) or f"{key}: {_path(key, now)}"
        if difference is None:
            printed += [f"{renamed[key]} (moved, the same content)"] if key in renamed else []
        elif _is_unused(key, now, config):
            printed.append(f"{what} ({difference}; not used by this objective)")
        elif recorded is not None or key in renamed:
            rule = rule_of(key)
            assert rule is not None and rule.kind == "content", f"{key} is no path whose content is compared"
            problems.append(f"{what}: {difference}; refused: {rule.reason}")
    problems += _other_beginning(before, recorded, now)
    if problems:
        raise ConfigError([*problems, _conclusion(before)])
    _print(before, [*printed, *_surroundings(recorded, now)])


def _path(key: str, now: Inputs) -> str:
    found = now.models.get(key) or now.data.get(key)
    return str(found.path) if found is not None else "none"


def _is_unused(key: str, now: Inputs, config: Config) -> bool:
    if key == "data.teacher_responses":
        return not config.objective.reads_responses
    return key not in now.models and key not in now.data


def _other_beginning(before: Before, recorded: Inputs | None, now: Inputs) -> Iterator[str]:
    """Yield a problem if run.init_from has new content before the run has a checkpoint of its own."""
    if before.checkpoint is not None or recorded is None or recorded.init_from is None or now.init_from is None:
        return
    old, new = recorded.init_from, now.init_from
    if old.sha256 != new.sha256:
        yield f"run.init_from: {new.path}: content changed, sha256 {short(old.sha256)} -> {short(new.sha256)}"


def _is_taken_back(change: Change) -> bool:
    """Return whether run.init_from was only removed, which later launches may do. Other keys always pass."""
    return change.key != "run.init_from" or change.new in (None, NOTHING)


def _names_the_day(change: Change, before: Before) -> bool:
    """Return whether data.template_date was only set to the date that the run already uses."""
    return (
        change.key == "data.template_date"
        and change.old is None
        and before.template_date is not None
        and change.new == before.template_date.isoformat()
    )


def _conclusion(before: Before) -> str:
    return f"{before.root} was begun with other values than these; {before.way_out}"


def _print(before: Before, lines: list[str]) -> None:
    for line in lines:
        log.warning("%s: %s", before.root, line)


def _difference(key: str, recorded: Inputs | None, now: Inputs) -> str | None:
    """Return how the content behind the path of `key` differs from the record; None if it is the same."""
    old_model, new_model = recorded.models.get(key) if recorded is not None else None, now.models.get(key)
    if old_model is not None and new_model is not None:
        return _model_difference(old_model, new_model)
    old, new = recorded.data.get(key) if recorded is not None else None, now.data.get(key)
    if old is not None and new is not None:
        return _data_difference(old, new)
    if new_model is not None or new is not None:
        return "no content was recorded before"
    return "no longer read"


def _data_difference(old: DataInput, new: DataInput) -> str | None:
    if old.sha256 == new.sha256:
        return None
    return (
        f"content changed, sha256 {short(old.sha256)} -> {short(new.sha256)} ({old.lines} lines -> {new.lines} lines)"
    )


def _model_difference(old: ModelInput, new: ModelInput) -> str | None:
    changes = old.digest.changes(new.digest)
    return f"content changed, {changes}" if changes is not None else None


def _surroundings(recorded: Inputs | None, now: Inputs) -> Iterator[str]:
    """Yield changed versions, numbers of ranks and code. They are printed, never refused."""
    if recorded is None:
        return
    for name in sorted({*recorded.launch, *now.launch}):
        old, new = recorded.launch.get(name), now.launch.get(name)
        if old != new:
            yield f"{name}: {show(old)} -> {show(new)}"
    for key in sorted({*recorded.code, *now.code}):
        old, new = recorded.code.get(key), now.code.get(key)
        if old != new:
            yield f"{key}: its source file changed, sha256 {short(old)} -> {short(new)}"
