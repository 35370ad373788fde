"""Reads prompts and stored teacher responses once, checks everything that the run needs of them, and serves them by
step.

The lines of the files are parsed in `prompt_file` and `responses`; guidance is in `requests`. Invariants: all problems
of the files are reported at once, with their lines. A prompt that is served has everything that its step needs. The
prompts of a step are a pure function of (file, seed, step), so a resumed run needs no cursor.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.phase_checks import of_each_phase
from tropd_mcore.config.schema import Config, DataConfig, VerifierConfig
from tropd_mcore.config.teachers import DEFAULT, names_of
from tropd_mcore.data.chat import RawPrompt, Renderer
from tropd_mcore.data.chat_template import Chat, unread
from tropd_mcore.data.jsonl import Problem, raise_problems
from tropd_mcore.data.prompt_file import PromptRecord, scan_prompt_file
from tropd_mcore.data.responses import Responses, scan_responses
from tropd_mcore.data.verify import answer_problem
from tropd_mcore.errors import DataError
from tropd_mcore.progress import counted, progress
from tropd_mcore.types import Prompt

DATE_STRING = "%d %b %Y"
"""Date format of Llama's templates."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptNeeds:
    """What a run needs of every prompt. By default it needs only tokens."""

    responses: str | None = None
    """Reason and remedy, for the message, why every prompt needs a stored teacher response; None = prompts may lack
    them"""
    answers: str | None = None
    """Reason, for the message, why every prompt needs an answer; None = prompts may lack answers"""
    verifier: VerifierConfig | None = None
    """Settings by which answers are checked: an answer that no response can have is a problem. None = not checked"""
    vocab_size: int | None = None
    """Ids must be below it; None = not checked"""
    end_ids: Collection[int] | None = None
    """Ids that end a response; None = the end ids of the renderer's model"""
    limit: int | None = None
    """Number of prompts to take from the start of the file; None = all"""
    keys: tuple[str, str] = ("data.prompts", "data.teacher_responses")
    """Configuration keys of the two files, for messages"""
    teachers: tuple[str, ...] | None = None
    """Names that a prompt may give as its teacher, () in a run with one teacher; None = names are not read"""


class PromptSet:
    """All prompts, with their order in each pass."""

    def __init__(
        self,
        prompts: list[Prompt],
        *,
        shuffle: bool,
        seed: int,
        raw_prompts: Mapping[str, RawPrompt] | None = None,
        printed_date: date | None = None,
    ) -> None:
        assert prompts, "a prompt set without prompts"
        self.prompts = prompts
        self.raw_prompts = raw_prompts or {}
        """Prompt id -> the prompt before rendering."""
        self.printed_date = printed_date
        """The date that the prompts print; None if they print none."""
        self._shuffle = shuffle
        self._order = lru_cache(maxsize=2)(lambda number: _permutation(len(prompts), seed, number))

    @property
    def longest_prompt(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def longest_response(self) -> int:
        """Length of the longest stored teacher response, in tokens without EOS; 0 if there are none."""
        responses = (prompt.teacher_response_ids for prompt in self.prompts)
        return max((len(response) for response in responses if response is not None), default=0)

    def at_step(self, step: int, count: int) -> list[Prompt]:
        """Return the `count` prompts of `step` (from 0). Passes through the file follow each other without a gap."""
        return [self._at(position) for position in range(step * count, (step + 1) * count)]

    def _at(self, position: int) -> Prompt:
        number, index = divmod(position, len(self.prompts))
        return self.prompts[int(self._order(number)[index]) if self._shuffle else index]


def needs_of(config: Config, *, vocab_size: int, end_ids: Collection[int]) -> PromptNeeds:
    """Return what training with `config` needs of its prompts. `vocab_size` is the student's."""
    responses = list(of_each_phase(_need_of_responses)(config))
    answers = list(of_each_phase(_need_of_answers)(config))
    return PromptNeeds(
        responses=responses[0] if responses else None,
        answers=answers[0] if answers else None,
        verifier=config.verifier,
        vocab_size=vocab_size,
        end_ids=end_ids,
        teachers=names_of(config),
    )


def _need_of_responses(config: Config) -> Iterator[str]:
    objective = config.objective
    if objective.active_guidance is not None and config.run.replay is None:
        yield "objective.guidance is enabled; add it (`tropd prefixes`) or set objective.guidance.enabled=false"
    if not objective.samples:
        yield f"objective.kind={objective.kind} trains on it; add it (`tropd prefixes`) or remove the prompt"


def _need_of_answers(config: Config) -> Iterator[str]:
    if config.objective.learns_from_verifier:
        yield (f"objective.kind={config.objective.kind} learns from a verifier; add it, or choose another objective")


def load_prompts(
    config: DataConfig, renderer: Renderer, *, seed: int, needs: PromptNeeds | None = None, today: date | None = None
) -> PromptSet:
    """Read and render `data.prompts`, merge `data.teacher_responses` by id, and check `needs`.

    `today`: the day that chat templates print if data.template_date is None; None = the day of the call. Raises
    DataError with all problems of both files.
    """
    needs = needs or PromptNeeds()
    records, problems = scan_prompt_file(config.prompts, key=needs.keys[0])
    records = records[: needs.limit]
    variables = _variables(config, renderer, any(not isinstance(record.prompt, str) for record in records))
    day = config.template_date or today or date.today()
    raw_prompts = {record.prompt_id: _raw_prompt(record, variables, day) for record in records}
    responses = _responses(config, renderer, needs)
    known = responses.by_prompt.keys() | responses.bad_ids
    prompts: list[Prompt] = []
    with progress(log, f"{config.prompts}: rendering", total=len(records), unit="prompts") as state:
        for record in counted(records, state):
            where = f"{config.prompts}:{record.line}: prompt {record.prompt_id!r}"
            try:
                token_ids = renderer.prompt_ids(raw_prompts[record.prompt_id])
            except DataError as error:
                problems.append(Problem(record.line, f"{where}: {error}"))
                continue
            response = responses.by_prompt.get(record.prompt_id)
            finished = record.prompt_id not in responses.cut
            teacher = named_teacher(record.teacher, needs.teachers) if needs.teachers else None
            prompts.append(Prompt(record.prompt_id, token_ids, record.answer, response, finished, teacher))
            missing = needs.responses is not None and record.prompt_id not in known
            problems += [
                Problem(record.line, f"{where} {text}")
                for text in _problems(prompts[-1], config, needs, missing=missing)
            ]
    problems += _answer_problems(records, config.prompts, needs.verifier)
    problems += teacher_problems(records, config.prompts, needs.teachers, key=needs.keys[0])
    foreign = _foreign(prompts, responses, config, needs.keys[1]) if needs.responses else ()
    raise_problems(problems, [*responses.problems, *foreign])
    printed = _check_date(config, renderer, raw_prompts.values(), day)
    return PromptSet(prompts, shuffle=config.shuffle, seed=seed, raw_prompts=raw_prompts, printed_date=printed)


def named_teacher(found: str | None, teachers: Collection[str]) -> str | None:
    """Return the teacher of a line whose field `teacher` is `found`: itself, or `default` if the line has none."""
    return found or (DEFAULT if DEFAULT in teachers else None)


def teacher_problems(
    records: Sequence[PromptRecord], path: Path, teachers: tuple[str, ...] | None, *, key: str = "data.prompts"
) -> Iterator[Problem]:
    """Yield the lines whose teacher is unknown, and the teachers of `teachers` that no line has (see `PromptNeeds`)."""
    if teachers is None:
        return
    for record in records:
        if (text := _teacher_problem(record, teachers)) is not None:
            yield Problem(record.line, f"{path}:{record.line}: prompt {record.prompt_id!r}: {text}")
    idle = set(teachers) - {named_teacher(record.teacher, teachers) for record in records}
    if records and key == "data.prompts":
        for name in sorted(idle):
            yield Problem(
                0,
                f"teachers.{name}: no prompt of {path} has this teacher; remove the entry, or name it in the field "
                "`teacher` of its lines",
            )


def _teacher_problem(record: PromptRecord, teachers: tuple[str, ...]) -> str | None:
    found, known = record.teacher, ", ".join(teachers)
    if not teachers:
        if found is None:
            return None
        return f"names the teacher {found!r}, but the configuration has no `teachers`; add them, or remove the field"
    if found is None:
        if DEFAULT in teachers:
            return None
        return f"expected a field `teacher` with one of {known}, found none; add it, or an entry teachers.{DEFAULT}"
    if found in teachers:
        return None
    other = next((name for name in teachers if name.lower() == found.lower()), None)
    hint = f"did you mean {other!r}? Expected" if other is not None else "expected"
    return f"teacher {found!r} is not in `teachers`; {hint} one of {known}"


def _raw_prompt(record: PromptRecord, variables: Mapping[str, Any], day: date) -> RawPrompt:
    """The prompt of a line. Template variables of the line override those of the configuration."""
    if isinstance(record.prompt, str):
        return record.prompt
    return Chat(record.prompt, record.tools, {**variables, **record.template_kwargs}, day)


def _variables(config: DataConfig, renderer: Renderer, has_chats: bool) -> dict[str, Any]:
    """The template variables of every chat. Raises DataError if the template does not read one of them."""
    if not has_chats and not config.chat_template_kwargs:
        return {}
    read = renderer.template.variables() | renderer.template.variables(with_tools=True)
    unknown = unread(config.chat_template_kwargs, read)
    if unknown is not None:
        raise DataError(f"data.chat_template_kwargs: {unknown}")
    variables = dict(config.chat_template_kwargs)
    if config.template_date is not None and "date_string" in read:
        variables.setdefault("date_string", config.template_date.strftime(DATE_STRING))
    return variables


def _responses(config: DataConfig, renderer: Renderer, needs: PromptNeeds) -> Responses:
    if config.teacher_responses is None:
        return Responses({}, frozenset(), [], frozenset())
    end_ids = renderer.eos_ids if needs.end_ids is None else needs.end_ids
    return scan_responses(config.teacher_responses, end_ids, vocab_size=needs.vocab_size, key=needs.keys[1])


def _problems(prompt: Prompt, config: DataConfig, needs: PromptNeeds, *, missing: bool) -> Iterator[str]:
    """The problems of a prompt for a run with these needs. `missing`: its response is not in the file."""
    length, limit = len(prompt.token_ids), config.max_prompt_tokens
    if length > limit:
        yield f"has {length} tokens but data.max_prompt_tokens is {limit}"
    largest = int(prompt.token_ids.max())
    if needs.vocab_size is not None and largest >= needs.vocab_size:
        yield f"holds token id {largest}; expected ids in [0, {needs.vocab_size}), the student's vocabulary"
    if needs.answers is not None and prompt.answer is None:
        yield f"has no `answer`, but {needs.answers}"
    if missing:
        yield f"has no response in {needs.keys[1]}={config.teacher_responses}, but {needs.responses}"


def _foreign(prompts: list[Prompt], responses: Responses, config: DataConfig, key: str) -> Iterator[Problem]:
    if responses.by_prompt and prompts and all(prompt.teacher_response_ids is None for prompt in prompts):
        yield Problem(
            0,
            f"{config.teacher_responses}: none of its {len(responses.by_prompt)} ids is the id of a prompt in "
            f"{config.prompts}; {key} belongs to other prompts: make the right ones with `tropd prefixes`"
            + (f", or set objective.guidance.enabled=false and {key}=null" if key.startswith("data.") else ""),
        )


def _answer_problems(records: list[PromptRecord], path: Path, verifier: VerifierConfig | None) -> Iterator[Problem]:
    """Problems of answers that no response can have. Mathematics costs some milliseconds per distinct answer."""
    if verifier is None or verifier.kind == "none":
        return
    judged = [(record, record.answer) for record in records if record.answer is not None]
    found: dict[str, str | None] = {}
    with progress(log, f"{path}: reading answers", total=len(judged), unit="answers") as state:
        for record, answer in counted(judged, state):
            if answer not in found:
                found[answer] = answer_problem(verifier, answer)
            problem = found[answer]
            if problem is not None:
                yield Problem(record.line, f"{path}:{record.line}: prompt {record.prompt_id!r}: {problem}")


def _check_date(config: DataConfig, renderer: Renderer, raw_prompts: Collection[RawPrompt], day: date) -> date | None:
    """Return the day that the prompts print, None if they print none. Raises DataError if a set day is never
    printed."""
    chats = [chat for chat in raw_prompts if isinstance(chat, Chat)]
    if any(renderer.template.prints_date(chat) for chat in chats):
        if config.template_date is None:
            log.warning(
                "the chat template prints a date, which is %s in every prompt of this run; set data.template_date=%s "
                "to have it in other runs too",
                day,
                day,
            )
        return day
    if config.template_date is None:
        return None
    if not any("date_string" in chat.variables for chat in chats):
        raise DataError(
            f"data.template_date={config.template_date}: no prompt of {config.prompts} prints it; remove it"
        )
    return day


def _permutation(count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """The order of the prompts in pass `number`."""
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(count)
