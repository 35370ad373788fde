"""The run directory: what lies where, who may write in it, and which configuration it was made with.

    config.resolved.yaml   every key, its value and where the value came from
    metrics.jsonl          one line a step
    rollouts/ scores/      what decided each step, enough to replay it
    tokens/                per-token values of a few samples, for the report
    checkpoints/ export/   Megatron checkpoints and the final Hugging Face folder
    logs/                  output of the servers

Invariant: one job at a time; the lock goes with the process that holds it, so a killed job leaves none behind.
"""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.files import publish_text


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created before `prepare`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.resolved.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def export_step(self) -> Path:
        """Text file with the step that `export` was made at."""
        return self.root / "export.step"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def rollouts(self, step: int) -> Path:
        return self.root / "rollouts" / f"step_{step:06d}.npz"

    def scores(self, step: int, dp_rank: int, cp_rank: int) -> Path:
        return self.root / "scores" / f"step_{step:06d}.dp{dp_rank}.cp{cp_rank}.npz"

    def tokens(self, step: int) -> Path:
        return self.root / "tokens" / f"step_{step:06d}.npz"

    def lock(self) -> int:
        """Create the directory and hold it for this process, until the returned descriptor is closed.

        Raises `ConfigError` where the directory cannot be written or another job holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            problem = f"run.dir: cannot write {self.root}: {error.strerror}; choose another run.dir"
            raise ConfigError([problem]) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            problem = f"run.dir: {self.root} is in use by another job; stop it or set another run.dir"
            raise ConfigError([problem]) from error
        return lock

    def record_config(self, resolved: str) -> list[str]:
        """Write the resolved configuration; returns the lines that an earlier launch had otherwise."""
        changed: list[str] = []
        if self.config.exists():
            before = {line.partition("  #")[0] for line in self.config.read_text().splitlines()}
            after = [line.partition("  #")[0] for line in resolved.splitlines()]
            changed = [line.strip() for line in after if line not in before and line.strip()]
        publish_text(self.config, resolved)
        return changed

    def exported_at(self) -> int | None:
        """Optimizer steps done when `export` was written; None where there is none."""
        return int(self.export_step.read_text()) if self.export_step.exists() and self.export.exists() else None

    def forget(self, *, rollouts_before: int, scores_before: int) -> None:
        """Remove stored rollouts and scores of steps that no resume can need any more.

        Raises `DataError` where a file cannot be removed.
        """
        for folder, limit in (("rollouts", rollouts_before), ("scores", scores_before)):
            for path in (self.root / folder).glob("step_*.npz"):
                if int(path.name.removeprefix("step_").partition(".")[0]) < limit:
                    _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot remove {path}: {error.strerror}; give the job the right to write in run.dir"
        ) from error
