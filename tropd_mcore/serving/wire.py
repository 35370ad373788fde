"""Requests and answers of SGLang 0.5.23 as typed values: builds JSON bodies, decodes answers to checked numpy arrays.

This module does not send anything (see `client`). Invariant: an answer that is incomplete, about other tokens than
requested, not finite, or senseless (see `sense`) is an AnswerError that names the field. No value is ever filled in.

Shapes: N tokens, K entries of the top-k.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from tropd_mcore.errors import AnswerError, ServerError
from tropd_mcore.foreign_text import one_line, quoted
from tropd_mcore.serving import sense
from tropd_mcore.types import FloatArray, IntArray

Json = dict[str, object]
FinishReason = Literal["stop", "length", "abort"]
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation. Temperature 0 is greedy decoding."""

    input_ids: IntArray
    max_new_tokens: int
    vocab_size: int
    """Vocabulary size of the served model; all ids in answers are below it."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """With --enable-deterministic-inference, the same seed, tokens and weights give the same continuation on every
    server. Without it, SGLang ignores the seed"""


@dataclass(frozen=True)
class Generation:
    """A continuation sampled by the server."""

    output_ids: IntArray
    """int32 [N], including the stop token"""
    logp: FloatArray
    """float32 [N], nats: softmax at the request's temperature, not renormalised for top_p and top_k"""
    finish_reason: FinishReason
    weight_versions: tuple[str, ...]
    """Weight-version labels under which the tokens were sampled, in order; a single one if no update came in between"""


@dataclass(frozen=True)
class ScoringRequest:
    """Asks for log-probs of the tokens from index `first` (>= 1), at temperature 1, with the top-k of each position."""

    token_ids: IntArray
    first: int
    topk: int = 0
    vocab_size: int = 0
    """Vocabulary size of the served model, needed with `topk`; all candidate ids are below it."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of N = len(token_ids) - first tokens; full-vocabulary log-probs in nats."""

    logp_N: FloatArray
    topk_ids_NK: IntArray
    topk_logp_NK: FloatArray


@dataclass(frozen=True)
class ServerInfo:
    """What a server reports about itself."""

    version: str
    weight_version: str
    tensor_parallel: int
    longest_input: int
    """Most tokens of a sequence that it scores"""
    longest_sequence: int
    """Most input and new tokens together; a longer request is cut silently"""
    model_path: str = "?"
    """Folder or name of the served model at the last load from disk"""
    model_type: str = "?"
    dtype: str = "?"
    """Dtype of weights and activations; `auto` if the server chooses"""
    quantization: str | None = None
    data_parallel: int = 1
    pipeline_parallel: int = 1
    device: str = "?"
    """`cpu`, `cuda` and so on"""
    cache_tokens: int | None = None
    """Size of the KV cache in tokens; None if the server does not report it"""
    float32_logits: bool = False
    """Whether it was started with --enable-fp32-lm-head"""

    @property
    def exact(self) -> bool:
        """Whether it computes in float32 on a CPU."""
        return is_exact(self.dtype, self.quantization, self.device)

    @property
    def rounds_logits(self) -> bool:
        """Whether its logits are rounded to the dtype of the model, bfloat16 or less, before the softmax."""
        return self.dtype != "float32" and not self.float32_logits


def is_exact(dtype: str, quantization: str | None, device: str) -> bool:
    """Whether an engine computes in float32 on a CPU. On a GPU, float32 matrix products may use TF32."""
    return dtype == "float32" and quantization is None and device == "cpu"


class Place(NamedTuple):
    """Which part of the model a server rank holds. Ranks of different replicas can have the same place."""

    pipeline: int
    tensor: int


@dataclass(frozen=True)
class WeightChecksums:
    """Checksums from /weights_checker. With the same parallel layout, equal weights give equal checksums."""

    total: str
    """Checksum over all ranks"""
    tensors: dict[str, tuple[str, ...]]
    """By the server's name of a tensor, one checksum per rank; empty if the server gives only the total"""
    places: dict[str, tuple[Place | None, ...]] = field(default_factory=dict)
    """The rank of each entry of `tensors`; None if the server does not report it"""


def find_outside(token_ids: IntArray, vocab_size: int) -> int | None:
    """Return a token id that is not in [0, vocab_size), or None. Such an id kills SGLang, so check before sending."""
    outside = token_ids[(token_ids < 0) | (token_ids >= vocab_size)]
    return int(outside[0]) if len(outside) else None


def generation_body(request: GenerationRequest, rid: str) -> Json:
    """Return the JSON body of /generate for one continuation with the log-prob of each sampled token.

    SGLang aborts by the first characters of `rid`, so no id may begin with another one.
    """
    sampling: Json = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(request.stop_token_ids),
        "skip_special_tokens": False,
    }
    if request.seed is not None:
        sampling["sampling_seed"] = request.seed
    return {"rid": rid, "input_ids": request.input_ids.tolist(), "sampling_params": sampling, "return_logprob": True}


def scoring_body(request: ScoringRequest, rid: str) -> Json:
    """Return the JSON body of /generate that scores the tokens and samples none."""
    assert 1 <= request.first < len(request.token_ids), "the first token has no log-prob"
    assert request.topk <= request.vocab_size, "more candidates than tokens"
    body: Json = {
        "rid": rid,
        "input_ids": request.token_ids.tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the first entry is always null, so start one position earlier
        "logprob_start_len": request.first - 1,
    }
    if request.topk:
        body |= {
            "top_logprobs_num": request.topk,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    return body


def read_generation(answer: object, request: GenerationRequest) -> Generation:
    """Check and decode an answer to `generation_body`; one that was aborted has the tokens until then.

    Raises AnswerError.
    """
    answer = _object(answer, "the answer")
    meta = _object(answer.get("meta_info"), "meta_info")
    finish = _object(meta.get("finish_reason"), "meta_info.finish_reason")
    reason = finish.get("type")
    if reason not in ("stop", "length", "abort"):
        raise AnswerError(f"SGLang answered finish_reason {_shown(reason)}; expected stop, length or abort")
    if reason == "abort" and not answer.get("output_ids"):
        return Generation(np.zeros(0, np.int32), np.zeros(0, np.float32), reason, _weight_versions(meta))
    sense.check_prompt_length(meta.get("prompt_tokens"), len(request.input_ids))
    output_ids = sense.token_ids(_list(answer, "output_ids"), request.vocab_size, field="output_ids")
    logp = _token_logp(_list(meta, "output_token_logprobs"), output_ids, "output_token_logprobs")
    sense.check_log_probs(logp, field="output_token_logprobs")
    longest, ends = request.max_new_tokens, request.stop_token_ids
    if reason == "abort":
        if not sense.is_over(output_ids, longest=longest, end_ids=ends):
            sense.check_goes_on(output_ids, end_ids=ends)
            return Generation(output_ids, logp, reason, _weight_versions(meta))
        # the abort came after the last token; drawing it anew would favour other lengths
        reason = "stop" if output_ids[-1] in ends else "length"
    sense.check_end(output_ids, reason, finish.get("matched"), longest=longest, end_ids=ends)
    # if the end token itself uses up the budget, SGLang reports an end by length
    if output_ids[-1] in request.stop_token_ids:
        reason = "stop"
    return Generation(output_ids, logp, reason, _weight_versions(meta))


def continued(request: GenerationRequest, part: Generation) -> GenerationRequest:
    """Return the request that goes on after an aborted answer to `request`."""
    return replace(
        request,
        input_ids=np.concatenate([request.input_ids, part.output_ids]).astype(np.int32),
        max_new_tokens=request.max_new_tokens - len(part.output_ids),
    )


def joined(parts: Sequence[Generation]) -> Generation:
    """Return one continuation from its parts in order; all but the last were aborted."""
    if len(parts) == 1:
        return parts[0]
    versions = [version for part in parts for version in part.weight_versions]
    return Generation(
        np.concatenate([part.output_ids for part in parts]).astype(np.int32),
        np.concatenate([part.logp for part in parts]).astype(np.float32),
        parts[-1].finish_reason,
        tuple(dict.fromkeys(versions)),
    )


def read_scores(answer: object, request: ScoringRequest) -> TokenScores:
    """Check and decode an answer to `scoring_body`. Raises AnswerError."""
    meta = _object(_object(answer, "the answer").get("meta_info"), "meta_info")
    scored_ids = request.token_ids[request.first :]
    entries = _list(meta, "input_token_logprobs")
    logp_N = _token_logp(entries[1:], scored_ids, "input_token_logprobs", echo_of_last=0)
    sense.check_log_probs(logp_N, field="input_token_logprobs")
    if not request.topk:
        empty = (len(scored_ids), 0)
        return TokenScores(logp_N, np.zeros(empty, np.int32), np.zeros(empty, np.float32))
    expected = (len(scored_ids), request.topk)
    shape = meta.get("input_top_logprobs_shape")
    if shape != list(expected) or meta.get("input_top_logprobs_null_prefix") != 1:
        raise AnswerError(
            f"SGLang answered top log-probs of shape {_shown(shape)} after "
            f"{_shown(meta.get('input_top_logprobs_null_prefix'))} null "
            f"rows; expected {list(expected)} after 1 (SGLang 0.5.23 or newer with return_flat_raw_top_logprobs_b64)"
        )
    topk_logp_NK = _base64_array(meta, "input_top_logprobs_val_flat_b64", np.dtype("<f4"), expected)
    topk_ids_NK = _base64_array(meta, "input_top_logprobs_idx_flat_b64", np.dtype("<i4"), expected)
    if not np.isfinite(topk_logp_NK).all():
        raise AnswerError("SGLang answered top log-probs that are not finite: the model's logits overflow")
    sense.check_candidates(topk_ids_NK, topk_logp_NK, request.vocab_size)
    sense.check_agreement(scored_ids, logp_N, topk_ids_NK, topk_logp_NK)
    return TokenScores(logp_N, topk_ids_NK.astype(np.int32), topk_logp_NK.astype(np.float32))


_LONGEST_PATH = 4096
_DTYPE_ALIASES = {"float": "float32", "half": "float16"}


def read_server_info(server: object, model: object) -> ServerInfo:
    """Decode the answers of /server_info and /model_info. Raises ServerError."""
    server, model = _object(server, "/server_info"), _object(model, "/model_info")
    bound, tensor_parallel = server.get("max_req_input_len"), server.get("tp_size")
    if not isinstance(bound, int) or not isinstance(tensor_parallel, int):
        raise ServerError("/server_info lacks max_req_input_len or tp_size: expected SGLang 0.5.23 or newer")
    return ServerInfo(
        version=one_line(server.get("version")),
        weight_version=one_line(model.get("weight_version")),
        tensor_parallel=tensor_parallel,
        # SGLang refuses inputs >= max_req_input_len and cuts max_new_tokens at max_req_input_len + 4 - input
        longest_input=bound - 1,
        longest_sequence=bound + 4,
        model_path=one_line(model.get("model_path", "?"), _LONGEST_PATH),
        model_type=one_line(model.get("model_type", "?")),
        dtype=_DTYPE_ALIASES.get(str(server.get("dtype", "?")), one_line(server.get("dtype", "?"))),
        quantization=None if server.get("quantization") is None else one_line(server["quantization"]),
        data_parallel=_count(server.get("dp_size")),
        pipeline_parallel=_count(server.get("pp_size")),
        device=one_line(server.get("device", "?")),
        float32_logits=server.get("enable_fp32_lm_head") is True,
        cache_tokens=found if type(found := server.get("max_total_num_tokens")) is int else None,
    )


def _count(value: object) -> int:
    """A parallel size; 1 if the server does not report it."""
    return value if isinstance(value, int) else 1


def read_checksums(answer: object) -> WeightChecksums | None:
    """Decode an answer of /weights_checker; None if it holds no checksum over all ranks."""
    total = answer.get("per_engine_checksum") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or not isinstance(total, str):
        return None
    tensors: dict[str, tuple[str, ...]] = {}
    places: dict[str, tuple[Place | None, ...]] = {}
    ranks = answer.get("ranks")
    for rank in ranks if isinstance(ranks, list) else []:
        found = rank.get("checksums") if isinstance(rank, dict) else None
        place = _place(rank)
        for name, checksum in found.items() if isinstance(found, dict) else ():
            key = one_line(name)
            tensors[key] = (*tensors.get(key, ()), one_line(checksum))
            places[key] = (*places.get(key, ()), place)
    return WeightChecksums(one_line(total), tensors, places)


def _place(rank: object) -> Place | None:
    """The place of the served model in one entry of `ranks`. A draft model has a separate entry."""
    placements = rank.get("parallelism_info") if isinstance(rank, dict) else None
    for info in placements if isinstance(placements, list) else []:
        if isinstance(info, dict) and info.get("role") == "target":
            pipeline, tensor = info.get("pp_rank"), info.get("tp_rank")
            return Place(pipeline, tensor) if isinstance(pipeline, int) and isinstance(tensor, int) else None
    return None


def weights_body(payloads: list[bytes], *, version: str) -> bytes:
    """Return the body of /update_weights_from_tensor: one pickle per rank (see `weight_payload`), KV cache kept."""
    encoded = {payload: base64.b64encode(payload).decode() for payload in payloads}
    ranks = ",".join(f'"{encoded[payload]}"' for payload in payloads)
    label = json.dumps(version)
    return f'{{"serialized_named_tensors":[{ranks}],"weight_version":{label},"flush_cache":false}}'.encode()


def _token_logp(
    entries: list[object], token_ids: IntArray, field: str, *, echo_of_last: int | None = None
) -> FloatArray:
    """Decode [[log-prob, token id, text], ...], whose ids must be exactly `token_ids`.

    `echo_of_last` is the id that the server reports for the last id of its vocabulary. The log-prob is still right.
    """
    if len(entries) != len(token_ids):
        raise AnswerError(f"SGLang answered {len(entries)} {field} for {len(token_ids)} tokens; expected one each")
    values = np.empty(len(entries), dtype=np.float32)
    for index, (entry, token_id) in enumerate(zip(entries, token_ids.tolist(), strict=True)):
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] not in (token_id, echo_of_last):
            raise AnswerError(
                f"SGLang answered {_shown(entry)} in {field}[{index}]; expected [log-prob, {token_id}, ...]"
            )
        # the comparison is false for NaN, and for an integer too large for a float
        if type(entry[0]) not in (float, int) or not abs(entry[0]) <= _LARGEST_FLOAT32:
            found = one_line(entry[0], 30)
            raise AnswerError(f"SGLang answered log-prob {found} in {field}[{index}]; expected a finite number")
        values[index] = entry[0]
    return values


def _weight_versions(meta: Json) -> tuple[str, ...]:
    spans = meta.get("weight_versions")
    if isinstance(spans, list) and spans:
        return tuple(one_line(_object(span, "meta_info.weight_versions").get("version")) for span in spans)
    if "weight_version" not in meta:
        raise AnswerError("SGLang answered without meta_info.weight_version: expected SGLang 0.5.23 or newer")
    return (one_line(meta["weight_version"]),)


def _base64_array(meta: Json, field: str, dtype: np.dtype[np.generic], shape: tuple[int, int]) -> np.ndarray:
    text = meta.get(field)
    if not isinstance(text, str):
        raise AnswerError(f"SGLang answered without meta_info.{field}: expected SGLang 0.5.23 or newer")
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise AnswerError(f"SGLang answered {field} that is not base64: {error}") from error
    if len(raw) != shape[0] * shape[1] * dtype.itemsize:
        raise AnswerError(f"SGLang answered {len(raw)} bytes in {field}; expected {shape} of {dtype.itemsize} bytes")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def read_token_lists(answer: object, count: int) -> list[list[int]]:
    """Decode an answer of /tokenize about `count` texts. Raises AnswerError."""
    lists = _list(_object(answer, "/tokenize"), "tokens")
    if len(lists) != count:
        raise AnswerError(f"SGLang answered {len(lists)} lists of tokens; expected {count}")
    found: list[list[int]] = []
    for ids in lists:
        if not isinstance(ids, list) or not all(type(index) is int for index in ids):
            raise AnswerError(f"SGLang answered {quoted(ids, 60)} as tokens of a text; expected a list of ids")
        found.append(ids)
    return found


def _object(value: object, name: str) -> Json:
    if not isinstance(value, dict):
        raise AnswerError(f"SGLang answered {_shown(value)} as {name}; expected a JSON object")
    return value


def _list(parent: Json, field: str) -> list[object]:
    value = parent.get(field)
    if not isinstance(value, list):
        raise AnswerError(f"SGLang answered {_shown(value)} as {field}; expected a list")
    return value


def _shown(value: object) -> str:
    """A value of an answer for a message: `nothing` if it is absent, otherwise its shortened repr."""
    return "nothing" if value is None else one_line(repr(value), 60)
