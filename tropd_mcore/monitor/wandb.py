"""Weights & Biases; optional.

Not a record (see `jsonl`). Invariant: all launches of one run directory write to one W&B run, whose id is kept in
<run.dir>/wandb.id.
"""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_text


class WeightsAndBiases:
    """Raises ConfigError where the package is not installed."""

    def __init__(self, project: str, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                ["monitor.wandb_project is set but the package wandb is missing: pip install 'tropd-mcore[wandb]'"]
            ) from error
        id_file = run_dir / "wandb.id"
        if not id_file.exists():
            publish_text(id_file, secrets.token_hex(8))
        self._run: Any = wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
            resume="allow",
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values that exist; W&B keeps its own history for steps that are repeated after a resume."""
        self._run.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()
