"""Checks that a served teacher is the model of its path (teacher.path), is not the student, and stays the same.

Rank 0 runs the full check at the start of a launch, every `teacher.check_every` steps, before every checkpoint and
after a restart. At every step it checks what the server reports (label, model path). `teacher.identity` reads a
server's identity. Invariants: a checkpoint is written only if the scores of all its steps are known to come from the
teacher of the start. The record in the run directory is written only by a launch that began to train. Every rank raises
the same error.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import teacher_of
from tropd_mcore.errors import ConfigError, GateError, ModelError, ServerDied
from tropd_mcore.files import publish_text
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.progress import progress
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.serving.fleet import ServerFleet, fleet_of
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.teacher.identity import (
    FLOAT32_BOUND,
    ROUNDED_BOUND,
    Fingerprint,
    Identity,
    ServedModel,
    changes,
    fingerprint_of,
    other_weights,
    read_identity,
    read_model,
    text_ids,
)
from tropd_mcore.types import IntArray
from tropd_mcore.weights.digest import fingerprint, model_files
from tropd_mcore.weights.independent import fits, independent_log_probs
from tropd_mcore.weights.served import read_served_model

log = logging.getLogger(__name__)

CLEARLY_NEARER = 0.5
"""A server counts as one of two models if its distance to it is at most this fraction of that to the other."""
NO_STEP = sys.maxsize
"""A number larger than every step."""
STUDENT_BOUND = 0.04
"""Mean |difference| in nats up to which a server that rounds counts as the student if teacher.path cannot be read."""


@dataclass(frozen=True)
class Reading:
    """The fingerprint of a model folder, computed on the CPU."""

    stamp: str
    """Hash of the names, sizes and times of its files. While it stays the same, the folder is not read again."""
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Record:
    """Content of <run.dir>/teacher.json."""

    identity: Identity
    """Identity of the server at the first launch"""
    readings: dict[str, Reading] = field(default_factory=dict)
    """Configuration key of a folder -> its fingerprint"""
    verified: int = 0
    """Scores of all steps before this one come from that teacher"""


class TeacherIdentity:
    """Checks the identity of the teacher behind `server`, one or a fleet. Runs on one rank, without collectives.

    The first server of a fleet is compared with folders and record, the others with the first.

    `config` names the folders and, with `run.dir`, the place of the record. `name` is the teacher's in `teachers`.
    Methods that ask the server may raise ServerError. The constructor raises ConfigError if the record is damaged.
    """

    def __init__(self, server: SupervisedServer | ServerFleet, config: Config, name: str | None = None) -> None:
        self._fleet = fleet_of(server)
        self._server = self._fleet.first
        self._config = config
        self._teacher = teacher_of(config, name)
        self._path = RunDir(config.run.dir).teacher_record(self._teacher.label)
        self._recorded = load_record(self._path)
        self._readings = dict(self._recorded.readings) if self._recorded is not None else {}
        self._reasons: dict[str, str] = {}
        self._ids: IntArray | None = None
        self._found: Identity | None = None

    def digest(self) -> str:
        """Short hash that identifies this teacher's scores. It is the same at every launch of a run."""
        assert self._found is not None
        return (self._recorded.identity if self._recorded is not None else self._found).digest()

    def check_start(self) -> None:
        """Compare the server with teacher.path, student.path and the record, as far as readable, and log the result.

        Raises GateError if it serves another model. Cost: one forward pass of each folder on the CPU, once per run.
        """
        config, client = self._config, self._server.client
        said = read_model(client, with_checksum=False)
        self._ids = text_ids(config.student.path, self._teacher.path)[: said.longest_input]
        if said.vocab_size is not None and said.vocab_size <= self._ids.max():
            self._check_config(said)  # raises; such ids would kill SGLang
        found = read_identity(client, self._ids)
        teacher, student = self._read(self._teacher.path_key, self._teacher.path), None
        if config.student.path.resolve() != self._teacher.path.resolve():
            student = self._read("student.path", config.student.path)
        self._check_folders(found, teacher, student)
        self._check_config(found.model)
        self._check_record(found)
        self._found = found
        for server in self._fleet.each:
            if server is not self._server:
                self.check_one(server)
            server.after_restart = partial(self.check_one, server)

    @property
    def verified(self) -> int | None:
        """Earlier launches verified the scores of all steps before this one; None if there was no earlier launch."""
        return self._recorded.verified if self._recorded is not None else None

    def record(self, verified: int = 0) -> None:
        """Write the record: the identity of the first launch and the number `verified`. Raises DataError."""
        assert self._found is not None
        identity = self._recorded.identity if self._recorded is not None else self._found
        now = Record(identity, self._readings, verified)
        if now != self._recorded:
            publish_text(self._path, _RECORD.dump_json(now, indent=1).decode() + "\n")
        self._recorded = now

    def check_label(self) -> None:
        """Check that the server still reports the same model, without checksum and scores. Raises GateError."""
        assert self._found is not None
        found = self._found.model
        self._of_each(
            lambda server: self._refuse(server, changes(found, read_model(server.client, with_checksum=False)))
        )

    def check_now(self) -> None:
        """Check that label, checksum and scores are the same as at the start. Raises GateError."""
        self._of_each(self.check_one)

    def _of_each(self, check: Callable[[SupervisedServer], None]) -> None:
        """Check each server that answers. One that dies is started again, and checked by its `after_restart`."""
        for server in self._fleet.ready():
            try:
                check(server)
            except ServerDied as died:
                self._fleet.lost(server, died)

    def check_one(self, server: SupervisedServer) -> None:
        """Compare one server with the first one at the start. Raises GateError."""
        assert self._found is not None and self._ids is not None
        with progress(log, f"{_where(server)}: asking what it serves"):
            now = read_identity(server.client, self._ids)
        before = self._found
        lines = changes(before.model, now.model)
        if before.model.checksum is not None and now.model.checksum is None:
            lines.append(f"checksum {before.model.checksum[:12]} -> none")
        distance, bound = before.fingerprint.distance(now.fingerprint), self._bound(now)
        if distance > bound:
            lines.append(f"scores of a text by {distance:.1e} nats (mean), allowed {bound:.0e}")
        self._refuse(server, lines)

    def _refuse(self, server: SupervisedServer, lines: list[str]) -> None:
        if lines:
            than = "" if server is self._server else f" {self._key()} did"
            raise GateError(
                f"gates.teacher_identity: {_where(server)} serves another model than{than} at the start of this "
                f"launch: {'; '.join(lines)}; let nothing update or replace the teacher while a run asks it"
            )

    def _check_config(self, model: ServedModel) -> None:
        """Compare what the server reports about its model with the config.json of the teacher's path."""
        key, expected_of = self._teacher.path_key, read_served_model(self._teacher.path)
        pairs = {
            "model_type": (expected_of.family, model.model_type if model.model_type != "?" else None),
            "vocab_size": (expected_of.vocab_size, model.vocab_size),
        }
        for name, (expected, said) in pairs.items():
            if said is not None and said != expected:
                raise GateError(
                    f"gates.teacher_identity: {_where(self._server)} serves {model.describe()} with {name} {said}; "
                    f"expected {expected}, that of {key}={self._teacher.path}: correct {self._teacher.key}.server.url "
                    f"or {key}"
                )

    def _check_folders(self, found: Identity, teacher: Fingerprint | None, student: Fingerprint | None) -> None:
        bound, key, url = self._bound(found), self._teacher.path_key, f"{self._teacher.key}.server.url"
        to_teacher = teacher.distance(found.fingerprint) if teacher is not None else None
        to_student = student.distance(found.fingerprint) if student is not None else None
        apart = teacher.distance(student) if teacher is not None and student is not None else None
        if apart != 0.0 and to_student is not None and self._is_student(found, to_teacher, to_student):
            instead = f", by {to_teacher:.1e} from {key}" if to_teacher is not None else ""
            raise GateError(
                f"gates.teacher_identity: {_where(self._server)} serves the student: its scores of a text differ by "
                f"{to_student:.1e} nats (mean) from student.path={self._config.student.path}{instead}; it says "
                f"{found.model.describe()}. Expected {key}={self._teacher.path}: correct {url}"
            )
        if to_teacher is not None and to_teacher > bound:
            raise GateError(
                f"gates.teacher_identity: {_where(self._server)} serves other weights than {key}="
                f"{self._teacher.path}: its scores of a text differ by {to_teacher:.1e} nats (mean), allowed "
                f"{bound:.0e}; it says {found.model.describe()}. Correct {url} or {key}; for a "
                "server that rounds more, raise gates.teacher_logprob_mean"
            )
        self._say(found, to_teacher, to_student, apart)

    def _is_student(self, found: Identity, to_teacher: float | None, to_student: float) -> bool:
        if to_teacher is not None:
            return to_student <= CLEARLY_NEARER * to_teacher and to_student <= self._bound(found)
        return to_student <= (FLOAT32_BOUND if found.model.exact else STUDENT_BOUND)

    def _check_record(self, found: Identity) -> None:
        """Compare the server with the record of the first launch. Changes that leave the model the same are logged."""
        if self._recorded is None:
            return
        before = self._recorded.identity
        distance, bound = before.fingerprint.distance(found.fingerprint), self._bound(found)
        checksums = other_weights(before.model, found.model)
        if checksums is not None or distance > bound:
            by_scores = f"scores of a text by {distance:.1e} nats (mean), allowed {bound:.0e}"
            raise GateError(
                f"gates.teacher_identity: {_where(self._server)} serves other weights than at the first launch of this "
                f"run ({self._path}): {'; '.join(line for line in (checksums, by_scores) if line)}; it said "
                f"{before.model.describe()} and says {found.model.describe()}. Serve the recorded teacher, or begin "
                "another run.dir"
            )
        for line in changes(before.model, found.model):
            log.info("%s: %s since the first launch; its weights are the same, as far as known", self._key(), line)

    def _say(self, found: Identity, to_teacher: float | None, to_student: float | None, apart: float | None) -> None:
        tokens, said, key = len(found.fingerprint.logp_N), found.model.describe(), self._teacher.path_key
        if to_teacher is not None:
            source = f"fingerprint from {key}: {to_teacher:.1e} nats (mean) over {tokens} tokens"
        elif self._recorded is not None:
            source = f"fingerprint recorded at the first launch ({key}: {self._reasons[key]})"
        else:
            source = (
                f"no fingerprint to compare with, this first launch records one ({key}: "
                f"{self._reasons[key]}): it is assumed, not checked, to be the model of {key}"
            )
        other = f"; student.path: {to_student:.1e}" if to_student is not None else ""
        log.info("gates.teacher_identity: %s serves %s; %s%s", _where(self._server), said, source, other)
        if "student.path" in self._reasons:
            log.info("gates.teacher_identity: not compared with student.path: %s", self._reasons["student.path"])
        if to_teacher is not None and apart and to_teacher > CLEARLY_NEARER * apart:
            log.warning(
                "gates.teacher_identity: %s and student.path differ by %.1e nats on the text, the server "
                "from %s by %.1e: it is unclear which of the two it serves",
                key,
                apart,
                key,
                to_teacher,
            )

    def _read(self, key: str, folder: Path) -> Fingerprint | None:
        """The folder's fingerprint, computed on the CPU; None if that is impossible. If the files are unchanged, the
        fingerprint of an earlier launch is used."""
        assert self._ids is not None
        stamp = _stamp(folder)
        known = self._readings.get(key)
        if known is not None and known.stamp == stamp and known.fingerprint.ids_N == tuple(self._ids.tolist()):
            return known.fingerprint
        try:
            reason = fits(folder, tokens=len(self._ids))
            if reason is None:
                found = fingerprint_of(self._ids, independent_log_probs(folder, self._ids))
                self._readings[key] = Reading(stamp, found)
                return found
        except ModelError as error:
            reason = str(error)
        self._reasons[key] = reason
        return None

    def _bound(self, found: Identity) -> float:
        return self._config.gates.teacher_logprob_mean or (FLOAT32_BOUND if found.model.exact else ROUNDED_BOUND)

    def _key(self) -> str:
        return self._server.spec.key


def _where(server: SupervisedServer) -> str:
    return f"{server.spec.key} ({server.client.url})"


class TeacherCheck:
    """Collective check of the teacher behind `server`. Only rank 0 asks it, and all ranks get the result.

    `server` is needed on rank 0. `name` is the teacher's in `teachers`. The constructor runs the check of the launch's
    start and may raise GateError.
    """

    def __init__(
        self,
        server: SupervisedServer | ServerFleet | None,
        config: Config,
        control: dist.ProcessGroup,
        teacher: str | None = None,
    ) -> None:
        self._fleet = fleet_of(server) if server is not None else None
        self._config = config
        self._control = control
        self._teacher = teacher_of(config, teacher)
        self._identity: TeacherIdentity | None = None
        self._verified: int | None = None
        """Scores of the steps before this one come from the teacher of the start; None before the first step."""
        self._step = 0
        """The current step, or the last step before a checkpoint."""
        self.name: str = on_rank_zero(self._start, control)
        """Identifies this teacher's scores; the same at every launch of a run and on every rank."""

    def at_step(self, step: int) -> None:
        """Check before the scores of `step`: the label, and every `check_every` steps checksum and scores too.

        Raises GateError.
        """

        def check() -> None:
            assert self._identity is not None
            if self._verified is None:
                self._verified = step
                self._identity.record(step)
            self._check(step, full=step - self._verified >= self._teacher.config.check_every, verifies=step)

        on_rank_zero(check, self._control)

    def before_checkpoint(self, done: int) -> None:
        """Check checksum and scores before a checkpoint of `done` steps is written. Raises GateError."""
        on_rank_zero(lambda: self._check(done - 1, full=True, verifies=done), self._control)

    def _start(self) -> str:
        assert self._fleet is not None
        self._identity = identity = TeacherIdentity(self._fleet, self._config, self._teacher.name)
        try:
            self._identity.check_start()
        except GateError as error:
            raise GateError(f"{error}{self._drop_unverified(self._identity.verified)}") from error
        for server in self._fleet.each:
            server.after_restart = partial(self._look, partial(identity.check_one, server))
        return self._identity.digest()

    def _check(self, step: int, *, full: bool, verifies: int) -> None:
        assert self._identity is not None
        self._step = step
        self._look(self._identity.check_now if full else self._identity.check_label)
        if full:
            self._verified = verifies
            self._identity.record(verifies)

    def _look(self, check: Callable[[], None]) -> None:
        """Compare servers with the start. If one serves another model, remove what may come from that model."""
        try:
            check()
        except GateError as error:
            if self._verified is None:
                raise
            raise GateError(f"{error}. {self._undo(self._verified, self._step)}") from error

    def _undo(self, first: int, last: int) -> str:
        """Remove what may come from the other teacher; the same command then repeats the steps. Returns a message."""
        RunDir(self._config.run.dir).drop(scores_from=first, rollouts_from=first + 1)
        return (
            f"It was last as it should be before step {first}: the scores of steps {first} to {last} "
            "and the rollouts after the first of them are removed, no checkpoint holds them, and the same command "
            "repeats these steps once the server is right"
        )

    def _drop_unverified(self, first: int | None) -> str:
        """Remove scores that an earlier launch saved from step `first` on, because another teacher may have made them.

        Returns an addition to the error message. Rollouts are kept; the sampler gate checks them. This is not called if
        the teacher is right, so an interrupted step is repeated with its saved scores.
        """
        run_dir = RunDir(self._config.run.dir)
        last = _last_scored(run_dir)
        if first is None or last is None or last < first:
            return ""
        run_dir.drop(scores_from=first, rollouts_from=NO_STEP)
        return (
            f". The scores of steps {first} to {last}, which it may have made since the last check, are removed and "
            "will be made again"
        )


_RECORD = TypeAdapter(Record)


def load_record(path: Path) -> Record | None:
    """Return the record of the first launch; None if there is none. Raises ConfigError if it is damaged."""
    try:
        return _RECORD.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        problem = (
            f"{path}: the record of the served teacher is damaged ({reason}); remove it to record what is served now"
        )
        raise ConfigError([problem]) from error


def _last_scored(run_dir: RunDir) -> int | None:
    """The last step with saved scores."""
    names = [path.name for path in (run_dir.root / "scores").glob("step_*.npz")]
    return max((int(name.removeprefix("step_").partition(".")[0]) for name in names), default=None)


def _stamp(folder: Path) -> str:
    """Hash of names, sizes and times of a model folder's files; "" if one is missing, which is reported elsewhere."""
    try:
        found = [(name, fingerprint(folder / name)) for name in model_files(folder)]
    except OSError:
        return ""
    return hashlib.sha256(repr(found).encode()).hexdigest()
