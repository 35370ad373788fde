"""Which model does a server serve? What it says of itself, a checksum of its weights, and its scores of a short text.

Not for who asks and when (`teacher.identity_check`). The scores are the fingerprint: they follow from the weights, so a
server with other weights gives others, whatever it says of itself. Invariant: nothing here changes a server.

Shapes: N scored tokens of the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from tropd_mcore.errors import GateError, ServerError
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.wire import ScoringRequest, is_exact
from tropd_mcore.types import FloatArray, IntArray
from tropd_mcore.weights.architecture import read_architecture
from tropd_mcore.weights.independent import fits, independent_log_probs, probe_ids

log = logging.getLogger(__name__)

FLOAT32_BOUND = 1e-4
"""Mean |difference| of two float32 engines on a CPU, on the text, nats. Measured between SGLang and transformers: 1e-6
and less (docs/gates.md)."""
ROUNDED_BOUND = 0.1
"""The same where the server rounds: bfloat16 or less, or float32 on a GPU, whose products may be TF32. Measured in
bfloat16: 7e-3 on the examples."""
TEXT_TOKENS = 256
"""Most tokens of the text; it has about 200 in the large vocabularies."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says of the model that it serves."""

    model_path: str
    weight_version: str
    model_type: str
    dtype: str
    quantization: str | None
    tensor_parallel: int
    server_version: str
    longest_input: int
    """Not of the model: on a GPU it follows from the memory that was free when the server started."""
    vocab_size: int | None
    """From the config.json at `model_path`, where this host can read it: SGLang does not tell it."""
    checksum: str | None
    """Of the weights on all ranks; None where the server has none to give, or was not asked."""
    data_parallel: int = 1
    pipeline_parallel: int = 1
    device: str = "?"
    """`?` where it is not known"""

    @property
    def exact(self) -> bool:
        """Whether it computes in float32 on a CPU."""
        return is_exact(self.dtype, self.quantization, self.device)

    def describe(self) -> str:
        """One clause for messages."""
        quantization = f", quantization {self.quantization}" if self.quantization else ""
        checksum = f", checksum {self.checksum[:12]}" if self.checksum else ""
        said = f"model_path {self.model_path}, weight_version {self.weight_version}, {self.dtype}"
        return f"{said}{quantization}{checksum}"


@dataclass(frozen=True)
class Fingerprint:
    """Log-probs of a text under a model, and where they come from."""

    ids_N: tuple[int, ...]
    """The text, its first token included"""
    logp_N: tuple[float, ...]
    """Of all but the first, nats"""

    def distance(self, other: Fingerprint) -> float:
        """Mean |difference|, nats, over what both texts begin with.

        Infinite where one does not begin the other, and where a log-prob is not finite: NaN is above no bound.
        """
        count = min(len(self.ids_N), len(other.ids_N))
        if count < 2 or self.ids_N[:count] != other.ids_N[:count]:
            return math.inf
        found = float(np.abs(np.array(self.logp_N[: count - 1]) - np.array(other.logp_N[: count - 1])).mean())
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Identity:
    """What a server serves, as it was found at one moment."""

    model: ServedModel
    fingerprint: Fingerprint

    def digest(self) -> str:
        """Short text that tells the scores of this model from those of another: checksum, else scores, and rounding."""
        weights = self.model.checksum or ",".join(f"{value:.4f}" for value in self.fingerprint.logp_N)
        found = hashlib.sha256(f"{weights} {self.model.dtype} {self.model.quantization}".encode())
        return found.hexdigest()[:16]


def text_ids(student: Path, teacher: Path) -> IntArray:
    """Ids of the text for two models of one tokenizer, int32: those that both have, at most TEXT_TOKENS."""
    width = read_architecture(teacher).vocab_size
    longest = min(TEXT_TOKENS, read_architecture(teacher).max_position_embeddings - 8)
    ids = probe_ids(student, limit=longest)
    return ids[ids < width]


def read_model(client: SglangClient, *, with_checksum: bool) -> ServedModel:
    """Ask a server what it serves; the checksum costs one pass over its weights. Raises ServerError."""
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
    """Ask a server for everything. Raises ServerError."""
    model = read_model(client, with_checksum=True)
    (scores,) = client.score([ScoringRequest(ids, first=1)])
    if isinstance(scores, ServerError):
        raise scores
    return Identity(model, fingerprint_of(ids, scores.logp_N))


def fingerprint_of(ids: IntArray, logp_N: FloatArray) -> Fingerprint:
    """The fingerprint of `ids` whose tokens but the first have the log-probs `logp_N`."""
    return Fingerprint(tuple(ids.tolist()), tuple(float(value) for value in logp_N))


def check_serves(client: SglangClient, folder: Path, *, key: str, url_key: str) -> None:
    """Raise GateError where the server does not serve the weights of `folder`; say so where that cannot be computed.

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
    """`name old -> new` of everything about the model that differs; what one side does not know is not compared."""
    return [line for _, line in _differences(before, now)]


def other_weights(before: ServedModel, now: ServedModel) -> str | None:
    """The checksums, where both were made at one layout and differ; None where they agree or cannot be compared."""
    parallel = ("tensor_parallel", "data_parallel", "pipeline_parallel")
    layout = ("dtype", "quantization", "device", "server_version", *parallel)
    if any(getattr(before, name) != getattr(now, name) for name in layout):
        return None
    return dict(_differences(before, now)).get("checksum")


def _differences(before: ServedModel, now: ServedModel) -> Iterator[tuple[str, str]]:
    before = replace(before, longest_input=now.longest_input)
    for name, old in asdict(before).items():
        new = getattr(now, name)
        # the checksum is not always asked for, and the file that tells the vocabulary not always readable
        unknown = {"checksum": None, "vocab_size": None, "device": "?"}
        is_unknown = name in unknown and unknown[name] in (old, new)
        if old != new and not is_unknown:
            short = (f"{old[:12]} -> {new[:12]}") if name == "checksum" else f"{old} -> {new}"
            yield name, f"{name} {short}"


def _vocab_size(folder: Path) -> int | None:
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
