"""One list of all start checks that need no server and no model in memory. The job and `tropd doctor` run it.

The checks themselves are in `preflight`, `loaded_inputs`, `start`, `stored_responses` and `replayed_run`. Gates, which
need models, are not in the list. Invariants: a check depends only on the configuration, the files and the results of
earlier checks, so its result is the same on every machine that has the files. A check writes nothing. Nothing runs a
check that is not in the list.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import TYPE_CHECKING

from tropd_mcore.config.checks import backend_problems
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import folders_of
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.end_tokens import EndTokens, end_tokens
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.data.supervision import IgnoredTokens, ignored_tokens
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.collective import on_rank_zero, raise_on_all_ranks
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.solutions import SolutionPrompts
from tropd_mcore.train import loaded_inputs, replayed_run, start, stored_responses
from tropd_mcore.train.ground import NamedModels
from tropd_mcore.train.inputs import Inputs
from tropd_mcore.train.loaded_inputs import LoadedInputs
from tropd_mcore.train.preflight import cheap
from tropd_mcore.train.start import Opened
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.served import ServedModel

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext

log = logging.getLogger(__name__)


@dataclass
class State(NamedModels):
    """Input and results of the checks. It is a ground (`train.ground`) once the models have been read."""

    config: Config
    run_dir: RunDir
    models: Mapping[str, Architecture | ServedModel] = field(default_factory=dict)
    platform: str = "auto"
    """`cpu` or `cuda` once it is known."""
    world_size: int | None = None
    rank: int = 0
    responses_there: bool = True
    """False if `tropd prefixes` has not made the responses yet. The prompts are then read without them."""
    opened: Opened | None = None
    renderer: Renderer | None = None
    ignored: IgnoredTokens | None = None
    ends: EndTokens | None = None
    day: date | None = None
    prompts: PromptSet | None = None
    longest: int | None = None
    solutions: SolutionPrompts | None = None
    excluded: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    held_out: PromptSet | None = None
    inputs: Inputs | None = None
    """Inputs of the launch by content; computed between INPUT_CHECKS and CONTENT_CHECKS."""
    done: list[str] = field(default_factory=list)
    """Names of the checks that have run, for tests and messages."""

    @classmethod
    def of(cls, context: JobContext) -> State:
        """Return the state of a job before its checks."""
        layout = context.layout
        return cls(
            context.config, context.run_dir, context.models, context.platform.name, layout.world_size, layout.rank
        )

    def has(self, name: str) -> bool:
        """Return whether an earlier check has set the field `name`."""
        return bool(self.models) if name == "models" else getattr(self, name) is not None

    def loaded_inputs(self) -> LoadedInputs:
        """Return everything that was read. Call it after the last check of INPUT_CHECKS."""
        assert self.renderer is not None and self.prompts is not None and self.ignored is not None
        assert self.longest is not None and self.ends is not None and self.excluded is not None
        assert self.day is not None
        return LoadedInputs(
            self.renderer, self.prompts, self.ignored, self.longest, self.solutions, self.ends, self.excluded, self.day,
            self.held_out,
        )  # fmt: skip


@dataclass(frozen=True)
class StartCheck:
    """One check of the list."""

    name: str
    """Configuration key or section that it checks."""
    look: Callable[[State], object]
    """Performs the check. Raises TropdError with every problem; its return value is stored in the field `keeps`."""
    keeps: str | None = None
    needs: tuple[str, ...] = ("models",)
    """Fields of the state that it requires."""
    alone: bool = True
    """Whether rank 0 runs it and sends the result to all ranks. Otherwise every rank runs it."""


def take(check: StartCheck, state: State, value: object) -> None:
    """Store the result of `check` in `state`."""
    state.done.append(check.name)
    if check.keeps is not None:
        setattr(state, check.keeps, value)


def run_checks(checks: Iterable[StartCheck], state: State, context: JobContext) -> None:
    """Run `checks` in a job. Collective: all ranks get the results, or all raise TropdError."""
    control = context.layout.groups.control
    for check in checks:
        if check.alone:
            value = on_rank_zero(partial(check.look, state), control)
        else:
            # Every rank reads, perhaps from its own disk. If one rank cannot read, all ranks raise.
            value = None
            with raise_on_all_ranks(control):
                value = check.look(state)
        take(check, state, value)


def run_before_groups(checks: Iterable[StartCheck], state: State) -> None:
    """Run `checks` on each rank separately, before there are process groups. Raises TropdError."""
    for check in checks:
        take(check, state, check.look(state))


def _launch(state: State) -> None:
    problems = cheap(state.config, world_size=state.world_size)
    if problems:
        raise ConfigError(problems)


def _backend(state: State) -> None:
    if problems := backend_problems(state.config.loss.backend, state.platform):
        raise ConfigError(problems)


def _ignored(state: State) -> IgnoredTokens:
    assert state.renderer is not None
    return ignored_tokens(state.config.loss, state.renderer.token_id)


def _ends(state: State) -> EndTokens:
    assert state.renderer is not None
    return end_tokens(state.config, state.renderer, folders_of(state.config))


def _prompts(state: State) -> PromptSet:
    assert state.renderer is not None and state.ends is not None and state.day is not None
    return loaded_inputs.read_prompts(
        state,
        state.renderer,
        state.ends,
        state.day,
        answers=state.rank == 0,
        responses=state.responses_there,
    )


def _lengths(state: State) -> int:
    assert state.prompts is not None
    return loaded_inputs.check_lengths(state, state.prompts)


def _solutions(state: State) -> SolutionPrompts | None:
    assert state.renderer is not None and state.prompts is not None
    return loaded_inputs.solution_prompts(state, state.renderer, state.prompts)


def _held_out(state: State) -> PromptSet | None:
    assert state.renderer is not None and state.ends is not None and state.day is not None
    assert state.prompts is not None
    return loaded_inputs.read_held_out(state, state.renderer, state.ends, state.day, state.prompts)


def _contents(state: State) -> Inputs:
    assert state.opened is not None and state.inputs is not None
    return start.compare_contents(state, state.opened, state.inputs)


def _replayed(state: State) -> None:
    assert state.inputs is not None
    replayed_run.check_replayed(state.config, state.inputs)


def _responses(state: State) -> None:
    assert state.inputs is not None and state.prompts is not None
    stored_responses.check_responses(state, state.inputs, state.prompts)
    if state.held_out is not None:
        stored_responses.check_held_out(state, state.inputs, state.held_out)


MODELS = StartCheck(
    "config.json", lambda state: loaded_inputs.read_models(state.config), "models", needs=(), alone=False
)
BACKEND = StartCheck("loss.backend", _backend, needs=(), alone=False)
BEFORE_GROUPS = (MODELS, BACKEND)
"""Checks that every rank runs before it has joined the others."""

INPUT_CHECKS = (
    StartCheck("launch", _launch, needs=()),
    StartCheck("run.dir", lambda state: start.open_launch(state), "opened"),
    StartCheck("weights", lambda state: loaded_inputs.check_weights(state)),
    StartCheck("tokenizer", lambda state: loaded_inputs.check_tokenizers(state)),
    StartCheck("vocabulary", lambda state: loaded_inputs.check_vocabularies(state)),
    StartCheck(
        "objective",
        lambda state: [objective_of(part) for part in state.config.objective.parts],
        needs=(),
        alone=False,
    ),
    StartCheck("student.path", lambda state: Renderer(state.config.student.path), "renderer", alone=False),
    StartCheck("loss.ignore_tokens", _ignored, "ignored", needs=("renderer",), alone=False),
    StartCheck("rollout.end_tokens", _ends, "ends", needs=("renderer",), alone=False),
    StartCheck("data.template_date", lambda state: loaded_inputs.template_day(state), "day", needs=()),
    StartCheck("data.prompts", _prompts, "prompts", needs=("models", "renderer", "ends", "day"), alone=False),
    StartCheck("lengths", _lengths, "longest", needs=("models", "prompts"), alone=False),
    StartCheck("objective.template", _solutions, "solutions", needs=("models", "prompts"), alone=False),
    StartCheck("teacher.extra_tokens", lambda state: loaded_inputs.excluded_tokens(state), "excluded"),
    StartCheck("held_out", _held_out, "held_out", needs=("models", "renderer", "ends", "day", "prompts"), alone=False),
)
"""Checks of files and settings before anything is built."""

CONTENT_CHECKS = (
    StartCheck("resume", _contents, "inputs", needs=("opened", "inputs")),
    StartCheck("run.replay", _replayed, needs=("inputs",)),
    StartCheck("data.teacher_responses", _responses, needs=("inputs", "prompts")),
)
"""Checks that compare contents with records. They need `state.inputs`."""

START_CHECKS = (*BEFORE_GROUPS, *INPUT_CHECKS, *CONTENT_CHECKS)
"""All start checks in order."""
