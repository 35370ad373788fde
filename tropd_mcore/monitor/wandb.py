"""Weights & Biases; optional.

Not a record (see `jsonl`). Invariant: all launches of one run directory write to one W&B run, whose id is kept in
<run.dir>/wandb.id.
"""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ConfigError, DataError, first_line
from tropd_mcore.files import publish_text


class WeightsAndBiases:
    """Raises ConfigError where the package is not installed or wandb cannot work, DataError for a damaged wandb.id."""

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                ["monitor.wandb_project is set but the package wandb is missing: pip install 'tropd-mcore[wandb]'"]
            ) from error
        self._errors = (OSError, getattr(wandb, "Error", OSError))
        name = _run_name(run_dir / "wandb.id")
        with self._told():
            self._run: Any = wandb.init(
                project=project,
                id=name,
                name=run_dir.name,
                dir=str(run_dir),
                config=dict(settings),
                resume="allow",
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values that exist; W&B keeps its own history for steps that are repeated after a resume."""
        with self._told():
            self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Finish the upload."""
        with self._told():
            self._run.finish()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what wandb raises (no network, no login, a full disk) into one line."""
        try:
            yield
        except self._errors as error:
            problem = f"monitor.wandb_project: wandb says: {first_line(error)}"
            raise ConfigError([f"{problem}; mend that, set WANDB_MODE=offline, or leave the key out"]) from error


def _run_name(path: Path) -> str:
    """The id in `path`, drawn where there is none. Raises DataError where the file cannot be read or written."""
    if not path.exists():
        publish_text(path, secrets.token_hex(8))
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected the id of the W&B run, cannot read it ({error}); remove the file") from error
