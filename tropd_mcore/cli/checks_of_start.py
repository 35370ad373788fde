"""Findings of `tropd doctor` from the checks that a job makes before it starts its first server and model.

The checks themselves are in `train.start_checks`; all of them run here, and no others. Invariants: nothing is written
and no server is started. A check that lacks its inputs is reported as skipped, never as ok. The text of a FAIL is the
message with which the job would end.
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
"""A check that takes longer than this shows its log lines, so that it does not look stuck."""

BLOCKED_BY: dict[str, tuple[str, ...]] = {
    "run.dir": ("run.dir", "run.init_from"),
    "data.prompts": ("data.prompts",),
    "held_out": ("held_out.prompts", "held_out.responses"),
    "run.replay": ("run.replay",),
}
"""Check -> keys that a cheap check may have found wrong already. The check would then repeat it. See `_blocked`."""


def start_checks(config: Config, *, nodes: int = 1, state: State | None = None) -> Iterator[Finding]:
    """Yield the findings of all checks of a start. `nodes` is the number of machines. If `state` is given, it is
    filled."""
    state = state or State(config, RunDir(config.run.dir))
    wrong: set[str] = set()  # keys and lines that were reported already
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
    """The key that was found wrong already, so that the check would only report it twice; else None."""
    keys = tuple(model_paths(config)) if check is MODELS else BLOCKED_BY.get(check.name, ())
    return next((key for key in keys if key in wrong), None)


def _look(check: StartCheck, state: State, wrong: set[str]) -> Iterator[Finding]:
    """Run one check and yield its findings."""
    if (key := _blocked(check, state.config, wrong)) is not None:
        yield Finding("skip", check.name, f"not checked while {key} is wrong")
        return
    missing = next((name for name in check.needs if not state.has(name)), None)
    if missing is not None:
        yield Finding("skip", check.name, f"not checked: it needs {FIELDS[missing]}")
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
        yield Finding("skip", check.name, "it fails for a reason reported above")
    yield from (Finding("FAIL", check.name, line) for line in problems if line not in wrong)
    wrong.update(problems)
    if not said and not problems:
        yield Finding("ok", check.name, TOLD[check.name](state))


def _contents(state: State, ranks: int | None, wrong: set[str]) -> Iterator[Finding]:
    """The checks that need digests. Digests are computed only if there is something to compare them with."""
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
    """Whether there are records to compare contents with."""
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
    """Collect the warnings logged in the block. Other lines are shown once the block has taken QUIET_S seconds."""
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
"""Field of the state -> its name in the message of a check that could not run."""


def _run_dir(state: State) -> str:
    assert state.opened is not None
    run_dir, checkpoint = state.run_dir.root, state.opened.checkpoint
    if checkpoint is not None:
        return f"{run_dir} holds a run, which resumes from {checkpoint.name}"
    return f"{run_dir} {'holds no checkpoint' if run_dir.exists() else 'will be created'}"


def _prompts(state: State) -> str:
    assert state.prompts is not None
    without = "" if state.responses_there else "; without the teacher responses, which do not exist yet"
    return f"{len(state.prompts.prompts)} of up to {state.prompts.longest_prompt} tokens{without}"


def _excluded(state: State) -> str:
    found = state.excluded or ()
    if isinstance(found, tuple):
        return f"{len(found)} candidates of the teacher are excluded"
    return "candidates that are excluded: " + ", ".join(f"{len(ids)} of {name}" for name, ids in found.items())


def _resume(state: State) -> str:
    begun = state.opened is not None and state.opened.before.begun
    return "contents are the same as at earlier launches" if begun else "nothing was trained here before"


TOLD: dict[str, Callable[[State], str]] = {
    "config.json": lambda state: ", ".join(f"{key}: {arch.family}" for key, arch in state.models.items()),
    "loss.backend": lambda state: f"{state.config.loss.backend} on {state.platform}",
    "run.dir": _run_dir,
    "weights": lambda state: "names and shapes agree with config.json",
    "tokenizer": lambda state: (
        "turns text into the ids given by its tokenizer.json"
        if state.config.gates.tokenizer
        else "not checked (gates.tokenizer=false)"
    ),
    "vocabulary": lambda state: (
        "same id for the same token in every model"
        if state.config.gates.vocabulary
        else "not compared (gates.vocabulary=false)"
    ),
    "objective": lambda state: ", then ".join(part.kind for part in state.config.objective.parts),
    "student.path": lambda state: str(state.config.student.path),
    "loss.ignore_tokens": lambda state: f"{len(state.config.loss.ignore_tokens)} named",
    "rollout.end_tokens": lambda state: state.ends.describe() if state.ends is not None else "",
    "data.template_date": lambda state: str(state.day),
    "data.prompts": _prompts,
    "lengths": lambda state: f"a sample has at most {state.longest} tokens, which fit into packs and contexts",
    "objective.template": lambda state: "fits every prompt" if state.solutions is not None else "not used",
    "teacher.extra_tokens": _excluded,
    "held_out": lambda state: (
        f"{len(state.held_out.prompts)} responses that are not trained on" if state.held_out else "not used"
    ),
    "resume": _resume,
    "run.replay": lambda state: str(state.config.run.replay or "not used"),
    "data.teacher_responses": lambda state: (
        "made by this teacher for these prompts" if reads_responses(state.config) else "not used"
    ),
}
"""Check -> text of its ok line."""
