"""Samples teacher responses for a prompt file once before training (`tropd prefixes`) and stores their token ids.

This module does not sample student rollouts (see `sampler`) and does not decide whether an existing file may be
extended (see `response_origin`). Invariants: the output file is complete or absent. Responses sampled before an
interruption are kept in a `.partial` file and not sampled again. A stored response does not include its stop token.
A response without tokens is sampled again (EMPTY_ATTEMPTS), because training refuses it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tropd_mcore.errors import DataError, ServerError
from tropd_mcore.files import append_text, publish_text, shown, writing
from tropd_mcore.progress import progress
from tropd_mcore.rollout.response_origin import PLACE_KEY
from tropd_mcore.rollout.sampler import check_ids
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.wire import Generation, GenerationRequest
from tropd_mcore.types import Prompt

log = logging.getLogger(__name__)

PROMPTS_PER_CHUNK = 256
"""Prompts whose responses are sampled before the next flush to the disk."""
EMPTY_ATTEMPTS = 8
"""How often a prompt is asked at a temperature above 0 until its response has a token."""


@dataclass(frozen=True)
class ResponseSampling:
    """Sampling settings and token ids of the teacher."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_ids: tuple[int, ...]
    vocab_size: int
    """Ids below this are tokens. A teacher with a padded embedding can sample larger ids; responses are cut there."""
    served_width: int
    """Rows of the teacher's embedding; all ids in answers are below it."""
    excluded: frozenset[int] = frozenset()
    """Ids below `vocab_size` that only the teacher has as tokens; responses are cut there too."""


@dataclass(frozen=True)
class ResponseReport:
    """Counts of one call. `finished` responses ended with a stop token. The others reached max_new_tokens or were
    cut before an id that is no token."""

    prompts: int
    sampled: int
    finished: int


def generate_responses(
    servers: ServerFleet,
    prompts: list[Prompt],
    out: Path,
    sampling: ResponseSampling,
    *,
    chunk: int = PROMPTS_PER_CHUNK,
) -> ResponseReport:
    """Write one line `{id, response_ids, finished}` per prompt to `out`, in the order of `prompts`.

    Prompts with a response in `out` or its `.partial` are not sampled again. Raises ServerError if no server can
    answer, and DataError if a prompt or a stored line is invalid. Responses sampled until then are kept.
    """
    sampled = sample_missing(servers, prompts, out, sampling, chunk=chunk)
    return write_complete(prompts, out, sampled=sampled, attempts=attempts_of(sampling))


def sample_missing(
    servers: ServerFleet,
    prompts: list[Prompt],
    out: Path,
    sampling: ResponseSampling,
    *,
    chunk: int = PROMPTS_PER_CHUNK,
) -> int:
    """Add the responses to `prompts` that are missing to the `.partial` file of `out`; returns their number.

    The arguments and errors are those of `generate_responses`. With several teachers, each samples its own prompts.
    """
    partial = _partial(out)
    with writing(out, key=PLACE_KEY):
        out.parent.mkdir(parents=True, exist_ok=True)
    lines = stored_responses(out)
    missing = [prompt for prompt in prompts if prompt.prompt_id not in lines]
    for prompt in missing:
        check_ids(prompt.token_ids, sampling.vocab_size, what=f"prompt {prompt.prompt_id!r}")
    _check_lengths(servers, missing, sampling)
    with progress(log, "teacher responses", total=len(missing), unit="missing ones") as state:
        for start in range(0, len(missing), chunk):
            part = missing[start : start + chunk]
            fresh = _with_tokens(servers, part, sampling)
            _append(partial, fresh)
            state.advance(len(fresh))
            log.info("%s", state.line(time.monotonic()))
    return len(missing)


def write_complete(prompts: list[Prompt], out: Path, *, sampled: int, attempts: int) -> ResponseReport:
    """Publish the responses to all `prompts` at `out` and remove its `.partial` file.

    `sampled` of them were sampled in this call, and an empty one was asked for `attempts` times.
    """
    lines = stored_responses(out)
    wanted = [lines[prompt.prompt_id] for prompt in prompts]
    responses = [json.loads(line) for line in wanted]
    empty = [response["id"] for response in responses if not response["response_ids"]]
    if empty:
        log.warning(
            "%s: the teacher ended at once on %d prompts, %d times each, the first is %r; training refuses their "
            "responses: remove these prompts, or their lines and sample again",
            out,
            len(empty),
            attempts,
            empty[0],
        )
    publish_text(out, "".join(line + "\n" for line in wanted), key=PLACE_KEY)
    _partial(out).unlink(missing_ok=True)
    finished = sum(bool(response["finished"]) for response in responses)
    return ResponseReport(prompts=len(prompts), sampled=sampled, finished=finished)


def _with_tokens(servers: ServerFleet, prompts: list[Prompt], sampling: ResponseSampling) -> dict[str, str]:
    """The lines of `prompts` by id. A prompt whose response is empty is asked again, `_attempts` times in all."""
    lines: dict[str, str] = {}
    asked = prompts
    for _ in range(attempts_of(sampling)):
        lines.update(_sample(servers, asked, sampling))
        asked = [prompt for prompt in asked if not json.loads(lines[prompt.prompt_id])["response_ids"]]
        if not asked:
            break
    return {prompt.prompt_id: lines[prompt.prompt_id] for prompt in prompts}


def attempts_of(sampling: ResponseSampling) -> int:
    """Return how often a prompt is asked. At temperature 0 every answer is the same."""
    return EMPTY_ATTEMPTS if sampling.temperature > 0 else 1


def _sample(servers: ServerFleet, prompts: list[Prompt], sampling: ResponseSampling) -> dict[str, str]:
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
    for prompt, answer in zip(prompts, servers.generate(requests), strict=True):
        if isinstance(answer, ServerError):
            raise answer
        if answer.finish_reason == "abort":
            key = servers.first.spec.key
            raise ServerError(f"{key}: the response to prompt {prompt.prompt_id!r} was aborted; run it again")
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


def _check_lengths(servers: ServerFleet, prompts: list[Prompt], sampling: ResponseSampling) -> None:
    if not prompts:
        return
    longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
    for server, info in servers.infos():
        key, limit = server.spec.key, info.longest_sequence
        if longest > limit:
            raise ServerError(
                f"{key}: the longest prompt with its response may reach {longest} tokens, {sampling.max_new_tokens} of "
                f"them --max-new-tokens, but the server takes {limit}: give --max-new-tokens "
                f"{sampling.max_new_tokens - (longest - limit)} or less, or raise {key}.max_total_tokens, or "
                f"--context-length in {key}.extra_args if the model allows it"
            )


def stored_responses(out: Path) -> dict[str, str]:
    """Return {prompt id: line} for all lines of `out` and its `.partial`. Raises DataError if a line is invalid."""
    return {**_stored(out, may_be_cut=False), **_stored(_partial(out), may_be_cut=True)}


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _stored(path: Path, *, may_be_cut: bool) -> dict[str, str]:
    """Read {id: line}. With `may_be_cut`, the last line may be incomplete because its writer was killed."""
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
    """Append the lines after the last complete one and flush to the disk. On a DataError, no line was added."""
    append_text(path, "".join(line + "\n" for line in lines.values()), key=PLACE_KEY)
