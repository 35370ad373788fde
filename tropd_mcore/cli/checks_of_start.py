"""Findings of the checks that a job makes before its first server and model, for `tropd doctor`.

Not for the checks: they are those of `train.start_checks`, all of them and no others. Invariants: nothing is written
and no server is started; a check whose ground is missing is told as skipped, never as right; a line of a FAIL is the
line with which the job would end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.derived import model_paths, ranks_per_node, reads_responses
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, TropdError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.rollout.response_origin import load_origin
from tropd_mcore.train.inputs import read_inputs_alone
from tropd_mcore.train.preflight import CHEAP_CHECKS, Launch
from tropd_mcore.train.start_checks import BACKEND, CONTENT_CHECKS, INPUT_CHECKS, MODELS, StartCheck, State, take

QUIET_S = 2.0
"""A check that takes longer shows its log lines, so that nobody takes it for stuck."""

BLOCKED_BY: dict[str, tuple[str, ...]] = {
    "run.dir": ("run.dir", "run.init_from"),
    "data.prompts": ("data.prompts",),
    "run.replay": ("run.replay",),
}
"""Check -> keys that a cheap check has found wrong already; it would say the same again. See `_blocked`."""


def start_checks(config: Config, *, nodes: int = 1, state: State | None = None) -> Iterator[Finding]:
    """Yield what every check of a start finds. `nodes` is the number of machines; `state` is filled where given."""
    state = state or State(config, RunDir(config.run.dir))
    wrong: set[str] = set()  # keys and lines that are told already
    ranks = None
    try:
        ranks = ranks_per_node(config.parallel, nodes) * nodes
    except ConfigError as error:
        yield from (Finding("FAIL", "parallel", line) for line in error.problems)
    yield from _cheap(state, Launch(config, ranks, nodes), wrong)
    from tropd_mcore.mcore import platform

    state.platform = platform.meant(config.platform.kind)
    launch = next(check for check in INPUT_CHECKS if check.name == "launch")
    for check in (MODELS, BACKEND, *(check for check in INPUT_CHECKS if check is not launch)):
        yield from _look(check, state, wrong)
    # without parallel.data a launch may have more ranks than the fewest
    yield from _contents(state, ranks if config.parallel.data is not None else None, wrong)


def _cheap(state: State, launch: Launch, wrong: set[str]) -> Iterator[Finding]:
    for check in CHEAP_CHECKS:
        faults = list(check.find(launch))
        for fault in faults:
            level: dict[str, Finding] = {
                "refused": Finding("FAIL", fault.key, fault.text),
                "not yet made": Finding("warn", fault.key, fault.text),
                "warning": Finding("warn", fault.key, fault.text),
            }
            yield level[fault.level]
            if fault.level == "refused":
                wrong.add(fault.key)
            if fault.level == "not yet made":
                state.responses_there = False
        if not faults:
            yield Finding("ok", check.name, check.tell(launch))
    state.done.append("launch")


def _blocked(check: StartCheck, config: Config, wrong: set[str]) -> str | None:
    """The key that is wrong already, so that looking again would only say it twice."""
    keys = tuple(model_paths(config)) if check is MODELS else BLOCKED_BY.get(check.name, ())
    return next((key for key in keys if key in wrong), None)


def _look(check: StartCheck, state: State, wrong: set[str]) -> Iterator[Finding]:
    """Run one check and tell what it says."""
    if (key := _blocked(check, state.config, wrong)) is not None:
        yield Finding("skip", check.name, f"not looked at while {key} is wrong")
        return
    missing = next((name for name in check.needs if not state.has(name)), None)
    if missing is not None:
        yield Finding("skip", check.name, f"not looked at: it needs {FIELDS[missing]}")
        return
    with _said() as said:
        try:
            take(check, state, check.look(state))
        except TropdError as error:
            state.done.append(check.name)
            problems = str(error).splitlines()
        else:
            problems = []
    yield from (Finding("warn", check.name, line) for line in said)
    if problems and set(problems) <= wrong:
        yield Finding("skip", check.name, "it meets what is told above")
    yield from (Finding("FAIL", check.name, line) for line in problems if line not in wrong)
    wrong.update(problems)
    if not said and not problems:
        yield Finding("ok", check.name, TOLD[check.name](state))


def _contents(state: State, ranks: int | None, wrong: set[str]) -> Iterator[Finding]:
    """The checks that need digests, which are read only where there is something to compare them with."""
    if state.has("models") and _has_records(state):
        try:
            state.inputs = read_inputs_alone(state, ranks=ranks, platform=state.platform)
        except TropdError as error:
            yield from (Finding("FAIL", "resume", line) for line in str(error).splitlines())
            return
        for check in CONTENT_CHECKS:
            yield from _look(check, state, wrong)
        return
    state.done += [check.name for check in CONTENT_CHECKS]
    if state.has("opened"):
        yield Finding("ok", "resume", "no record of earlier launches, of a replayed run or of stored responses")


def _has_records(state: State) -> bool:
    """Whether there is anything that contents are compared with."""
    config, responses = state.config, state.config.data.teacher_responses
    begun = state.opened is not None and state.opened.before.begun
    reads = reads_responses(config) and state.responses_there
    try:
        answered = reads and responses is not None and load_origin(responses) is not None
        return begun or config.run.replay is not None or answered
    except TropdError:
        return True


@contextmanager
def _said() -> Iterator[list[str]]:
    """Collect the warnings that are logged in the block; other lines are shown once the block takes QUIET_S seconds."""
    warnings: list[str] = []
    begun = time.monotonic()
    logger = logging.getLogger("tropd_mcore")

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                warnings.append(record.getMessage())
            elif time.monotonic() - begun > QUIET_S:
                logging.getLogger().handle(record)

    collector, propagated = Collector(), logger.propagate
    logger.addHandler(collector)
    logger.propagate = False
    try:
        yield warnings
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagated


FIELDS = {
    "models": "the models' config.json",
    "opened": "the run directory",
    "renderer": "the student's tokenizer",
    "ends": "the end tokens",
    "day": "the day of the run",
    "prompts": "the prompts",
    "inputs": "what the run reads",
}
"""Field of the state -> what it is, for a check that could not look."""


def _run_dir(state: State) -> str:
    assert state.opened is not None
    run_dir, checkpoint = state.run_dir.root, state.opened.checkpoint
    if checkpoint is not None:
        return f"{run_dir} holds a run, which goes on from {checkpoint.name}"
    return f"{run_dir} {'holds no checkpoint' if run_dir.exists() else 'will be created'}"


def _prompts(state: State) -> str:
    assert state.prompts is not None
    without = "" if state.responses_there else "; without the teacher responses, which are not yet made"
    return f"{len(state.prompts.prompts)} of up to {state.prompts.longest_prompt} tokens{without}"


def _resume(state: State) -> str:
    begun = state.opened is not None and state.opened.before.begun
    return "the contents are those of the launches before" if begun else "nothing was trained here before"


TOLD: dict[str, Callable[[State], str]] = {
    "config.json": lambda state: ", ".join(f"{key}: {arch.family}" for key, arch in state.models.items()),
    "loss.backend": lambda state: f"{state.config.loss.backend} on {state.platform}",
    "run.dir": _run_dir,
    "weights": lambda state: "names and shapes are those of config.json",
    "tokenizer": lambda state: (
        "turns text into the ids that its tokenizer.json says"
        if state.config.gates.tokenizer
        else "not looked at (gates.tokenizer=false)"
    ),
    "vocabulary": lambda state: (
        "same id for the same token in every model"
        if state.config.gates.vocabulary
        else "not compared (gates.vocabulary=false)"
    ),
    "objective": lambda state: state.config.objective.kind,
    "student.path": lambda state: str(state.config.student.path),
    "loss.ignore_tokens": lambda state: f"{len(state.config.loss.ignore_tokens)} named",
    "rollout.end_tokens": lambda state: state.ends.describe() if state.ends is not None else "",
    "data.template_date": lambda state: str(state.day),
    "data.prompts": _prompts,
    "lengths": lambda state: f"a sample has at most {state.longest} tokens, which packs and contexts hold",
    "objective.template": lambda state: "fits every prompt" if state.solutions is not None else "not used",
    "teacher.extra_tokens": lambda state: f"{len(state.excluded or ())} tokens of the teacher are no candidates",
    "resume": _resume,
    "run.replay": lambda state: str(state.config.run.replay or "not used"),
    "data.teacher_responses": lambda state: (
        "those of this teacher to these prompts" if reads_responses(state.config) else "not used"
    ),
}
"""Check -> the text of its ok line."""
