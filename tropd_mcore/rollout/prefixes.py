"""Teacher responses for a prompt file, sampled once before training (`tropd prefixes`) and stored as token ids.

Not for student rollouts (see `sampler`) or for whether stored responses may be added to (`response_origin`).
Invariants: the output file is whole or absent; what was sampled before an interruption is kept beside it and not
sampled again; a stored response never ends with its stop token.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.files import append_text, publish_text, shown, writing
from tropd_mcore.progress import progress
from tropd_mcore.rollout.response_origin import PLACE_KEY
from tropd_mcore.rollout.sampler import check_ids
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.wire import Generation, GenerationRequest
from tropd_mcore.types import Prompt

log = logging.getLogger(__name__)

Generate = Callable[[list[GenerationRequest]], list[Generation | ServerError]]

PROMPTS_PER_CHUNK = 256
"""Responses between two flushes to the disk."""


@dataclass(frozen=True)
class ResponseSampling:
    """How the teacher answers."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_ids: tuple[int, ...]
    vocab_size: int
    """Ids that are tokens. A teacher whose embedding is padded can sample others: its response is cut before them."""
    served_width: int
    """Rows of the teacher's embedding: no id beyond them can come back."""
    excluded: frozenset[int] = frozenset()
    """Ids below `vocab_size` that are tokens of the teacher alone: a response is cut before them too."""


@dataclass(frozen=True)
class ResponseReport:
    """What a call did; `finished` responses ended by themselves, the others at max_new_tokens or before an id
    that is no token."""

    prompts: int
    sampled: int
    finished: int


def generate_responses(
    client: SglangClient,
    prompts: list[Prompt],
    out: Path,
    sampling: ResponseSampling,
    *,
    chunk: int = PROMPTS_PER_CHUNK,
    generate: Generate | None = None,
) -> ResponseReport:
    """Write one line `{id, response_ids, finished}` a prompt to `out`, in the order of `prompts`.

    Prompts that `out` or its `.partial` already answers are not sampled. `generate` is asked in place of the client's,
    for example one that restarts the server (`SupervisedServer.generate`). Raises ServerError where the server cannot
    answer, DataError where a prompt or a stored line does not fit; what was sampled until then is kept.
    """
    partial = _partial(out)
    with writing(out, key=PLACE_KEY):
        out.parent.mkdir(parents=True, exist_ok=True)
    lines = stored_responses(out)
    missing = [prompt for prompt in prompts if prompt.prompt_id not in lines]
    for prompt in missing:
        check_ids(prompt.token_ids, sampling.vocab_size, what=f"prompt {prompt.prompt_id!r}")
    _check_lengths(client, missing, sampling)
    with progress(log, "teacher responses", total=len(missing), unit="missing ones") as state:
        for start in range(0, len(missing), chunk):
            fresh = _sample(client, generate or client.generate, missing[start : start + chunk], sampling)
            _append(partial, fresh)
            lines.update(fresh)
            state.advance(len(fresh))
            log.info("%s", state.line(time.monotonic()))
    wanted = [lines[prompt.prompt_id] for prompt in prompts]
    responses = [json.loads(line) for line in wanted]
    empty = [response["id"] for response in responses if not response["response_ids"]]
    if empty:
        log.warning(
            "%s: the teacher ended at once on %d prompts, the first is %r; training refuses their responses: remove "
            "these prompts, or their lines and sample again",
            out,
            len(empty),
            empty[0],
        )
    publish_text(out, "".join(line + "\n" for line in wanted), key=PLACE_KEY)
    partial.unlink(missing_ok=True)
    finished = sum(bool(response["finished"]) for response in responses)
    return ResponseReport(prompts=len(prompts), sampled=len(missing), finished=finished)


def _sample(
    client: SglangClient, generate: Generate, prompts: list[Prompt], sampling: ResponseSampling
) -> dict[str, str]:
    requests = [
        GenerationRequest(
            input_ids=prompt.token_ids,
            max_new_tokens=sampling.max_new_tokens,
            vocab_size=sampling.served_width,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=sampling.eos_ids,
        )
        for prompt in prompts
    ]
    lines = {}
    for prompt, answer in zip(prompts, generate(requests), strict=True):
        if isinstance(answer, ServerError):
            raise answer
        if answer.finish_reason == "abort":
            raise ServerError(f"{client.key}: the response to prompt {prompt.prompt_id!r} was aborted; run it again")
        lines[prompt.prompt_id] = _line(prompt, answer, sampling)
    return lines


def _line(prompt: Prompt, answer: Generation, sampling: ResponseSampling) -> str:
    finished = answer.finish_reason == "stop"
    ids = answer.output_ids[:-1] if finished else answer.output_ids
    no_tokens = np.flatnonzero((ids >= sampling.vocab_size) | np.isin(ids, sorted(sampling.excluded)))
    if len(no_tokens):
        where = prompt.prompt_id, ids[no_tokens[0]]
        log.warning("prompt %r: response cut before id %d, which is no token of the student", *where)
        ids, finished = ids[: no_tokens[0]], False
    return json.dumps({"id": prompt.prompt_id, "response_ids": ids.tolist(), "finished": finished})


def _check_lengths(client: SglangClient, prompts: list[Prompt], sampling: ResponseSampling) -> None:
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0) + sampling.max_new_tokens
    limit = client.info().longest_sequence if prompts else longest
    if longest > limit:
        raise ServerError(
            f"{client.key}: the longest prompt with its response may reach {longest} tokens, "
            f"{sampling.max_new_tokens} of them --max-new-tokens, but the server takes {limit}: give --max-new-tokens "
            f"{sampling.max_new_tokens - (longest - limit)} or less, or raise {client.key}.max_total_tokens, or "
            f"--context-length in {client.key}.extra_args where the model allows it"
        )


def stored_responses(out: Path) -> dict[str, str]:
    """Return {prompt id: line} of what `out` and its `.partial` hold. Raises DataError where a line does not fit."""
    return {**_stored(out, may_be_cut=False), **_stored(_partial(out), may_be_cut=True)}


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _stored(path: Path, *, may_be_cut: bool) -> dict[str, str]:
    """Read id -> line; the last line may be cut where the writer was killed."""
    if not path.is_file():
        return {}
    stored = {}
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}; restore or remove it") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            stored[str(entry["id"])] = json.dumps({name: entry[name] for name in ("id", "response_ids", "finished")})
        except (ValueError, KeyError, TypeError) as error:
            if may_be_cut and number == len(lines):
                break
            raise DataError(f"{path}:{number}: expected id, response_ids and finished ({error!r})") from error
    return stored


def _append(path: Path, lines: dict[str, str]) -> None:
    """Add whole lines after the last whole line and flush them to the disk. Raises DataError; then none is added."""
    append_text(path, "".join(line + "\n" for line in lines.values()), key=PLACE_KEY)
