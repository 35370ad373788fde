"""The tokens that end a response: one set for rollouts, teacher prefixes and evaluation.

The end tokens of a single model are `Renderer.eos_ids`. They are not enough: a base student that learns from an
instruction-tuned teacher never stops at the teacher's end of turn unless it is told to. Invariant: all sampling uses
this set, and every token in it is a token of the student.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tropd_mcore.config.schema import Config
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.tokenizer import decode, encode, end_id_sources, load_tokenizer, own_end_ids
from tropd_mcore.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SENTINEL = "tropdsentinel"
"""An answer that no template changes. The text after it closes the turn."""
SERVER_STOPS = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
"""Tokens at which SGLang always ends a response if the tokenizer has them, whatever the request says."""


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a response."""

    ids: tuple[int, ...]
    """Ids in the student's vocabulary, ascending"""
    sources: dict[int, tuple[str, ...]]
    """Id -> places where it is named"""
    texts: dict[int, str]
    """Id -> its entry in the vocabulary"""
    closing: int
    """The id that ends an answer of the teacher: what its chat template puts after one, else its own end token"""
    closings: dict[str, int] = field(default_factory=dict)
    """The same for each of several teachers, by name"""

    @property
    def end_id(self) -> int | dict[str, int]:
        """`closing`, or `closings` in a run with several teachers."""
        return self.closings or self.closing

    def describe(self) -> str:
        """One line: each token with its id and its sources."""
        return ", ".join(f"{self.texts[index]!r} {index} ({'; '.join(self.sources[index])})" for index in self.ids)


@dataclass
class _Model:
    """The tokens that end a response of one model, as entries of its vocabulary."""

    key: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    """Tokens at which a server of this model stops by itself"""
    closing: str | None = None
    """The token that its chat template puts after an answer"""

    def add(self, token: str, source: str) -> None:
        self.sources.setdefault(token, []).append(f"{self.key} {source}")


def end_tokens(config: Config, student: Renderer, teachers: Path | Mapping[str, Path]) -> EndTokens:
    """Return the end tokens: rollout.end_tokens, or all tokens that end a response of the student or a teacher.

    `teachers` is the folder of the teacher, or the folders of several by name.
    These are the tokens named in generation_config.json, config.json and the tokenizer, and the token that the chat
    template puts after an answer. The set is logged. A warning is logged if a template closes a turn with a token that
    is not in the set. Raises ConfigError if rollout.end_tokens has an unknown token or lacks a token at which the
    student's server always stops; DataError if a folder cannot be read or if there is no end token.
    """
    vocabulary: dict[str, int] = student.tokenizer.get_vocab()
    several = not isinstance(teachers, Path)
    folders = {"teacher": teachers} if isinstance(teachers, Path) else {f"teachers.{n}": f for n, f in teachers.items()}
    models = [_read("student", student.folder, student.tokenizer)]
    of_folder = {student.folder.resolve(): models[0]}
    for key, folder in folders.items():
        if folder.resolve() not in of_folder:
            models.append(_read(key, folder, load_tokenizer(folder)))
            of_folder[folder.resolve()] = models[-1]
    if config.rollout.end_tokens is not None:
        sources = {token: ["rollout.end_tokens"] for token in config.rollout.end_tokens}
        _check_key(sources, vocabulary, models[0])
    else:
        sources = _all_sources(models, vocabulary)
    if not sources:
        raise DataError(
            f"nothing ends a response: neither student.path={student.folder} nor "
            f"{' nor '.join(f'{key}.path={folder}' for key, folder in folders.items())} names an eos_token_id "
            "(tokenizer, generation_config.json, config.json) that the student has; set rollout.end_tokens"
        )
    for model in models:
        if model.closing is not None and model.closing in vocabulary and model.closing not in sources:
            log.warning(
                "the chat template of the %s closes a turn with %r, which ends no response: a rollout goes on behind "
                "it; add it to rollout.end_tokens",
                model.key,
                model.closing,
            )
    tokens = sorted(sources, key=vocabulary.__getitem__)

    def closing(folder: Path) -> int:
        teacher = of_folder[folder.resolve()]
        found = next((token for token in (teacher.closing, *teacher.own, *tokens) if token in sources), tokens[0])
        return vocabulary[found]

    closings = {key.removeprefix("teachers."): closing(folder) for key, folder in folders.items()}
    found = EndTokens(
        ids=tuple(vocabulary[token] for token in tokens),
        sources={vocabulary[token]: tuple(sources[token]) for token in tokens},
        texts={vocabulary[token]: token for token in tokens},
        closing=next(iter(closings.values())),
        closings=closings if several else {},
    )
    log.info("a response ends at %s", found.describe())
    return found


def served_end_ids(ends: Iterable[int], folder: Path) -> tuple[int, ...]:
    """Return `ends` and the ids at which a server of the model in `folder` always stops, ascending."""
    tokenizer = load_tokenizer(folder)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    forced = [vocabulary[token] for token in SERVER_STOPS if token in vocabulary]
    return tuple(sorted({*ends, *own_end_ids(folder, tokenizer), *forced}))


def closing_token(tokenizer: Any) -> tuple[str | None, str | None]:
    """Return the (token, text) that the chat template puts after an answer.

    The token is None if the text is not a single added token (after white space). The text is None if there is no
    template or if it cannot render a short chat.
    """
    if not tokenizer.chat_template:
        return None, None
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}]
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        log.info("%s: the chat template takes no answer of an assistant (%s)", tokenizer.name_or_path, error)
        return None, None
    _, found, after = text.rpartition(SENTINEL)
    if not found:
        return None, None
    added = {int(index): token.content for index, token in tokenizer.added_tokens_decoder.items()}
    for index in encode(tokenizer, after):
        if index in added:
            return added[index], after
        if decode(tokenizer, [index]).strip():
            break
    return None, after


def _read(key: str, folder: Path, tokenizer: Any) -> _Model:
    """The end tokens named by the files of one model. Logs a warning for each id that is no token."""
    model = _Model(key)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    for source, index in end_id_sources(folder, tokenizer):
        if index not in names:
            log.warning("%s.path=%s: %s names end token %d, which its tokenizer lacks", key, folder, source, index)
            continue
        model.add(names[index], source)
        model.own.append(names[index])
    for token in SERVER_STOPS:
        if token in tokenizer.get_vocab():
            model.add(token, "server")
            model.own.append(token)
    model.closing, after = closing_token(tokenizer)
    if model.closing is not None:
        model.add(model.closing, "chat template")
    elif after is not None and after.strip():
        log.warning(
            "the chat template of the %s closes a turn with %r, which is no single token: no response ends there",
            key,
            after,
        )
    return model


def _all_sources(models: list[_Model], vocabulary: dict[str, int]) -> dict[str, list[str]]:
    """{token: places where it is named} over all models, without tokens that the student lacks."""
    merged: dict[str, list[str]] = {}
    for model in models:
        for token, sources in model.sources.items():
            if token in vocabulary:
                merged.setdefault(token, []).extend(sources)
            else:
                log.warning("%s ends a response with %r, which the student lacks: it is left out", model.key, token)
    return merged


def _check_key(wanted: dict[str, list[str]], vocabulary: dict[str, int], student: _Model) -> None:
    problems = [
        f"rollout.end_tokens: {token!r} is no token of the student; give entries of its tokenizer.json"
        for token in wanted
        if token not in vocabulary
    ]
    if not wanted:
        problems.append("rollout.end_tokens is empty; give at least one token, or remove the key")
    problems += [
        f"rollout.end_tokens: the student's server stops at {token!r} in any case "
        f"({', '.join(student.sources[token])}); add it"
        for token in dict.fromkeys(student.own)
        if token not in wanted
    ]
    if problems:
        raise ConfigError(problems)
