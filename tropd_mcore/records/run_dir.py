"""The run directory: the paths of its files, the lock on it, and the configuration that it was made with.

    config.resolved.yaml   every key of the last accepted launch, with its value and the source of the value
    inputs.json            digests of the data and models that this launch read, and versions
    digests.json           digests of large files, so each is read only once
    model_checks.json      which models were compared with an independent reading of their folders
    run.id                 the name of the run, which is also stored in its checkpoints
    teacher.json           identity of a served teacher at the first launch; of several, teacher-<name>.json
    template_date          the date that chat templates print: the day of the first launch
    metrics.jsonl          one line per step
    rollouts/ scores/      rollouts and scores of each step, enough to replay it
    tokens/                per-token values of a few samples, for the report
    checkpoints/ export/   Megatron checkpoints and the final Hugging Face folder
    logs/                  output of the servers

Invariants: one job at a time (`run_lock`). A file that a resume would need is never removed.
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
    """How many of the newest steps keep their files, per kind of file; None = all."""

    rollouts: int | None = None
    scores: int | None = 0
    tokens: int | None = None
    rollouts_needed_from: int = 0
    """First step that a resume from the newest checkpoint would repeat. Rollouts from this step on are kept."""
    scores_needed_from: int = 0
    """The same for scores. Only the scores of a served teacher cannot be computed again."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Nothing is created before `lock`."""

    root: Path
    _locks: list[RunLock] = field(default_factory=list, compare=False, repr=False)

    @property
    def config(self) -> Path:
        return self.root / "config.resolved.yaml"

    @property
    def inputs(self) -> Path:
        """Record of the files that the last accepted launch read."""
        return self.root / "inputs.json"

    @property
    def digests(self) -> Path:
        """Digests of large files, which need not be read again."""
        return self.root / "digests.json"

    @property
    def teacher(self) -> Path:
        """Identity of the served teacher at the first launch, and the log-probs of its text by the model folders."""
        return self.teacher_record("teacher")

    def teacher_record(self, label: str) -> Path:
        """The same for one of several served teachers, `teacher-<name>` (`config.teachers`)."""
        return self.root / f"{label}.json"

    @property
    def model_checks(self) -> Path:
        """Record of the models that were compared with an independent reading of their folders."""
        return self.root / "model_checks.json"

    @property
    def run_id(self) -> Path:
        """Text file with the name of the run, drawn at its first launch and stored in its checkpoints."""
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
        """Text file with the number of optimizer steps in `export`."""
        return self.root / "export.step"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def rollouts(self, step: int) -> Path:
        return self.root / "rollouts" / f"step_{step:06d}.npz"

    def scores(self, step: int, dp_rank: int, cp_rank: int) -> Path:
        return self.root / "scores" / f"step_{step:06d}.dp{dp_rank}.cp{cp_rank}.npz"

    def held_out_scores(self, dp_rank: int, cp_rank: int) -> Path:
        """The teacher's scores of the held-out responses, which are asked for once."""
        return self.root / "scores" / f"held_out.dp{dp_rank}.cp{cp_rank}.npz"

    def tokens(self, step: int) -> Path:
        return self.root / "tokens" / f"step_{step:06d}.npz"

    def lock(self, kind: Kind = "auto") -> RunLock:
        """Create the directory and hold it for this process, until the lock is released or the process ends.

        Raises `ConfigError` if it cannot be written, another job holds it, or `kind` is unavailable there.
        """
        lock = RunLock(self.root)
        lock.acquire(kind)
        self._locks.append(lock)
        return lock

    def watch(self) -> RunLock:
        """Let `check_held` notice if the directory, which another rank holds, is removed. Raises `ConfigError`."""
        lock = RunLock(self.root)
        lock.watch()
        self._locks.append(lock)
        return lock

    def check_held(self) -> None:
        """Raise `DataError` if the directory is no longer the one that `lock` or `watch` saw. Call before a write."""
        for lock in self._locks:
            lock.check()

    def recorded_config(self) -> str | None:
        """Return the resolved configuration of the last accepted launch; None if there is none.

        Raises `ConfigError` if it cannot be read.
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
        """Replace the resolved configuration. Raises `DataError` if it cannot be written."""
        publish_text(self.config, resolved)

    def recorded_id(self) -> str | None:
        """Return the name that the first accepted launch drew; None before that launch, or if the file was removed."""
        try:
            return self.run_id.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def record_id(self, name: str) -> None:
        """Record the name of the run unless one is recorded. Raises `DataError` if it cannot be written."""
        if self.recorded_id() is None:
            publish_text(self.run_id, f"{name}\n")

    def has_begun(self) -> bool:
        """Whether an earlier launch sampled, replayed or trained anything that this launch would continue."""
        return any((self.root / "rollouts").glob("step_*.npz")) or any(self.checkpoints.glob("step_*"))

    @property
    def template_date(self) -> Path:
        """Text file with the date that chat templates print in this run."""
        return self.root / "template_date"

    def recorded_template_date(self) -> date | None:
        """Return the date that the run's chat templates print; None if no launch has recorded one.

        Raises `DataError` if the file is damaged.
        """
        if not self.template_date.exists():
            return None
        text = self.template_date.read_text(encoding="utf-8", errors="replace").strip()
        try:
            return date.fromisoformat(text)
        except ValueError as error:
            raise DataError(
                f"{self.template_date}: expected the date of the run's first launch (YYYY-MM-DD), found {text[:20]!r}; "
                "write that date into the file"
            ) from error

    def record_template_date(self, day: date) -> None:
        """Record the date unless one is recorded. Raises `DataError` if the file is damaged or cannot be written."""
        if self.recorded_template_date() is None:
            publish_text(self.template_date, f"{day.isoformat()}\n")

    def exported_at(self) -> int | None:
        """Return the optimizer steps done when `export` was written; None if there is no export."""
        return int(self.export_step.read_text()) if self.export_step.exists() and self.export.exists() else None

    def forget(self, step: int, kept: Kept) -> None:
        """Remove stored files of old steps, as `kept` says; `step` is the newest step.

        Files that a resume needs are never removed, whatever the counts are. Raises `DataError` if a file cannot be
        removed.
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
        """Remove unfinished files and folders of killed writers; returns their number.

        Only the holder of the directory may call it. Unfinished checkpoints are removed too, because no other job
        writes one now.
        """
        folders = [self.root, *(self.root / name for name in ("rollouts", "scores", "tokens", "logs"))]
        removed = sum(remove_left_partials(folder) for folder in folders)
        for path in self.checkpoints.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
        return removed

    def drop(self, *, rollouts_from: int, scores_from: int) -> None:
        """Remove stored rollouts and scores from these steps on, because they turned out to be wrong.

        Raises `DataError` if a file cannot be removed.
        """
        for folder, first in (("rollouts", rollouts_from), ("scores", scores_from)):
            for path in self._of_steps(folder):
                if _step_of(path) >= first:
                    _remove(path)

    def _of_steps(self, folder: str) -> list[Path]:
        return [path for path in (self.root / folder).glob("step_*.npz") if _step_of(path) >= 0]


def _limit(step: int, count: int | None, needed_from: int) -> int:
    """Return the first step whose files are kept after `step`; 0 or less if all are kept."""
    return 0 if count is None else min(step + 1 - count, needed_from)


def _step_of(path: Path) -> int:
    """Return the step that a file belongs to; -1 if its name has another form."""
    number = path.name.removeprefix("step_").partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot remove {path}: {error.strerror}; give the job the right to write in run.dir"
        ) from error
