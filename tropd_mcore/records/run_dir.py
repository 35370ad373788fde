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

Invariant: one job at a time (`run_lock`); a job that a resume would need a file of never removes it.
"""

import shutil
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.files import PARTIAL, publish_text, remove_left_partials
from tropd_mcore.records.run_lock import Kind, RunLock


@dataclass(frozen=True)
class Kept:
    """How many of the newest steps keep their files; None = all."""

    rollouts: int | None = None
    scores: int | None = 0
    tokens: int | None = None
    rollouts_needed_from: int = 0
    """First step that a resume would repeat, that of the newest checkpoint: its rollouts stay."""
    scores_needed_from: int = 0
    """The same for scores, which only a served teacher could not give again."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created before `prepare`."""

    root: Path
    _locks: list[RunLock] = field(default_factory=list, compare=False, repr=False)

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

    def lock(self, kind: Kind = "auto") -> RunLock:
        """Create the directory and hold it for this process, until the lock is released or the process ends.

        Raises `ConfigError` where the directory cannot be written, another job holds it or `kind` cannot be had there.
        """
        lock = RunLock(self.root)
        lock.acquire(kind)
        self._locks.append(lock)
        return lock

    def watch(self) -> RunLock:
        """Notice from now on where the directory, which another rank holds, goes. Raises `ConfigError`."""
        lock = RunLock(self.root)
        lock.watch()
        self._locks.append(lock)
        return lock

    def check_held(self) -> None:
        """Raise `DataError` where the directory is no longer the one that `lock` or `watch` saw; for before a write."""
        for lock in self._locks:
            lock.check()

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

    def forget(self, step: int, kept: Kept) -> None:
        """Remove what is stored of the steps before the newest ones that are kept; `step` is the newest one.

        What a resume needs stays, whatever the counts say. Raises `DataError` where a file cannot be removed.
        """
        limits = {
            "rollouts": _limit(step, kept.rollouts, kept.rollouts_needed_from),
            "scores": _limit(step, kept.scores, kept.scores_needed_from),
            "tokens": _limit(step, kept.tokens, step + 1),
        }
        for folder, limit in limits.items():
            for path in self._of_steps(folder) if limit > 0 else ():
                if _step_of(path) < limit:
                    _remove(path)

    def clean(self) -> int:
        """Remove what killed writers left unfinished; return how many files and folders. For who holds the directory.

        Checkpoints that were being written are among it: nobody writes one now.
        """
        folders = [self.root, *(self.root / name for name in ("rollouts", "scores", "tokens", "logs"))]
        removed = sum(remove_left_partials(folder) for folder in folders)
        for path in self.checkpoints.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
        return removed

    def drop(self, *, rollouts_from: int, scores_from: int) -> None:
        """Remove stored rollouts and scores of these steps and later ones, which turned out to be wrong.

        Raises `DataError` where a file cannot be removed.
        """
        for folder, first in (("rollouts", rollouts_from), ("scores", scores_from)):
            for path in self._of_steps(folder):
                if _step_of(path) >= first:
                    _remove(path)

    def _of_steps(self, folder: str) -> list[Path]:
        return [path for path in (self.root / folder).glob("step_*.npz") if _step_of(path) >= 0]


def _limit(step: int, count: int | None, needed_from: int) -> int:
    """The first step whose files stay after `step`; 0 where all do."""
    return 0 if count is None else min(step + 1 - count, needed_from)


def _step_of(path: Path) -> int:
    """The step that a file belongs to; -1 of a file of another name."""
    number = path.name.removeprefix("step_").partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot remove {path}: {error.strerror}; give the job the right to write in run.dir"
        ) from error
