"""Records how stored teacher responses were made, and checks the record before they are extended or trained on.

The record is the file `<responses>.origin.json`. The responses themselves are handled in `prefixes` and
`data.responses`. Invariants: the record is written before the first response that it describes. A response whose prompt
is not in the record has unknown origin, and this is logged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tropd_mcore.errors import DataError
from tropd_mcore.files import publish_text
from tropd_mcore.types import Prompt
from tropd_mcore.weights.digest import FolderDigest

PLACE_KEY = "data.teacher_responses (or --out)"
"""The key that messages name if responses cannot be written."""

log = logging.getLogger(__name__)


class ResponseOrigin(BaseModel):
    """Which teacher answered which prompts, and with which settings."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    teacher: str
    """Folder of the teacher, only for messages"""
    files: dict[str, str]
    """{name in that folder: SHA-256}"""
    dtype: str
    temperature: float
    top_p: float
    max_new_tokens: int
    end_ids: tuple[int, ...]
    day: date | None
    """The date that appears in the prompts; None if there is none"""
    prompts: dict[str, str]
    """{prompt id: digest of its token ids}"""

    def other_teacher(self, files: FolderDigest) -> str | None:
        """Return one line about how the teacher's files differ from `files`; None if they are the same."""
        return FolderDigest(self.files).changes(files)

    def other_prompts(self, prompts: dict[str, str], answered: Collection[str]) -> list[str]:
        """Return the ids in `answered` whose recorded prompt differs from `prompts` (same form as `self.prompts`)."""
        return [name for name in answered if name in prompts and self.prompts.get(name, prompts[name]) != prompts[name]]


def origin_file(responses: Path) -> Path:
    """Return the path of the record of a response file."""
    return responses.with_name(f"{responses.name}.origin.json")


def prompt_digests(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Return {prompt id: digest of its token ids}. The digest changes with the text, the template and the tokenizer."""
    return {
        prompt.prompt_id: hashlib.sha256(prompt.token_ids.astype("<i4").tobytes()).hexdigest()[:16]
        for prompt in prompts
    }


def load_origin(responses: Path) -> ResponseOrigin | None:
    """Return the record of a response file; None if it has none. Raises DataError if the record is damaged."""
    path = origin_file(responses)
    try:
        return ResponseOrigin.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(
            f"{path}: the record of who answered is damaged ({reason}): restore it, or remove it to use the "
            "responses unchecked"
        ) from error


def check_origin(responses: Path, recorded: ResponseOrigin | None, now: ResponseOrigin, answered: set[str]) -> None:
    """Raise DataError if the stored responses to `answered` were made with another teacher, prompts or settings.

    `now` describes how responses would be made now. If the origin of a response is unknown, a warning is logged.
    """
    unknown = answered if recorded is None else answered - recorded.prompts.keys()
    if unknown:
        say_unknown(responses, len(unknown))
    if recorded is None or unknown == answered:
        return
    changes = [
        f"{name} {before} -> {after}"
        for name in ("dtype", "temperature", "top_p", "max_new_tokens", "end_ids", "day")
        if (before := getattr(recorded, name)) != (after := getattr(now, name))
    ]
    other = recorded.other_teacher(FolderDigest(now.files))
    if other is not None:
        changes.insert(0, f"teacher {recorded.teacher} -> {now.teacher} ({other})")
    prompts = recorded.other_prompts(now.prompts, sorted(answered))
    if prompts:
        changes.append(f"the text of {len(prompts)} prompts, the first is {prompts[0]!r}")
    if changes:
        raise DataError(
            f"{responses}: its responses were made differently: {'; '.join(changes)}. Restore that, write to another "
            f"file (--out, data.teacher_responses), or remove {responses} with its .partial and sample again"
        )


def save_origin(
    responses: Path, recorded: ResponseOrigin | None, now: ResponseOrigin, answered: Collection[str]
) -> None:
    """Write the record before the prompts outside `answered` are sampled. Raises DataError on a full disk.

    Entries for prompts in `answered` are copied from the previous record, if it has them.
    """
    known = recorded.prompts if recorded is not None else {}
    prompts = {name: digest for name, digest in now.prompts.items() if name not in answered}
    prompts |= {name: known[name] for name in answered if name in known}
    text = now.model_copy(update={"prompts": prompts}).model_dump_json(indent=1)
    publish_text(origin_file(responses), text + "\n", key=PLACE_KEY)


def say_unknown(responses: Path, count: int) -> None:
    """Log that `count` responses have no record."""
    log.warning(
        "%s: %s has no record of %d responses, so nobody can tell whether they are of this teacher and these prompts; "
        "responses that `tropd prefixes` samples have one",
        responses,
        origin_file(responses).name,
        count,
    )
