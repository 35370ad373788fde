"""Reads the tokenizer of a folder, so that its ids are those of the folder's tokenizer.json.

Chats and prompts are in `chat`, end tokens in `end_tokens`, the comparison of two models in `teacher.vocabulary`.
Invariant: every part of the project reads tokenizers through this module. transformers rebuilds some tokenizers from
the class that tokenizer_config.json names, and then loses parts of tokenizer.json. The tokenizers returned here have
the ids of the file, which `tokenizer_gate` checks at the start of every command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd_mcore.errors import DataError, first_line
from tropd_mcore.file_kinds import in_the_way
from tropd_mcore.files import publish_text, shown, writing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

READABLE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""A folder with a tokenizer has at least one of these files."""

PROBE = (
    "What is 2 + 3?\nAnswer in one line.",
    "  two  spaces, three   spaces, trailing ",
    "\n\n\tx = [1, 2,\t3]\n    return x  # \r\n \n\n\n",
    "1234567890 3.14159 1,000,000 0x7f 2\u00b3 \u00bd \u0663\u0664",
    "don't we'll I'M O'Brien's e-mail@example.com https://a.b/c?d=e&f=%20",
    "Fl\u00e4che \u00c5ngstr\u00f6m na\u00efve \u0141\u00f3d\u017a \u1e9eER",
    "e\u0301 a\u030a n\u0303 \u212b \u1100\u1161 \u0928\u093f \u0e01\u0e33",
    "\u4e2d\u6587\u6a19\u9ede\uff0c\u3002 \u3072\u3089\u304c\u306a \u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u03ba\u03cc\u03c3\u03bc\u03b5 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f642 \U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001d4d0 \u221a2 \u2264 \u03c0r\u00b2",
    "$\\frac{1}{2}$ \\boxed{42} #### 7 ```python\nprint('a')\n``` <b> </s> [INST] <|user|> <think>\n</think>\n\n",
    "\u00a0\u2009\u3000|\u200b|\u2028|\ufeff",
)
"""Texts on which two readings of a tokenizer are compared: spaces, line breaks, tabs, digits, scripts, combining marks,
emoji, spaces that are not ASCII, and text that looks like special tokens."""


@dataclass(frozen=True)
class LoadedTokenizer:
    """The tokenizer of a folder, and how it was read."""

    tokenizer: Any
    """transformers' tokenizer, with the ids of `file`"""
    file: Tokenizer | None
    """tokenizer.json as read by the `tokenizers` library, without truncation and padding; None = there is no such
    file"""
    correction: str | None = None
    """One sentence on what transformers would have read differently; None if it read the file correctly"""
    further: frozenset[str] = frozenset()
    """Tokens that other files of the folder name and tokenizer.json lacks. Their ids follow those of the file"""


def load_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer of `folder`, with the ids of its tokenizer.json. Raises DataError."""
    return read_tokenizer(folder).tokenizer


def read_tokenizer(folder: Path) -> LoadedTokenizer:
    """Read the tokenizer of `folder`. If transformers makes other ids than tokenizer.json says, the file is used.

    Raises DataError if there is no tokenizer or the installed libraries cannot read it. A folder is read once per
    process, and again if one of its files has changed. Cost: 2 s for 150 000 tokens, 4 s if something is corrected.
    """
    for name in READABLE_FILES:
        _check_file(folder / name)
    if not any((folder / name).is_file() for name in READABLE_FILES):
        raise DataError(f"{shown(folder)}: expected a tokenizer there (tokenizer.json)")
    state = tuple(
        (path.name, stat.st_mtime_ns, stat.st_size, stat.st_ino)
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".model", ".txt", ".jinja") and path.is_file() and (stat := path.stat())
    )
    return _read(folder, state)


@lru_cache(maxsize=4)
def _read(folder: Path, state: tuple[tuple[str, int, int, int], ...]) -> LoadedTokenizer:
    """The result of `read_tokenizer` for a folder whose files are in `state`."""
    file = read_tokenizer_file(folder)
    tokenizer = _auto_tokenizer(folder)
    if file is None or first_difference(tokenizer, file) is None:
        return LoadedTokenizer(tokenizer, file)
    corrected = _tokenizer_of_file(folder)
    further = frozenset(corrected.get_vocab().keys() - file.get_vocab().keys())
    difference = first_difference(tokenizer, file, further)
    if difference is None:
        return LoadedTokenizer(tokenizer, file, further=further)
    name = type(tokenizer).__name__
    return LoadedTokenizer(
        corrected,
        file,
        f"{folder}: transformers rebuilds the tokenizer as {name}, which differs from tokenizer.json ({difference}); "
        "the file is used",
        further,
    )


def read_tokenizer_file(folder: Path) -> Tokenizer | None:
    """Return tokenizer.json of `folder` as read by the `tokenizers` library alone; None if there is no such file.

    Raises DataError for a Git LFS pointer, a damaged file, and a file that the installed release cannot read.
    """
    for name in READABLE_FILES:
        _check_file(folder / name)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    import tokenizers

    try:
        file = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for unknown parts
        _read_json(path)
        raise DataError(
            f"{path}: the installed tokenizers {tokenizers.__version__} cannot read this file ({first_line(error)}); "
            "install the release of tokenizers that wrote it, or fetch the file again"
        ) from error
    file.no_truncation()
    file.no_padding()
    return file


def first_difference(tokenizer: Any, file: Tokenizer, further: Collection[str] = ()) -> str | None:
    """Return the first difference between `tokenizer` and `file`, as text; None if they agree.

    The tokenizer may also have the `further` tokens.
    """
    expected, found = file.get_vocab(), tokenizer.get_vocab()
    for token in sorted(expected.keys() - found.keys(), key=expected.__getitem__):
        return f"token {token!r} (id {expected[token]}) is missing"
    for token in sorted(found.keys() - expected.keys() - set(further), key=found.__getitem__):
        return f"token {token!r} (id {found[token]}) is not in the file"
    for token, index in expected.items():
        if found[token] != index:
            return f"token {token!r} has id {found[token]}, in the file {index}"
    for text in probe_texts(file):
        mine, theirs = encode(tokenizer, text), file.encode(text, add_special_tokens=False).ids
        if mine != theirs:
            return f"{text!r} becomes {len(mine)} ids that decode to {decode(tokenizer, mine)!r}"
    return None


def write_for_server(loaded: LoadedTokenizer, folder: Path, into: Path) -> Path | None:
    """Write tokenizer files to `into` from which a server reads the same ids; None if `folder` serves as it is.

    They are the files of `folder`, with a tokenizer_config.json that names the class that keeps tokenizer.json as it
    is.
    """
    if loaded.correction is None:
        return None
    with writing(into):
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, into / name)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": False}
    publish_text(into / path.name, json.dumps(settings, indent=1) + "\n")
    return into


def probe_texts(file: Tokenizer) -> list[str]:
    """Return PROBE and one text per added token of `file`, with its name between words, spaces and line breaks."""
    added = [token.content for _, token in sorted(file.get_added_tokens_decoder().items())]
    return [*PROBE, *(f"a{token}b {token} c\n{token}\n d" for token in added)]


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types; each means that the folder cannot be read
        remedy = (
            ""
            if (folder / "tokenizer.json").is_file()
            else "; save a tokenizer.json in an environment whose transformers can read the folder"
        )
        raise DataError(
            f"{folder}: expected a tokenizer there (tokenizer.json); transformers says: {first_line(error)}{remedy}"
        ) from error


def _tokenizer_of_file(folder: Path) -> Any:
    """transformers' general tokenizer for tokenizer.json, with the special tokens and template of the folder."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, split_special_tokens=False)
    except Exception as error:  # as in _auto_tokenizer
        raise DataError(f"{folder}: the tokenizer cannot be read: {first_line(error)}") from error


def _check_file(path: Path) -> None:
    """Raise DataError if `path` exists and is not a file of its kind, or is a settings file without valid JSON."""
    if not os.path.lexists(path):
        return
    if (found := in_the_way(path)) is not None:
        raise DataError(f"{shown(path)}: expected a file of the tokenizer; {found}")
    if path.name == "tokenizer_config.json":
        _read_json(path)


def _read_json(path: Path) -> None:
    """Raise DataError if `path` is not valid JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged, cannot be read as JSON ({error}); fetch the file again") from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of `text` itself, without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tokenizer: Any, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
    """Return the text of `ids` from the tokenizer's own decoder, including spaces before punctuation."""
    text: str = tokenizer.decode(
        [int(index) for index in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text


def own_end_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids at which the model of `folder` ends a response, ascending.

    The ids come from generation_config.json, config.json and the tokenizer. Raises DataError if one is no valid id.
    """
    return tuple(sorted({index for _, index in end_id_sources(folder, tokenizer)}))


def end_id_sources(folder: Path, tokenizer: Any) -> list[tuple[str, int]]:
    """Return (source, id) of every end token that the files of `folder` name. Raises DataError."""
    found = [("tokenizer", tokenizer.eos_token_id)] if tokenizer.eos_token_id is not None else []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        values: Any = None
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read as JSON: {error}") from error
        eos = values.get("eos_token_id") if isinstance(values, dict) else None
        if eos is None and isinstance(values, dict) and isinstance(values.get("text_config"), dict):
            eos = values["text_config"].get("eos_token_id")  # of a multimodal model; SGLang reads it there too
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
            raise DataError(f"{path}: expected token ids as eos_token_id, found {eos!r}")
        found += [(name, index) for index in ids]
    return found
