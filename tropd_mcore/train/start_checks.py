"""Every check of a start that needs no server and no model in memory, in one list: the job and `tropd doctor` run it.

Not for the checks themselves (`preflight`, `loaded_inputs`, `start`, `stored_responses`, `replayed_run`) or for gates,
which need models. Invariants: a check is a function of the configuration, the files and what earlier checks found, so
it says the same on any machine that has the files; it writes nothing; a check that is not in the list is run by nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from typing import TYPE_CHECKING

from tropd_mcore.config.checks import backend_problems
from tropd_mcore.config.schema import Config
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

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext

log = logging.getLogger(__name__)


@dataclass
class State(NamedModels):
    """What the checks look at, and what they have found so far. A ground (`train.ground`) once the models are read."""

    config: Config
    run_dir: RunDir
    models: dict[str, Architecture] = field(default_factory=dict)
    platform: str = "auto"
    """`cpu` or `cuda` once that is known."""
    world_size: int | None = None
    rank: int = 0
    responses_there: bool = True
    """False where `tropd prefixes` has still to make them: then the prompts are read without."""
    opened: Opened | None = None
    renderer: Renderer | None = None
    ignored: IgnoredTokens | None = None
    ends: EndTokens | None = None
    day: date | None = None
    prompts: PromptSet | None = None
    longest: int | None = None
    solutions: SolutionPrompts | None = None
    excluded: tuple[int, ...] | None = None
    inputs: Inputs | None = None
    """What the launch reads, by content; made between the two lists of checks."""
    done: list[str] = field(default_factory=list)
    """Names of the checks that were run, for tests and messages."""

    @classmethod
    def of(cls, context: JobContext) -> State:
        """The state of a job whose checks have not begun."""
        layout = context.layout
        return cls(
            context.config, context.run_dir, context.models, context.platform.name, layout.world_size, layout.rank
        )

    def has(self, name: str) -> bool:
        """Whether an earlier check has found the field `name`."""
        return bool(self.models) if name == "models" else getattr(self, name) is not None

    def loaded_inputs(self) -> LoadedInputs:
        """All that was read, after the last check of INPUT_CHECKS."""
        assert self.renderer is not None and self.prompts is not None and self.ignored is not None
        assert self.longest is not None and self.ends is not None and self.excluded is not None
        assert self.day is not None
        return LoadedInputs(
            self.renderer, self.prompts, self.ignored, self.longest, self.solutions, self.ends, self.excluded, self.day
        )


@dataclass(frozen=True)
class StartCheck:
    """One check of the list."""

    name: str
    """The configuration key, or section, that it is about."""
    look: Callable[[State], object]
    """Raises TropdError with everything that is wrong; what it returns is kept in the field `keeps`."""
    keeps: str | None = None
    needs: tuple[str, ...] = ("models",)
    """Fields of the state without which it cannot look."""
    alone: bool = True
    """Whether rank 0 looks for all ranks, and what it found is sent to them; else every rank reads by itself."""


def take(check: StartCheck, state: State, value: object) -> None:
    """Keep what `check` found."""
    state.done.append(check.name)
    if check.keeps is not None:
        setattr(state, check.keeps, value)


def run_checks(checks: Iterable[StartCheck], state: State, context: JobContext) -> None:
    """Run `checks` in a job. Collective: all ranks get what was found, or an error. Raises TropdError."""
    control = context.layout.groups.control
    for check in checks:
        if check.alone:
            value = on_rank_zero(partial(check.look, state), control)
        else:
            # Every rank reads, perhaps from a disk of its own: what one alone cannot read is met by all.
            value = None
            with raise_on_all_ranks(control):
                value = check.look(state)
        take(check, state, value)


def run_before_groups(checks: Iterable[StartCheck], state: State) -> None:
    """Run `checks` on each rank by itself, before there are groups. Raises TropdError."""
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
    return end_tokens(state.config, state.renderer, state.config.teacher.path)


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


def _contents(state: State) -> Inputs:
    assert state.opened is not None and state.inputs is not None
    return start.compare_contents(state, state.opened, state.inputs)


def _replayed(state: State) -> None:
    assert state.inputs is not None
    replayed_run.check_replayed(state.config, state.inputs)


def _responses(state: State) -> None:
    assert state.inputs is not None and state.prompts is not None
    teacher = state.inputs.models["teacher.path"].digest
    stored_responses.check_responses(state, teacher, state.prompts)


MODELS = StartCheck(
    "config.json", lambda state: loaded_inputs.read_models(state.config), "models", needs=(), alone=False
)
BACKEND = StartCheck("loss.backend", _backend, needs=(), alone=False)
BEFORE_GROUPS = (MODELS, BACKEND)
"""What every rank looks at before it knows the others."""

INPUT_CHECKS = (
    StartCheck("launch", _launch, needs=()),
    StartCheck("run.dir", lambda state: start.open_launch(state), "opened"),
    StartCheck("weights", lambda state: loaded_inputs.check_weights(state)),
    StartCheck("tokenizer", lambda state: loaded_inputs.check_tokenizers(state)),
    StartCheck("vocabulary", lambda state: loaded_inputs.check_vocabularies(state)),
    StartCheck("objective", lambda state: objective_of(state.config.objective), needs=(), alone=False),
    StartCheck("student.path", lambda state: Renderer(state.config.student.path), "renderer", alone=False),
    StartCheck("loss.ignore_tokens", _ignored, "ignored", needs=("renderer",), alone=False),
    StartCheck("rollout.end_tokens", _ends, "ends", needs=("renderer",), alone=False),
    StartCheck("data.template_date", lambda state: loaded_inputs.template_day(state), "day", needs=()),
    StartCheck("data.prompts", _prompts, "prompts", needs=("models", "renderer", "ends", "day"), alone=False),
    StartCheck("lengths", _lengths, "longest", needs=("models", "prompts"), alone=False),
    StartCheck("objective.template", _solutions, "solutions", needs=("models", "prompts"), alone=False),
    StartCheck("teacher.extra_tokens", lambda state: loaded_inputs.excluded_tokens(state), "excluded"),
)
"""What is read and looked at before anything is built."""

CONTENT_CHECKS = (
    StartCheck("resume", _contents, "inputs", needs=("opened", "inputs")),
    StartCheck("run.replay", _replayed, needs=("inputs",)),
    StartCheck("data.teacher_responses", _responses, needs=("inputs", "prompts")),
)
"""What compares contents with records; `state.inputs` is there."""

START_CHECKS = (*BEFORE_GROUPS, *INPUT_CHECKS, *CONTENT_CHECKS)
"""All checks of a start, in their order."""
