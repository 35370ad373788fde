"""Optional TensorBoard scalars in <run.dir>/tensorboard.

This is no record (see `jsonl`). After a resume, values that an earlier launch wrote for later steps are hidden but not
removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ConfigError
from tropd_mcore.files import writing

KEYS = "run.dir (or monitor.tensorboard=false)"
"""Keys to change if the folder cannot be written."""


class TensorBoard:
    """Raises ConfigError if the package is not installed, DataError if `folder` cannot be written."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                ["monitor.tensorboard=true needs the package tensorboard: pip install 'tropd-mcore[tensorboard]'"]
            ) from error
        self._folder = folder
        with writing(folder, key=KEYS):
            self._writer: Any = SummaryWriter(str(folder), purge_step=start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values that exist. Raises DataError if the folder cannot be written."""
        with writing(self._folder, key=KEYS):
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, global_step=step)
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file. Raises DataError if it cannot be written."""
        with writing(self._folder, key=KEYS):
            self._writer.close()
