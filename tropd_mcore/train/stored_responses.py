"""Checks that the stored responses of this run come from the teachers of its prompts and answer these prompts.

This module does not parse the responses (`data.responses`). In a resumed run their content is compared with the record
instead (`train.resume`). Invariant: a difference from the record is refused, or only reported if the date in the chat
template may be its only cause.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tropd_mcore.config.teachers import TeacherSection, teachers_of
from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError
from tropd_mcore.rollout.response_origin import (
    ResponseOrigin,
    load_origin,
    origin_file,
    prompt_digests,
    say_unknown,
)
from tropd_mcore.train.ground import Ground
from tropd_mcore.train.inputs import Inputs

log = logging.getLogger(__name__)


def check_responses(ground: Ground, inputs: Inputs, prompts: PromptSet) -> None:
    """Compare the record beside data.teacher_responses with teachers and prompts, if the run uses them.

    `inputs` has the digests of the teachers' folders. Raises DataError if a response comes from another teacher than
    that of its prompt, or answers another prompt under the same id.
    """
    config = ground.config
    path = config.data.teacher_responses
    taught = any(not part.samples for part in config.objective.parts)  # these train on responses in a replay too
    if path is None or not config.objective.reads_responses or (config.run.replay is not None and not taught):
        return
    _check("data.teacher_responses", path, ground, inputs, prompts)


def check_held_out(ground: Ground, inputs: Inputs, prompts: PromptSet) -> None:
    """The same for the file held_out.responses. Raises DataError."""
    held_out = ground.config.held_out
    assert held_out is not None, "there are held-out prompts"
    _check("held_out.responses", held_out.responses, ground, inputs, prompts)


def _check(key: str, path: Path, ground: Ground, inputs: Inputs, prompts: PromptSet) -> None:
    origin = load_origin(path)
    answered = [prompt for prompt in prompts.prompts if prompt.teacher_response_ids is not None]
    known = origin.known if origin is not None else set()
    unknown = [prompt for prompt in answered if prompt.prompt_id not in known]
    if unknown:
        say_unknown(path, len(unknown))
    for record in origin.records if origin is not None else ():
        for teacher in teachers_of(ground.config):
            mine = [
                prompt.prompt_id
                for prompt in answered
                if prompt.teacher == teacher.name and prompt.prompt_id in record.prompts
            ]
            if mine:
                _check_record(f"{key}={path}", path, teacher, record, inputs, prompts, mine)


def _check_record(
    what: str,
    path: Path,
    teacher: TeacherSection,
    origin: ResponseOrigin,
    inputs: Inputs,
    prompts: PromptSet,
    answered: list[str],
) -> None:
    """Check the responses to the prompts `answered` of a teacher, which `origin` describes."""
    way_out = (
        f"sample them again (`tropd prefixes` to another file), or remove {origin_file(path)} to take them as they are"
    )
    changes = origin.other_teacher(inputs.models[teacher.path_key].digest)
    if changes is not None:
        raise DataError(
            f"{what}: responses of another teacher ({origin.teacher}) than {teacher.path_key}={teacher.path}: "
            f"{changes}; {way_out}"
        )
    others = origin.other_prompts(prompt_digests(prompts.prompts), answered)
    if not others:
        return
    what = f"{what}: {len(others)} responses answer another text than the prompt with their id here"
    if origin.day is not None and prompts.printed_date not in (None, origin.day):
        log.warning("%s (the first is %r): the template printed %s there, %s here; set data.template_date=%s",
                    what, others[0], origin.day, prompts.printed_date, origin.day)  # fmt: skip
        return
    raise DataError(f"{what}, the first is {others[0]!r}; {way_out}")
