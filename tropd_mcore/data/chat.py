"""Text to token ids and back: the only place where a tokenizer turns a prompt into ids.

Not for responses, which are sampled as ids and stay ids. Invariant: student, teacher and trainer see the same
ids of a prompt, because they are made here once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray

Message = Mapping[str, str]


class Renderer:
    """Tokenizer and chat template of a Hugging Face folder. Raises DataError where there is none to be read."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: expected a tokenizer there (tokenizer.json); {_first_line(error)}") from error
        self._folder = folder
        self.eos_ids = _eos_ids(folder, self._tokenizer.eos_token_id)
        """Ids that end a response: those of generation_config.json and the tokenizer's own."""
        self.special_ids = frozenset(int(index) for index in self._tokenizer.all_special_ids)
        """Ids of special tokens."""

    def prompt_ids(self, prompt: str | Sequence[Message]) -> IntArray:
        """Return the ids of a text as it is, or of a chat rendered up to the start of the answer; int32 [length].

        Raises DataError where the template refuses the chat or the result is empty.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            if not self._tokenizer.chat_template:
                raise DataError(
                    f"{self._folder}: the tokenizer has no chat template; give `prompt` instead of `messages`"
                )
            import jinja2

            try:
                text = self._tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
            except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
                raise DataError(f"the chat template refuses the messages: {_first_line(error)}") from error
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError("the prompt has no tokens")
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens."""
        text: str = self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)
        return text

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """Return the text of each id on its own, special tokens included."""
        return [self._tokenizer.decode([int(index)]) for index in ids]

    def token_id(self, text: str) -> int | None:
        """Return the id of a vocabulary entry, or of a text that is a single token; None where it is neither."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        if text in vocabulary:
            return vocabulary[text]
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id else None


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Ids that end a response, ascending. Raises DataError where neither file names one."""
    found = {tokenizer_eos} if tokenizer_eos is not None else set()
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as JSON: {error}") from error
        eos = values.get("eos_token_id") if isinstance(values, dict) else None
        found |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    if not found:
        raise DataError(f"{folder}: neither the tokenizer nor generation_config.json names an eos_token_id")
    return tuple(sorted(int(index) for index in found))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
