"""Checks that every tokenizer of a run agrees with the files of its folder, before it is used.

Tokenizers are read in `tokenizer`; vocabularies are compared in `teacher.vocabulary`. Invariant: a tokenizer that
passes turns the probe text into the ids that an independent reading of its file gives, and these ids back into the
text. The only change allowed is the one that the file itself prescribes (its normalizer).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd_mcore.data.tokenizer import (
    PROBE,
    LoadedTokenizer,
    decode,
    encode,
    first_difference,
    probe_texts,
    read_tokenizer,
)
from tropd_mcore.errors import GateError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

METASPACE = "\u2581"
"""Stands for a space in tokenizers made by sentencepiece."""


def check_tokenizer(folder: Path, *, key: str) -> LoadedTokenizer:
    """Return the tokenizer of `folder` if it passes. `key` is the configuration key that names the folder.

    Logs what had to be corrected, which texts the tokenizer has no tokens for, and what could not be checked. Raises
    GateError with the first difference, DataError if the folder cannot be read.
    """
    loaded = read_tokenizer(folder)
    if loaded.correction is not None:
        log.warning("%s: %s", key, loaded.correction)
    if loaded.file is None:
        log.warning("%s=%s: no tokenizer.json, so the ids cannot be compared; save one", key, folder)
        difference = _first_text_lost_without_file(loaded.tokenizer, key)
    else:
        _say_further(loaded, key)
        difference = (
            first_difference(loaded.tokenizer, loaded.file, loaded.further)
            or _first_other_id(folder, loaded.tokenizer)
            or _first_text_lost(loaded, key)
        )
    if difference is not None:
        raise GateError(
            f"gates.tokenizer: {key}={folder}: the tokenizer does not agree with its files: {difference}; fix "
            "tokenizer_config.json or fetch the folder again. gates.tokenizer=false skips the check"
        )
    return loaded


def check_server_tokenizer(key: str, url: str, loaded: LoadedTokenizer, found: Sequence[Sequence[int]]) -> None:
    """Compare `found`, the ids of `server_probe` from the server of section `key`, with `loaded`. Raises GateError."""
    for text, theirs in zip(server_probe(loaded), found, strict=True):
        ours = encode(loaded.tokenizer, text)
        if list(theirs) == ours:
            continue
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        where = "the number of ids" if place is None else f"id {place}, {theirs[place]} instead of {ours[place]}"
        raise GateError(
            f"gates.tokenizer: {key}: the server at {url} has another tokenizer: it turns {text!r} into {len(theirs)} "
            f"ids, tokenizer.json into {len(ours)}; the first difference is {where}. Start it with --tokenizer-path of "
            "a folder whose tokenizer_class is PreTrainedTokenizerFast, or set gates.tokenizer=false: prompts are sent "
            "as ids, so only other users of the server are affected"
        )


def server_probe(loaded: LoadedTokenizer) -> list[str]:
    """Return the texts that a server must turn into ids for the comparison."""
    return list(PROBE) if loaded.file is None else probe_texts(loaded.file)


def expected_text(file: Tokenizer, text: str) -> str:
    """Return the text that decoding the ids of `text` must give: the output of the file's own normalizer.

    A sentencepiece tokenizer adds a space before the text and removes one when it decodes. If a pre-tokenizer does
    this, it adds none before a text that begins with a space, so that space is lost.
    """
    if file.normalizer is not None:
        text = _without_metaspace(file.normalizer.normalize_str(text), text, file.normalizer.normalize_str("a"))
    pre_tokenizer = file.pre_tokenizer
    if pre_tokenizer is not None and type(pre_tokenizer).__name__ == "Metaspace" and text.startswith(" "):
        return text[1:] if pre_tokenizer.prepend_scheme != "never" else text
    return text


def _without_metaspace(normalized: str, text: str, normalized_letter: str) -> str:
    if METASPACE in text:
        return normalized
    if normalized_letter.startswith(METASPACE):
        normalized = normalized.removeprefix(METASPACE)
    return normalized.replace(METASPACE, " ")


def _first_other_id(folder: Path, tokenizer: Any) -> str | None:
    """The first token with different ids in tokenizer_config.json and the tokenizer, as text; else None."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        content = str(token.get("content") if isinstance(token, dict) else token)
        if vocabulary.get(content) != int(index):
            return f"tokenizer_config.json gives id {index} to token {content!r}, which gets {vocabulary.get(content)}"
    return None


def _say_further(loaded: LoadedTokenizer, key: str) -> None:
    if loaded.further:
        vocabulary = loaded.tokenizer.get_vocab()
        named = ", ".join(f"{token!r} {vocabulary[token]}" for token in sorted(loaded.further, key=vocabulary.get)[:5])
        log.warning(
            "%s: tokenizer.json lacks %d tokens that other files of the folder name (%s); they get the ids behind it",
            key,
            len(loaded.further),
            named,
        )


def _first_text_lost(loaded: LoadedTokenizer, key: str) -> str | None:
    """The first probe text that decoding does not restore, as text; else None.

    Texts with unknown tokens pass with a warning. Texts with the name of an added token are left out, because the
    tokenizer may treat spaces beside it as it likes.
    """
    assert loaded.file is not None
    unknown = loaded.tokenizer.unk_token_id
    added = [token.content for token in loaded.file.get_added_tokens_decoder().values()]
    strange: list[str] = []
    for text in PROBE:
        if any(name in text for name in added):
            continue
        ids = encode(loaded.tokenizer, text)
        if unknown is not None and unknown in ids:
            strange.append(text)
            continue
        expected, found = expected_text(loaded.file, text), decode(loaded.tokenizer, ids)
        if found != expected:
            return f"{expected!r} comes back as {found!r}"
    _say_strange(strange, key)
    return None


def _first_text_lost_without_file(tokenizer: Any, key: str) -> str | None:
    strange: list[str] = []
    for text in PROBE:
        ids = encode(tokenizer, text)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            strange.append(text)
        elif decode(tokenizer, ids) != text:
            return f"{text!r} comes back as {decode(tokenizer, ids)!r}"
    _say_strange(strange, key)
    return None


def _say_strange(strange: list[str], key: str) -> None:
    if strange:
        log.warning(
            "%s: the tokenizer has no tokens for parts of %d of %d probe texts, which become its unknown token; "
            "the first is %r",
            key,
            len(strange),
            len(PROBE),
            strange[0],
        )
