"""Checks that the stored responses of this run come from its teacher and answer its prompts.

This module does not parse the responses (`data.responses`). In a resumed run their content is compared with the record
instead (`train.resume`). Invariant: a difference from the record is refused, or only reported if the date in the chat
template may be its only cause.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tropd_mcore.data.prompts import PromptSet
from tropd_mcore.errors import DataError
from tropd_mcore.rollout.response_origin import load_origin, origin_file, prompt_digests, say_unknown
from tropd_mcore.train.ground import Ground
from tropd_mcore.weights.digest import FolderDigest

log = logging.getLogger(__name__)


def check_responses(ground: Ground, teacher: FolderDigest, prompts: PromptSet) -> None:
    """Compare the record beside data.teacher_responses with teacher and prompts, if the run uses them.

    Raises DataError if the responses come from another teacher, or answer other prompts under the same ids.
    """
    config = ground.config
    path = config.data.teacher_responses
    taught = any(not part.samples for part in config.objective.parts)  # these train on responses in a replay too
    if path is None or not config.objective.reads_responses or (config.run.replay is not None and not taught):
        return
    _check("data.teacher_responses", path, ground, teacher, prompts)


def check_held_out(ground: Ground, teacher: FolderDigest, prompts: PromptSet) -> None:
    """The same for the file held_out.responses. Raises DataError."""
    held_out = ground.config.held_out
    assert held_out is not None, "there are held-out prompts"
    _check("held_out.responses", held_out.responses, ground, teacher, prompts)


def _check(key: str, path: Path, ground: Ground, teacher: FolderDigest, prompts: PromptSet) -> None:
    origin = load_origin(path)
    answered = [prompt.prompt_id for prompt in prompts.prompts if prompt.teacher_response_ids is not None]
    unknown = [name for name in answered if origin is None or name not in origin.prompts]
    if unknown:
        say_unknown(path, len(unknown))
    if origin is None or len(unknown) == len(answered):
        return
    way_out = (
        f"sample them again (`tropd prefixes` to another file), or remove {origin_file(path)} to take them as they are"
    )
    changes = origin.other_teacher(teacher)
    if changes is not None:
        raise DataError(
            f"{key}={path}: responses of another teacher ({origin.teacher}) than "
            f"teacher.path={ground.config.teacher.path}: {changes}; {way_out}"
        )
    others = origin.other_prompts(prompt_digests(prompts.prompts), answered)
    if not others:
        return
    what = f"{key}={path}: {len(others)} responses answer another text than the prompt with their id here"
    if origin.day is not None and prompts.printed_date not in (None, origin.day):
        log.warning("%s (the first is %r): the template printed %s there, %s here; set data.template_date=%s",
                    what, others[0], origin.day, prompts.printed_date, origin.day)  # fmt: skip
        return
    raise DataError(f"{what}, the first is {others[0]!r}; {way_out}")
