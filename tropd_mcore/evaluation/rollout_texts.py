"""Finds the tokenizer and the verifier of a finished run, to turn its token ids into text and verdicts.

This module does not render rollouts (see `rollout_view`). Invariants: a tokenizer is used only if its file is the one
that the run recorded, or if the user names it. If none is used, the result holds the reason.
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
    """The answer in a rollout, as the run's verifier reads it."""

    found: str | None
    """The answer; None if the rollout has none"""
    right: bool | None
    """Whether it is right; None if there is no expected answer"""


@dataclass(frozen=True)
class RolloutTexts:
    """Turns the token ids of a run into text, or says why it cannot."""

    renderer: Renderer | None
    verifier: VerifierConfig | None
    """None if the run has none, or if it cannot be run here"""
    problem: str | None = None
    """Why there is no text, or why it may be wrong; None if there is no problem"""

    def texts(self, ids: list[int]) -> list[str]:
        """Return one text per id: what it adds to the text, or its number if there is no tokenizer."""
        return self.renderer.token_texts(ids) if self.renderer else [f"{token_id} " for token_id in ids]

    def answer(self, rollout: Rollout) -> Answer | None:
        """Return the rollout's answer; None without a tokenizer or verifier."""
        if self.renderer is None or self.verifier is None:
            return None
        said = read_answer(self.verifier, self.renderer, rollout)
        found = None if said is None else found_answer(self.verifier, said)
        if rollout.answer is None:
            return Answer(found, None)
        return Answer(found, said is not None and is_right(self.verifier, said, rollout.answer))


def find_texts(run: RunRecords, tokenizer: Path | None = None) -> RolloutTexts:
    """Return the texts of `run`, with the tokenizer in the folder `tokenizer` or, if None, the student's.

    Raises DataError if `tokenizer` is given and cannot be read.
    """
    verifier = _verifier(run)
    recorded = _recorded_digest(run.root)
    if tokenizer is not None:
        other = f"{tokenizer / TOKENIZER} is not the file that the run used: the text may be wrong"
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
            seen.append(f"{file} is not the file that the run used")
            continue
        try:
            return RolloutTexts(Renderer(folder), verifier)
        except DataError as error:
            if folder.is_dir():
                seen.append(str(error))
    reason = "; ".join(seen) or f"no tokenizer at {' or '.join(map(str, places))}"
    return RolloutTexts(None, verifier, f"{NO_TEXT}: {reason}; give {OPTION}")


def _recorded_digest(root: Path) -> str | None:
    """SHA-256 of the student's tokenizer.json as the run read it; None if it was not recorded."""
    try:
        models = json.loads((root / "inputs.json").read_text(encoding="utf-8"))["models"]
        return str(models["student.path"]["files"][TOKENIZER])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no launch was accepted, an older release, or a tokenizer of another form


def _verifier(run: RunRecords) -> VerifierConfig | None:
    """The verifier of the recorded configuration; None if it cannot be run here."""
    name = "verifier."
    values = {key.removeprefix(name): value for key, value in run.settings.items() if key.startswith(name)}
    try:
        verifier = VerifierConfig.model_validate(values)
    except ValidationError:
        return None  # keys of another release
    if verifier.kind == "none" or (verifier.kind != "exact_match" and not importlib.util.find_spec("math_verify")):
        return None
    return verifier
