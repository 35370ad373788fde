"""The run directory: what lies where, who may write in it, and which configuration it was made with.

    config.resolved.yaml   every key, its value and where the value came from, of the last launch that was accepted
    inputs.json            digests of the data and the models that it read, and versions
    digests.json           digests of large files, so that they are read once
    model_checks.json      which models were compared with an independent reading of their folders
    run.id                 the name of the run, which its checkpoints carry
    teacher.json           what a served teacher was at the first launch
    template_date          the day that chat templates print, that of the first launch
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
from datetime import date
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
    def inputs(self) -> Path:
        """Record of what the last accepted launch read."""
        return self.root / "inputs.json"

    @property
    def digests(self) -> Path:
        """Digests that spare reading large files again."""
        return self.root / "digests.json"

    @property
    def teacher(self) -> Path:
        """What the served teacher was at the first launch, and how the model folders read its text."""
        return self.root / "teacher.json"

    @property
    def model_checks(self) -> Path:
        """Which models were compared with an independent reading of their folders."""
        return self.root / "model_checks.json"

    @property
    def run_id(self) -> Path:
        """Text file with the name of the run, drawn at its first launch; its checkpoints carry it."""
        return self.root / "run.id"

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

    def recorded_config(self) -> str | None:
        """The resolved configuration of the last accepted launch; None where there is none.

        Raises `ConfigError` where it cannot be read.
        """
        try:
            return self.config.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            problem = f"{self.config}: the record of the launch before cannot be read: {reason}; restore or remove it"
            raise ConfigError([problem]) from error

    def record_config(self, resolved: str) -> None:
        """Replace the resolved configuration. Raises `DataError` where the place cannot be written."""
        publish_text(self.config, resolved)

    def recorded_id(self) -> str | None:
        """The name that the first accepted launch drew; None before it, or where the file was removed."""
        try:
            return self.run_id.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def record_id(self, name: str) -> None:
        """Keep the name of the run, once. Raises `DataError` where the place cannot be written."""
        if self.recorded_id() is None:
            publish_text(self.run_id, f"{name}\n")

    def has_begun(self) -> bool:
        """Whether an earlier launch sampled, replayed or trained anything that this one would go on with."""
        return any((self.root / "rollouts").glob("step_*.npz")) or any(self.checkpoints.glob("step_*"))

    @property
    def template_date(self) -> Path:
        """Text file with the day that chat templates print in this run."""
        return self.root / "template_date"

    def recorded_template_date(self) -> date | None:
        """The day that the run's chat templates print; None where no launch has recorded one. Raises `DataError`."""
        if not self.template_date.exists():
            return None
        text = self.template_date.read_text(encoding="utf-8", errors="replace").strip()
        try:
            return date.fromisoformat(text)
        except ValueError as error:
            raise DataError(
                f"{self.template_date}: expected the date of the run's first launch (YYYY-MM-DD), found {text[:20]!r}; "
                "write it there"
            ) from error

    def record_template_date(self, day: date) -> None:
        """Keep the day, once. Raises `DataError` where the file is damaged or the place cannot be written."""
        if self.recorded_template_date() is None:
            publish_text(self.template_date, f"{day.isoformat()}\n")

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

    def drop(self, *, rollouts_from: int, scores_from: int) -> None:
        """Remove stored rollouts and scores of these steps and later ones, which turned out to be wrong.

        Raises `DataError` where a file cannot be removed.
        """
        for folder, first in (("rollouts", rollouts_from), ("scores", scores_from)):
            for path in (self.root / folder).glob("step_*.npz"):
                if int(path.name.removeprefix("step_").partition(".")[0]) >= first:
                    _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot remove {path}: {error.strerror}; give the job the right to write in run.dir"
        ) from error
