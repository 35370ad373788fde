"""Optional logging to Weights & Biases.

This is no record (see `jsonl`). Invariant: all launches of one run directory write to one W&B run, whose id is kept in
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
    """Raises ConfigError if the package is not installed or wandb fails, DataError if wandb.id is damaged."""

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
        """Write the values that exist. For steps that are repeated after a resume, W&B keeps its own history."""
        with self._told():
            self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Finish the upload."""
        with self._told():
            self._run.finish()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error of wandb (no network, no login, a full disk) into a one-line message."""
        try:
            yield
        except self._errors as error:
            problem = f"monitor.wandb_project: wandb says: {first_line(error)}"
            raise ConfigError([f"{problem}; fix that, set WANDB_MODE=offline, or remove the key"]) from error


def _run_name(path: Path) -> str:
    """The id in `path`; a random one is stored there first if the file does not exist.

    Raises DataError if the file cannot be read or written.
    """
    if not path.exists():
        publish_text(path, secrets.token_hex(8))
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected the id of the W&B run, cannot read it ({error}); remove the file") from error
