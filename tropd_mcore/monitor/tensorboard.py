"""TensorBoard scalars under <run.dir>/tensorboard; optional.

Not a record (see `jsonl`): after a resume, what an earlier launch wrote for later steps is hidden, not removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ConfigError


class TensorBoard:
    """Raises ConfigError where the package is not installed."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                ["monitor.tensorboard=true needs the package tensorboard: pip install 'tropd-mcore[tensorboard]'"]
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=start_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values that exist."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
