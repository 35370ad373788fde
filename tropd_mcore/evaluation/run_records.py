"""What a run left in its directory, read for the report: metrics, evaluations, token values, configuration.

Not for training state (checkpoints, scores). Invariant: a part that is not there is empty or None, never an error; a
part that is there and damaged is a DataError.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.evaluate import EvaluationResult, load_result
from tropd_mcore.files import read_step_lines
from tropd_mcore.types import Rollout, TokenTable

LoadRollouts = Callable[[Path], list[Rollout]]


@dataclass(frozen=True)
class StepTokens:
    """The token values that were kept of one step, and its rollouts, which `sample_index` indexes."""

    step: int
    table: TokenTable
    rollouts: list[Rollout]


@dataclass(frozen=True)
class RunRecords:
    """Everything the report shows."""

    root: Path
    metrics: list[dict[str, Any]]
    """One object a step: `step` and {metric name: value or None}"""
    settings: Mapping[str, Any]
    """{dotted key: value} of config.resolved.yaml"""
    config_text: str
    evaluations: list[EvaluationResult]
    tokens: list[StepTokens]

    @property
    def steps(self) -> list[int]:
        return [int(line["step"]) for line in self.metrics]

    def series(self, name: str) -> list[float | None]:
        """One metric over the steps."""
        return [line.get(name) for line in self.metrics]


def read_run(run_dir: Path, load_rollouts: LoadRollouts, *, token_steps: int) -> RunRecords:
    """Read `run_dir`; token values of at most `token_steps` steps, evenly spread. Raises DataError."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: expected the run directory (run.dir) of a training run, found no folder")
    config = run_dir / "config.resolved.yaml"
    config_text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return RunRecords(
        root=run_dir,
        metrics=read_step_lines(run_dir / "metrics.jsonl"),
        settings=_flat(_read_yaml(config_text, config)),
        config_text=config_text,
        evaluations=[load_result(path) for path in evaluation_files(run_dir)],
        tokens=_read_tokens(run_dir, load_rollouts, token_steps),
    )


def evaluation_files(run_dir: Path) -> list[Path]:
    """Return the results of `tropd eval` in a run directory: evaluation_*.json and evaluation/*.json."""
    return sorted(run_dir.glob("evaluation_*.json")) + sorted(run_dir.glob("evaluation/*.json"))


def _read_tokens(run_dir: Path, load_rollouts: LoadRollouts, count: int) -> list[StepTokens]:
    both = sorted(
        (int(path.stem.removeprefix("step_")), path, run_dir / "rollouts" / path.name)
        for path in run_dir.glob("tokens/step_*.npz")
        if (run_dir / "rollouts" / path.name).is_file()
    )
    chosen = sorted({round(index) for index in np.linspace(0, len(both) - 1, min(count, len(both)))}) if both else []
    return [
        StepTokens(step, _read_table(tokens), load_rollouts(rollouts))
        for step, tokens, rollouts in (both[index] for index in chosen)
    ]


def _read_table(path: Path) -> TokenTable:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return TokenTable({name: archive[name] for name in archive.files})
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected the token values of a step: {error}; remove the file") from error


def _read_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: cannot be read as YAML: {error}") from error


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree} if prefix else {}
    return {key: value for name in tree for key, value in _flat(tree[name], f"{prefix}{name}.").items()}
