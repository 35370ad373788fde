"""Reads the files of a run directory for the report: metrics, evaluations, token values, configuration.

This module does not read training state (checkpoints, scores) and does not choose what is shown. Invariants: a missing
part is empty or None, never an error. A damaged part is a DataError. A run that is still going can be read.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tropd_mcore.errors import DataError, first_line
from tropd_mcore.evaluation.evaluate import EvaluationResult, load_result
from tropd_mcore.files import read_step_lines
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.records.token_file import VERDICTS
from tropd_mcore.types import Rollout, TokenTable

_COLUMNS = ("sample_index", "token_index", "on", "off", "trusted", "log_ratio", "old_logp", "teacher_logp")
_VERDICTS: dict[int, bool | None] = {1: True, 0: False, -1: None}


@dataclass(frozen=True)
class StepTokens:
    """The saved token values of one step, and its rollouts. `sample_index` is an index into `rollouts`."""

    step: int
    table: TokenTable
    rollouts: list[Rollout]
    verdicts: list[bool | None] | None = None
    """One per rollout, None if it was not judged. The whole list is None if the file has no verdicts"""

    @property
    def kept(self) -> list[int]:
        """Samples with token values, ascending."""
        return [int(sample) for sample in np.unique(self.table["sample_index"])]


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of a run (objective.phases) that has at least one logged step."""

    index: int
    name: str
    """Its objective"""
    first: int
    last: int
    """Its first and last logged step"""


@dataclass(frozen=True)
class RunRecords:
    """All data of one run that the report shows."""

    root: Path
    name: str
    """Name of the run on the page"""
    metrics: list[dict[str, Any]]
    """One object per step: `step` and {metric name: value or None}"""
    settings: Mapping[str, Any]
    """{dotted key: value} of config.resolved.yaml"""
    config_text: str
    evaluations: list[EvaluationResult]
    tokens: list[StepTokens] = field(default_factory=list)
    steps_with_tokens: int = 0
    """Number of steps that have both token values and rollouts; `tokens` holds some of them"""

    @cached_property
    def steps(self) -> list[int]:
        return [int(line["step"]) for line in self.metrics]

    @cached_property
    def metric_names(self) -> list[str]:
        """All metrics of any step, in the order of the file."""
        return [name for name in dict.fromkeys(name for line in self.metrics for name in line) if name != "step"]

    def series(self, name: str) -> list[float | None]:
        """Return one metric over the steps. Values that are not finite numbers are None."""
        return [_number(line.get(name)) for line in self.metrics]

    def at_step(self, step: int) -> dict[str, float] | None:
        """Return the metrics of one step that have a finite value; None if the step is not logged."""
        if step not in self.steps:
            return None
        numbers = ((name, _number(value)) for name, value in self.metrics[self.steps.index(step)].items())
        return {name: number for name, number in numbers if number is not None and name != "step"}

    @cached_property
    def teachers(self) -> list[tuple[str, str]]:
        """(name on the page, setting that names its folder) of each teacher."""
        named = [key for key in self.settings if key.startswith("teachers.") and key.split(".")[2:] == ["path"]]
        return [(f"teacher {key.split('.')[1]}", key) for key in named] or [("teacher", "teacher.path")]

    @cached_property
    def phase_names(self) -> list[str]:
        """The objective of each phase in the configuration, with its divergence if it has one; [] without phases."""
        names: list[str] = []
        while (kind := self.settings.get(f"objective.phases.{len(names)}.objective.kind")) is not None:
            divergence = self.settings.get(f"objective.phases.{len(names)}.objective.divergence")
            names.append(f"{kind} {divergence}" if divergence else str(kind))
        return names

    @cached_property
    def training_phases(self) -> list[TrainingPhase]:
        """The phases with logged steps, in order; [] without phases."""
        found: dict[int, list[int]] = {}
        for step, index in zip(self.steps, self.series("phase/index"), strict=True):
            if index is not None:
                found.setdefault(int(index), []).append(step)
        names = dict(enumerate(self.phase_names))
        return [
            TrainingPhase(index, names.get(index, "unknown"), steps[0], steps[-1])
            for index, steps in sorted(found.items())
        ]

    @cached_property
    def launch_folder(self) -> Path | None:
        """The folder from which relative paths of the configuration start, derived from the run directory's place.

        None if it cannot be derived: run.dir was absolute, or the run directory was moved alone.
        """
        named = self.settings.get("run.dir")
        if not isinstance(named, str) or Path(named).is_absolute() or ".." in Path(named).parts:
            return None
        parts, here = Path(named).parts, self.root.resolve()
        return Path(*here.parts[: -len(parts)]) if parts and here.parts[-len(parts) :] == parts else None

    def places(self, key: str) -> list[Path]:
        """Return the possible places of a setting's path, the likeliest first; [] if the setting is not a path."""
        named = self.settings.get(key)
        if not isinstance(named, str):
            return []
        if Path(named).is_absolute():
            return [Path(named)]
        folders = [self.launch_folder, Path.cwd(), self.root]
        return list(dict.fromkeys(folder / named for folder in folders if folder is not None))


def read_run(run_dir: Path, *, token_steps: int, name: str | None = None) -> RunRecords:
    """Read `run_dir`, with token values of at most `token_steps` steps, evenly spread from the first to the last.

    `name` is the run's name on the page; None = the folder's name. Raises DataError if there is no run, or if one of
    its files is damaged.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: expected the run directory (run.dir) of a training run, found no folder")
    config, metrics = run_dir / "config.resolved.yaml", run_dir / "metrics.jsonl"
    evaluations = evaluation_files(run_dir)
    if not (config.is_file() or metrics.is_file() or evaluations):
        raise DataError(
            f"{run_dir}: expected the run directory (run.dir) of a training run, found none of config.resolved.yaml, "
            "metrics.jsonl, evaluation_*.json"
        )
    config_text = _read_text(config) if config.is_file() else ""
    both = _steps_with_tokens(run_dir)
    return RunRecords(
        root=run_dir,
        name=name or run_dir.resolve().name,
        metrics=read_step_lines(metrics),
        settings=_flat(_read_yaml(config_text, config)),
        config_text=config_text,
        evaluations=[load_result(path) for path in evaluations],
        tokens=list(_read_tokens(both, token_steps)),
        steps_with_tokens=len(both),
    )


def evaluation_files(run_dir: Path) -> list[Path]:
    """Return the files with results of `tropd eval` in a run directory: evaluation_*.json and evaluation/*.json."""
    return sorted(run_dir.glob("evaluation_*.json")) + sorted(run_dir.glob("evaluation/*.json"))


def _steps_with_tokens(run_dir: Path) -> list[tuple[int, Path, Path]]:
    """(step, file of token values, file of rollouts), ascending."""
    return sorted(
        (int(path.stem.removeprefix("step_")), path, run_dir / "rollouts" / path.name)
        for path in run_dir.glob("tokens/step_*.npz")
        if path.stem.removeprefix("step_").isdecimal() and (run_dir / "rollouts" / path.name).is_file()
    )


def _read_tokens(both: list[tuple[int, Path, Path]], count: int) -> Iterator[StepTokens]:
    chosen = sorted({round(index) for index in np.linspace(0, len(both) - 1, min(count, len(both)))}) if both else []
    for step, tokens, rollouts in (both[index] for index in chosen):
        try:
            table, verdicts = _read_table(tokens)
            found = load_rollouts(rollouts)
            if not _belong(table, found, verdicts):
                raise DataError(f"{tokens}: not the token values of the rollouts in {rollouts}; remove the file")
            yield StepTokens(step, table, found, verdicts)
        except DataError:
            if tokens.exists() and rollouts.exists():
                raise  # if a file is gone now, a running job has just removed it as too old


def _read_table(path: Path) -> tuple[TokenTable, list[bool | None] | None]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"column {missing[0]} is missing")
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected the token values of a step: {first_line(error)}; remove the file") from error
    codes = columns.pop(VERDICTS, None)
    return TokenTable(columns), None if codes is None else [_VERDICTS.get(int(code)) for code in codes]


def _belong(table: TokenTable, rollouts: list[Rollout], verdicts: list[bool | None] | None) -> bool:
    """Whether all samples and tokens of a table exist in the rollouts."""
    if verdicts is not None and len(verdicts) != len(rollouts):
        return False
    lengths = np.array([len(rollout.token_ids) for rollout in rollouts], dtype=np.int64)
    samples, places = table["sample_index"].astype(np.int64), table["token_index"].astype(np.int64)
    inside = (samples >= 0) & (samples < len(lengths))
    return bool(inside.all() and (places < lengths[samples]).all())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {first_line(error)}") from error


def _read_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: cannot be read as YAML: {first_line(error)}") from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, list) and tree and all(isinstance(entry, dict) for entry in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree} if prefix else {}
    return {key: value for name in tree for key, value in _flat(tree[name], f"{prefix}{name}.").items()}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
