"""Text to token ids and back. This is the only place where a tokenizer turns a prompt into ids.

Responses are not tokenized: they are sampled as ids and stay ids. Chat templates are in `chat_template`. Invariant:
student, teacher and trainer see the same ids of a prompt, because the ids are made once, here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tropd_mcore.data.chat_template import Chat, ChatTemplate, Message
from tropd_mcore.data.token_texts import token_texts
from tropd_mcore.data.tokenizer import decode, load_tokenizer, own_end_ids
from tropd_mcore.errors import DataError
from tropd_mcore.types import IntArray

RawPrompt = str | Sequence[Message] | Chat
"""A prompt before rendering: a text, the messages of a chat, or a `Chat` with the other inputs of its template."""

TAIL_TOKENS = 32
"""Number of tokens at the end of a prompt that are searched for the opening of a thinking block."""


class Renderer:
    """Tokenizer and chat template of a Hugging Face folder. Raises DataError if there is no readable tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        """transformers' tokenizer, for uses other than prompts (see `end_tokens`)."""
        self.folder = folder
        self.eos_ids = own_end_ids(folder, self.tokenizer)
        """Ids that end a response of this model. A run may stop at more ids (see `end_tokens`)."""
        self.special_ids = frozenset(int(index) for index in self.tokenizer.all_special_ids)
        """Ids of special tokens."""
        self.template = ChatTemplate(self.tokenizer, folder)
        """Turns a chat into a text."""
        self._special_names = dict(
            zip(self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)), sorted(self.special_ids), strict=True)
        )
        self._before_text = self._ids_before_text()

    def prompt_ids(self, prompt: RawPrompt) -> IntArray:
        """Return the ids of a text, or of a chat rendered up to the start of the answer; int32 [length].

        A text begins with the tokens that the tokenizer puts before a text (BOS), exactly once, and never ends with
        those that it puts after one. A chat has only the special tokens of its template. Raises DataError if the
        template refuses the chat or loses a part of it, or if the result is empty.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if ids and ids[: len(self._before_text)] != self._before_text:
                ids = [*self._before_text, *ids]
        else:
            text = self.template.text(prompt if isinstance(prompt, Chat) else Chat(prompt))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError("the prompt has no tokens")
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Iterable[int], *, keep: Iterable[str] = ()) -> str:
        """Return the text of `ids` without special tokens, except those whose names are in `keep`."""
        kept = {self._special_names[name]: name for name in keep if name in self._special_names}
        if not kept:
            return decode(self.tokenizer, ids, skip_special_tokens=True)
        pieces: list[str] = []
        between: list[int] = []
        for index in map(int, ids):
            if index in kept:
                pieces += [decode(self.tokenizer, between, skip_special_tokens=True), kept[index]]
                between = []
            else:
                between.append(index)
        return "".join([*pieces, decode(self.tokenizer, between, skip_special_tokens=True)])

    def ends_with(self, prompt_ids: IntArray, text: str) -> bool:
        """Return whether a prompt ends with `text` (a special token or not), apart from trailing white space."""
        return decode(self.tokenizer, prompt_ids[-TAIL_TOKENS:]).rstrip().endswith(text)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """Return the text that each id adds, special tokens included.

        If the bytes of a character are spread over several tokens, it is the text of the last one; the others have
        none.
        """
        return token_texts(self.tokenizer, [int(index) for index in ids])

    def token_id(self, text: str) -> int | None:
        """Return the id of a vocabulary entry, or of a text that is a single token; None if `text` is neither."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        if text in vocabulary:
            return vocabulary[text]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else None

    def _ids_before_text(self) -> list[int]:
        """The ids that the tokenizer puts before a text by itself; [] if there are none."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        marked = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = range(len(marked) - len(plain) + 1)
        start = next((start for start in starts if marked[start : start + len(plain)] == plain), 0)
        return list(marked[:start])
