"""Identifies the model behind a server: what it reports, a checksum of its weights, and its scores of a short text.

`teacher.identity_check` decides when this is checked. The scores are the fingerprint of the weights: a server with
other weights gives other scores, whatever it reports about itself. Invariant: nothing here changes a server.

Shapes: N scored tokens of the text.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tropd_mcore.errors import GateError, ModelError, ServerError
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.wire import ScoringRequest, is_exact
from tropd_mcore.types import FloatArray, IntArray
from tropd_mcore.weights.independent import fits, independent_log_probs, probe_ids
from tropd_mcore.weights.served import read_served_model, read_vocab_size

log = logging.getLogger(__name__)

FLOAT32_BOUND = 1e-4
"""Largest mean |difference| in nats, over the text, between two float32 engines on a CPU. Measured between SGLang and
transformers: at most 1e-6 (docs/gates.md)."""
ROUNDED_BOUND = 0.1
"""The same bound if the server rounds: bfloat16 or less, or float32 on a GPU, which may use TF32. Measured in bfloat16:
7e-3 on the examples."""
TEXT_TOKENS = 256
"""Largest number of tokens of the text; with large vocabularies it has about 200."""


@dataclass(frozen=True)
class ServedModel:
    """What a server reports about its model."""

    model_path: str
    weight_version: str
    model_type: str
    dtype: str
    quantization: str | None
    tensor_parallel: int
    server_version: str
    longest_input: int
    """Not a property of the model: on a GPU it depends on the free memory when the server started."""
    vocab_size: int | None
    """From the config.json at `model_path`, because SGLang does not report it; None if this host cannot read it."""
    checksum: str | None
    """Checksum of the weights on all ranks; None if the server gives none or was not asked."""
    data_parallel: int = 1
    pipeline_parallel: int = 1
    device: str = "?"
    """`?` if unknown"""

    @property
    def exact(self) -> bool:
        """Whether it computes in float32 on a CPU."""
        return is_exact(self.dtype, self.quantization, self.device)

    def describe(self) -> str:
        """Return a phrase for messages."""
        quantization = f", quantization {self.quantization}" if self.quantization else ""
        checksum = f", checksum {self.checksum[:12]}" if self.checksum else ""
        said = f"model_path {self.model_path}, weight_version {self.weight_version}, {self.dtype}"
        return f"{said}{quantization}{checksum}"


@dataclass(frozen=True)
class Fingerprint:
    """A text as token ids, and its log-probs under a model."""

    ids_N: tuple[int, ...]
    """All tokens of the text, including the first"""
    logp_N: tuple[float, ...]
    """Log-probs of all tokens but the first, nats"""

    def distance(self, other: Fingerprint) -> float:
        """Return the mean |difference| in nats over the common beginning of both texts.

        Infinite if neither text is a prefix of the other, or if a log-prob is not finite (a NaN would exceed no bound).
        """
        count = min(len(self.ids_N), len(other.ids_N))
        if count < 2 or self.ids_N[:count] != other.ids_N[:count]:
            return math.inf
        found = float(np.abs(np.array(self.logp_N[: count - 1]) - np.array(other.logp_N[: count - 1])).mean())
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Identity:
    """The model that a server serves at one moment."""

    model: ServedModel
    fingerprint: Fingerprint

    def digest(self) -> str:
        """Short hash that differs between models: of the checksum (or else the scores), dtype and quantization."""
        weights = self.model.checksum or ",".join(f"{value:.4f}" for value in self.fingerprint.logp_N)
        found = hashlib.sha256(f"{weights} {self.model.dtype} {self.model.quantization}".encode())
        return found.hexdigest()[:16]


def text_ids(student: Path, teacher: Path) -> IntArray:
    """Return the text's ids for two models with one tokenizer, int32: ids that both have, at most TEXT_TOKENS."""
    sizes = read_served_model(teacher)
    ids = probe_ids(student, limit=min(TEXT_TOKENS, sizes.max_position_embeddings - 8))
    return ids[ids < sizes.vocab_size]


def read_model(client: SglangClient, *, with_checksum: bool) -> ServedModel:
    """Ask a server which model it serves. The checksum costs one pass over its weights. Raises ServerError."""
    info = client.info()
    checksums = client.weights_checksum(may_refuse=True) if with_checksum else None
    return ServedModel(
        model_path=info.model_path,
        weight_version=info.weight_version,
        model_type=info.model_type,
        dtype=info.dtype,
        quantization=info.quantization,
        tensor_parallel=info.tensor_parallel,
        server_version=info.version,
        longest_input=info.longest_input,
        vocab_size=_vocab_size(Path(info.model_path)),
        checksum=checksums.total if checksums is not None else None,
        data_parallel=info.data_parallel,
        pipeline_parallel=info.pipeline_parallel,
        device=info.device,
    )


def read_identity(client: SglangClient, ids: IntArray) -> Identity:
    """Ask a server for its model, checksum and scores of the text. Raises ServerError."""
    model = read_model(client, with_checksum=True)
    (scores,) = client.score([ScoringRequest(ids, first=1)])
    if isinstance(scores, ServerError):
        raise scores
    return Identity(model, fingerprint_of(ids, scores.logp_N))


def fingerprint_of(ids: IntArray, logp_N: FloatArray) -> Fingerprint:
    """Return the fingerprint of `ids`; `logp_N` are the log-probs of all tokens but the first."""
    return Fingerprint(tuple(ids.tolist()), tuple(float(value) for value in logp_N))


def check_serves(client: SglangClient, folder: Path, *, key: str, url_key: str) -> None:
    """Raise GateError if the server does not serve the weights of `folder`. If this cannot be computed, log a warning.

    `key` names the folder and `url_key` the server in messages. Cost: one forward pass of the folder on the CPU.
    """
    reason = fits(folder, tokens=TEXT_TOKENS)
    if reason is not None:
        log.warning("%s is not compared with the server at %s: %s", key, client.url, reason)
        return
    ids = text_ids(folder, folder)[: client.info().longest_input]
    served = read_identity(client, ids)
    distance = served.fingerprint.distance(fingerprint_of(ids, independent_log_probs(folder, ids)))
    bound = FLOAT32_BOUND if served.model.exact else ROUNDED_BOUND
    if distance > bound:
        raise GateError(
            f"{url_key}: the server at {client.url} serves other weights than {key}={folder}: its scores of a text "
            f"differ by {distance:.1e} nats (mean), allowed {bound:.0e}; it says {served.model.describe()}"
        )


def changes(before: ServedModel, now: ServedModel) -> list[str]:
    """Return `name old -> new` for each property of the model that differs. Unknown values are not compared."""
    return [line for _, line in _differences(before, now)]


def other_weights(before: ServedModel, now: ServedModel) -> str | None:
    """Return the line about the checksums if they differ at the same layout; None if equal or not comparable."""
    parallel = ("tensor_parallel", "data_parallel", "pipeline_parallel")
    layout = ("dtype", "quantization", "device", "server_version", *parallel)
    if any(getattr(before, name) != getattr(now, name) for name in layout):
        return None
    return dict(_differences(before, now)).get("checksum")


def _differences(before: ServedModel, now: ServedModel) -> Iterator[tuple[str, str]]:
    before = replace(before, longest_input=now.longest_input)
    for name, old in asdict(before).items():
        new = getattr(now, name)
        # the checksum is not always requested, and config.json (for vocab_size) is not always readable
        unknown = {"checksum": None, "vocab_size": None, "device": "?"}
        is_unknown = name in unknown and unknown[name] in (old, new)
        if old != new and not is_unknown:
            short = (f"{old[:12]} -> {new[:12]}") if name == "checksum" else f"{old} -> {new}"
            yield name, f"{name} {short}"


def _vocab_size(folder: Path) -> int | None:
    try:
        return read_vocab_size(folder)
    except ModelError:
        return None
