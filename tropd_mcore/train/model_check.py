"""Compares every Megatron model of the job with transformers on one short text, before the model is used.

This module does not check servers: the rollout server is compared at every step (`gates`), and a served teacher by its
fingerprint (`teacher.identity_check`). Invariants: transformers alone computes the other side, in float32, from the
files. If that is not possible, the log says why, and which other check compares the model. A model is compared again
only if its files, the layout or a version changes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tropd_mcore.config.derived import model_paths, phase_configs
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError
from tropd_mcore.files import publish_text
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.probe import probe_log_probs
from tropd_mcore.serving.wire import is_exact
from tropd_mcore.train.inputs import Inputs
from tropd_mcore.types import FloatArray, IntArray
from tropd_mcore.weights.independent import fits, independent_log_probs, probe_ids

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadingBounds:
    """Bounds on |Megatron - transformers| over the tokens of the text, nats."""

    mean: float
    p99: float
    largest: float


EXACT = ReadingBounds(mean=1e-4, p99=1e-3, largest=1e-3)
"""For float32 on a CPU on both sides. Measured: 1e-5 at most, once 2e-4; the least likely tokens of a vocabulary differ
by ten times as much (docs/models.md). Of some hundred tokens the 99th percentile is the second largest difference, so
it has the bound of the largest."""
ROUNDED = ReadingBounds(mean=0.1, p99=0.25, largest=2.0)
"""For Megatron in bfloat16, or in float32 on a GPU, whose matrix products may be TF32. Measured in bfloat16 on a CPU:
0.024, 0.085 and 0.15 at most (docs/models.md)."""


@dataclass(frozen=True)
class ReadingDifference:
    """|Megatron - transformers| over the tokens of the text, in the replica where it is largest, nats."""

    tokens: int
    mean: float
    p99: float
    largest: float
    first: float
    """Difference of the second token of the text, which depends on one position only."""

    @classmethod
    def of(cls, found: npt.NDArray[np.float64], expected: FloatArray) -> ReadingDifference:
        """Compare `found` [replicas, tokens] with `expected` [tokens]. A missing or non-finite number is infinite."""
        gap = np.abs(found - expected.astype(np.float64))
        gap[~np.isfinite(gap)] = np.inf
        worst = gap[int(gap.max(axis=1).argmax())]
        p99 = float(np.sort(worst)[int(0.99 * (len(worst) - 1))])  # a quantile between infinities would be NaN
        return cls(len(worst), float(worst.mean()), p99, float(worst.max()), float(worst[0]))

    def within(self, bounds: ReadingBounds) -> bool:
        """Return whether the difference can be explained by rounding."""
        return self.mean <= bounds.mean and self.p99 <= bounds.p99 and self.largest <= bounds.largest

    def __str__(self) -> str:
        return f"{self.mean:.1e} nats (mean), {self.p99:.1e} (99th percentile), {self.largest:.1e} (maximum)"


def check_model(context: JobContext, key: str, model: Model, inputs: Inputs) -> None:
    """Compare `model`, just loaded from the folder of `key`, with transformers on that folder. Collective.

    Logs the difference, or that it was compared at an earlier launch, or why it is not compared. Cost: rank 0 reads the
    folder and runs one forward pass over some hundred tokens on the CPU, while the other ranks wait. Raises GateError
    if the two differ by more than rounding.
    """
    config, control = context.config, context.layout.groups.control
    if not config.gates.model_reading:
        return
    folder, compared = model_paths(config)[key], _fingerprint(context, key, model, inputs)
    reading = on_rank_zero(lambda: _reading(context, key, folder, compared), control)
    if reading is None:
        return
    token_ids, expected = reading
    found = probe_log_probs(model, token_ids, LossSettings.from_config(phase_configs(config)[0]))
    difference, bounds = ReadingDifference.of(found, expected), bounds_of(model)
    if not difference.within(bounds):
        raise GateError(_message(key, folder, difference, bounds, config))
    on_rank_zero(lambda: _remember(context, key, compared, difference), control)
    log.info("gates.model_reading: %s and transformers differ by %s over %d tokens", key, difference, difference.tokens)


def bounds_of(model: Model) -> ReadingBounds:
    """Return the bounds for the dtype and device of `model`."""
    dtype = str(model.config.params_dtype).removeprefix("torch.")
    return EXACT if is_exact(dtype, None, model.platform.name) else ROUNDED


def _reading(
    context: JobContext, key: str, folder: Path, compared: dict[str, Any]
) -> tuple[IntArray, FloatArray] | None:
    """Return (token ids, their log-probs by transformers); None, with a log line, if nothing is to be compared.

    Called on rank 0.
    """
    known = _remembered(context).get(key)
    if known is not None and known["of"] == compared:
        log.info("gates.model_reading: %s was compared at an earlier launch (%.1e nats at most)", key, known["largest"])
        return None
    missing = fits(folder)
    if missing is not None:
        others = _others(key, context.config)
        level = logging.INFO if others else logging.WARNING
        log.log(level, "gates.model_reading: %s is not compared with transformers: %s; %s",
                key, missing, others or "nothing else compares it")  # fmt: skip
        return None
    return _independent(folder, json.dumps(compared["files"]))


@lru_cache(maxsize=4)
def _independent(folder: Path, files: str) -> tuple[IntArray, FloatArray]:
    """Compute the log-probs once for all keys that name the same folder with the same content."""
    ids = probe_ids(folder)
    return ids, independent_log_probs(folder, ids)


def _others(key: str, config: Config) -> str:
    """Return which other check compares the model of `key`; "" if none does."""
    if key == "student.path" and config.gates.sampler_logprob and config.run.replay is None:
        return "the rollout server's reading of the same weights is compared at every step (gates.sampler_logprob)"
    return ""


def _fingerprint(context: JobContext, key: str, model: Model, inputs: Inputs) -> dict[str, Any]:
    """Return everything that the comparison depends on, as JSON values."""
    layout, settings = context.layout, LossSettings.from_config(phase_configs(context.config)[0])
    return {
        "files": inputs.models[key].digest.whole(),
        "dtype": str(model.config.params_dtype).removeprefix("torch."),
        "layout": [layout.tp_size, layout.pp_size, layout.vpp_size, layout.cp_size, layout.dp_size],
        "loss": [settings.form, settings.backend, settings.logit_softcap],
        "launch": inputs.launch,
    }


def _remembered(context: JobContext) -> dict[str, Any]:
    """Return {configuration key: record of the comparison}. Unusable records are dropped and compared again."""
    try:
        values = json.loads(context.run_dir.model_checks.read_text(encoding="utf-8"))
        return {
            key: value for key, value in values.items() if isinstance(value.get("largest"), float) and "of" in value
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(context: JobContext, key: str, compared: dict[str, Any], difference: ReadingDifference) -> None:
    values = _remembered(context) | {key: {"of": compared, **asdict(difference)}}
    publish_text(context.run_dir.model_checks, json.dumps(values, indent=1) + "\n")


def _message(key: str, folder: Path, difference: ReadingDifference, bounds: ReadingBounds, config: Config) -> str:
    allowed = f"{bounds.mean:.0e}, {bounds.p99:.0e} and {bounds.largest:.0e}"
    if config.loss.logit_softcap is not None:
        cause = f"loss.logit_softcap = {config.loss.logit_softcap}, which this model does not have"
    elif difference.first <= bounds.mean:
        cause = (
            "the attention: the first token agrees and later ones do not, so a rotary base, a scaling or a window in "
            "config.json is read differently"
        )
    elif not np.isfinite(difference.largest):
        cause = "a weight that is not finite, or one that was not loaded"
    else:
        cause = "a tensor, a norm or the output layer: the first token differs already"
    return (
        f"gates.model_reading: {key}={folder}: Megatron's log-probs of {difference.tokens} tokens differ from those of "
        f"transformers by {difference}; allowed {allowed}. Likely cause: {cause}. The folder is not read as its files "
        "say, so nothing that this model scores or learns can be trusted; compare with `tropd convert verify`, or "
        "leave this comparison out with gates.model_reading=false"
    )
