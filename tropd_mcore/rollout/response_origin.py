"""Records how stored teacher responses were made, and checks the record before they are extended or trained on.

The record is the file `<responses>.origin.json`. The responses themselves are handled in `prefixes` and
`data.responses`. Invariants: the record is written before the first response that it describes. A response whose prompt
is not in the record has unknown origin, and this is logged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
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
    others: tuple[ResponseOrigin, ...] = ()
    """The records of the other teachers of the same file, if several answered it"""

    @property
    def records(self) -> tuple[ResponseOrigin, ...]:
        """The record of each teacher; together they say which teacher answered which prompt."""
        return (self.model_copy(update={"others": ()}), *self.others)

    @property
    def known(self) -> set[str]:
        """The prompts that any of the records has."""
        return set().union(*(record.prompts for record in self.records))

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

    `now` describes how a teacher would make responses now, and `answered` are those of its prompts that have one. If
    the origin of a response is unknown, a warning is logged.
    """
    unknown = answered if recorded is None else answered - recorded.known
    if unknown:
        say_unknown(responses, len(unknown))
    for record in recorded.records if recorded is not None else ():
        if mine := answered & record.prompts.keys():
            _check_record(responses, record, now, mine)


def _check_record(responses: Path, recorded: ResponseOrigin, now: ResponseOrigin, answered: set[str]) -> None:
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
    responses: Path, recorded: ResponseOrigin | None, now: Sequence[ResponseOrigin], answered: Collection[str]
) -> None:
    """Write the record before the prompts outside `answered` are sampled. Raises DataError on a full disk.

    `now` has one record for each teacher. Entries for prompts in `answered` are copied from the previous record, if it
    has them.
    """
    known: dict[str, str] = {}
    for record in recorded.records if recorded is not None else ():
        known |= record.prompts
    records = []
    for origin in now:
        prompts = {name: digest for name, digest in origin.prompts.items() if name not in answered}
        prompts |= {
            name: known[name] for name in answered if name in known and (len(now) == 1 or name in origin.prompts)
        }
        records.append(origin.model_copy(update={"prompts": prompts}))
    text = (
        records[0]
        .model_copy(update={"others": tuple(records[1:])})
        .model_dump_json(indent=1, exclude={"others"} if len(records) == 1 else None)
    )
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
