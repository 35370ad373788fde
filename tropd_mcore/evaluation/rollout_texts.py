"""The tokenizer and the verifier of a finished run, found again: what turns its token ids into text and verdicts.

Not for rollouts themselves (see `rollout_view`). Invariants: a tokenizer is used only where its file is the one that
the run recorded, or where the user names it; where none is used, the reason is told to who asks.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tropd_mcore.config.schema import VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.thinking import read_answer
from tropd_mcore.data.verify import found_answer, is_right
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.run_records import RunRecords
from tropd_mcore.files import file_digest
from tropd_mcore.types import Rollout

OPTION = "--tokenizer FOLDER"
TOKENIZER = "tokenizer.json"
NO_TEXT = "token ids in place of text"


@dataclass(frozen=True)
class Answer:
    """What a rollout answers, read as the verifier of the run reads it."""

    found: str | None
    """The answer in it; None where there is none"""
    right: bool | None
    """None where nothing can be compared: no expected answer, or no verifier"""


@dataclass(frozen=True)
class RolloutTexts:
    """Turns the token ids of a run into text, or says why it cannot."""

    renderer: Renderer | None
    verifier: VerifierConfig | None
    """None where the run has none, or it cannot be asked here"""
    problem: str | None = None
    """Why there is no text, or why it may be wrong; None where all is well"""

    def texts(self, ids: list[int]) -> list[str]:
        """Return one text per id: what it adds to the text, or its number where there is no tokenizer."""
        return self.renderer.token_texts(ids) if self.renderer else [f"{token_id} " for token_id in ids]

    def answer(self, rollout: Rollout) -> Answer | None:
        """Return what the rollout answers; None where that cannot be read."""
        if self.renderer is None or self.verifier is None:
            return None
        said = read_answer(self.verifier, self.renderer, rollout)
        found = None if said is None else found_answer(self.verifier, said)
        if rollout.answer is None:
            return Answer(found, None)
        return Answer(found, said is not None and is_right(self.verifier, said, rollout.answer))


def find_texts(run: RunRecords, tokenizer: Path | None = None) -> RolloutTexts:
    """Return what reads the rollouts of `run`: with the tokenizer in `tokenizer`, or with the student's own.

    Raises DataError where `tokenizer` is named and cannot be read.
    """
    verifier = _verifier(run)
    recorded = _recorded_digest(run.root)
    if tokenizer is not None:
        other = f"{tokenizer / TOKENIZER} is another one than the run read: the text may be wrong"
        known = recorded is not None and (tokenizer / TOKENIZER).is_file()
        return RolloutTexts(
            Renderer(tokenizer), verifier, other if known and file_digest(tokenizer / TOKENIZER) != recorded else None
        )
    places = run.places("student.path")
    if not places:
        return RolloutTexts(None, verifier, f"{NO_TEXT}: the run names no student.path; give {OPTION}")
    seen: list[str] = []
    for folder in [*places, run.root / "export"]:
        file = folder / TOKENIZER
        if recorded is not None and file.is_file() and file_digest(file) != recorded:
            seen.append(f"{file} is another one than the run read")
            continue
        try:
            return RolloutTexts(Renderer(folder), verifier)
        except DataError as error:
            if folder.is_dir():
                seen.append(str(error))
    reason = "; ".join(seen) or f"no tokenizer at {' or '.join(map(str, places))}"
    return RolloutTexts(None, verifier, f"{NO_TEXT}: {reason}; give {OPTION}")


def _recorded_digest(root: Path) -> str | None:
    """SHA-256 of the student's tokenizer.json, as the run read it; None where that is not on record."""
    try:
        models = json.loads((root / "inputs.json").read_text(encoding="utf-8"))["models"]
        return str(models["student.path"]["files"][TOKENIZER])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no launch was accepted, an older release, or a tokenizer of another form


def _verifier(run: RunRecords) -> VerifierConfig | None:
    """The verifier of the recorded configuration, where it can be asked here."""
    name = "verifier."
    values = {key.removeprefix(name): value for key, value in run.settings.items() if key.startswith(name)}
    try:
        verifier = VerifierConfig.model_validate(values)
    except ValidationError:
        return None  # keys of another release
    if verifier.kind == "none" or (verifier.kind != "exact_match" and not importlib.util.find_spec("math_verify")):
        return None
    return verifier
