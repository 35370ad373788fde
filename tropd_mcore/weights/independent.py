"""Log-probs of a short text from a model folder, computed by transformers on the CPU from the folder alone.

They are the reference for `train.model_check` and for the fingerprint of a served teacher, which may be a model that
Megatron could not build. This module does not score in training and uses no code of the Megatron side. Invariants: no
code from the folder runs, and no network is used. A folder that lacks a tensor is an error, because transformers would
fill it with random numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tropd_mcore.errors import ModelError, first_line
from tropd_mcore.progress import progress
from tropd_mcore.types import FloatArray, IntArray
from tropd_mcore.weights.architecture import is_supported, read_architecture, read_config_json
from tropd_mcore.weights.families import hf_weight_plan
from tropd_mcore.weights.hf_folder import HfReader, TensorReader
from tropd_mcore.weights.host_memory import available_memory, gib
from tropd_mcore.weights.served import read_served_model

log = logging.getLogger(__name__)

PROBE_TEXT = (
    "A train leaves Zürich at 9:40 and arrives in Łódź at 23:05. How many minutes does the trip take?\n\n"
    "From 9:40 to 23:05 are 13 hours and 25 minutes, so it takes 13 * 60 + 25 = 805 minutes.\n"
    "```python\ndef mean(values):\n\treturn sum(values) / len(values)  # 0.5 <= mean\n```\n"
    "圆的面积等于圆周率乘以半径的平方。 Площадь круга равна πr². مساحة الدائرة 🚆🙂\n"
    "The teacher reads the same words and says how likely each of them is, given all the words before it; "
    "the student does so too, and what is compared are the two logarithms, token by token, in nats."
)
"""Text on which models are compared: prose, digits, code, line breaks, four scripts, emoji."""
PROBE_TOKENS = 128
"""Number of its tokens that are used: enough positions to detect another rotary base or scaling."""
_SPARE_BYTES = 512 * 2**20
"""Memory of the interpreter and of torch's allocations other than tensors."""
_COPIES_OF_LOGITS = 4
"""Copies of float32 [tokens, vocabulary]: logits, their log-softmax and what the model holds in between."""


def probe_ids(folder: Path, *, limit: int = PROBE_TOKENS) -> IntArray:
    """Return the first token ids of PROBE_TEXT, int32 [at most `limit`, and at most the model's context].

    Reads the folder's tokenizer.json directly. If there is none, returns ids drawn with a fixed seed. Ids that the
    model's vocabulary does not have are left out. Raises ModelError if a file is damaged or fewer than two ids remain.
    """
    sizes = read_served_model(folder)
    path = Path(folder) / "tokenizer.json"
    limit = min(limit, sizes.max_position_embeddings)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            ids = Tokenizer.from_file(str(path)).encode(PROBE_TEXT, add_special_tokens=False).ids
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            raise ModelError(f"{path}: damaged tokenizer ({error})") from error
        known = [index for index in ids if index < sizes.vocab_size]
    else:
        known = np.random.default_rng(0).integers(sizes.vocab_size, size=limit).tolist()
    if len(known) < 2:
        raise ModelError(f"{path}: {len(known)} tokens of a text of {len(PROBE_TEXT)} characters are in the vocabulary")
    return np.array(known[:limit], dtype=np.int32)


def memory_needed(folder: Path, *, tokens: int = PROBE_TOKENS) -> int:
    """Return the host memory in bytes that `independent_log_probs` needs: float32 parameters, logits, a fixed rest."""
    vocab_size = read_served_model(folder).vocab_size
    parameters = [prod(shape) for shape in _shapes(folder)]
    # The largest tensor counts twice, because both dtypes are in memory while it is converted to float32.
    return 4 * (sum(parameters) + max(parameters, default=0) + _COPIES_OF_LOGITS * tokens * vocab_size) + _SPARE_BYTES


def _shapes(folder: Path) -> list[tuple[int, ...]]:
    """Return the shape of every weight: from config.json, or from the files of a model that Megatron cannot build."""
    if is_supported(folder):
        return [shape for _, shape in hf_weight_plan(read_architecture(folder))]
    with TensorReader(folder) as reader:
        return [reader.shape(name) for name in reader.names()]


def fits(folder: Path, *, tokens: int = PROBE_TOKENS) -> str | None:
    """Return None if this host can compute the log-probs of `tokens`, otherwise a clause that says why not."""
    if (method := _quantization(folder)) is not None:
        return f"its weights are quantised ({method}), which is not computed on a CPU"
    needed, available = memory_needed(folder, tokens=tokens), available_memory()
    if needed <= available:
        return None
    return f"an independent reading takes {gib(needed)} of host memory and {gib(available)} are available"


def _quantization(folder: Path) -> str | None:
    """Return the name of the method if the folder's weights are quantised, else None."""
    config = read_config_json(folder)
    found = next((config[key] for key in ("quantization_config", "compression_config") if config.get(key)), None)
    if found is not None:
        return str(found.get("quant_method", "unknown method")) if isinstance(found, dict) else str(found)
    return "hf_quant_config.json" if (Path(folder) / "hf_quant_config.json").is_file() else None


def independent_log_probs(folder: Path, token_ids: IntArray, *, dtype: str = "float32") -> FloatArray:
    """Return log-probs of token_ids[1:], each given the tokens before it: float32 [len(token_ids) - 1], nats.

    `dtype` is the dtype of parameters and activations; the softmax is float32. Uses all cores of this process and logs
    a line at least every 30 s. Raises ModelError if transformers cannot load the folder or it lacks a tensor.
    """
    ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64))
    size = memory_needed(folder, tokens=len(ids))
    log.info("reading %s with transformers on the CPU (%s): %d tokens, %s", folder, dtype, len(ids), gib(size))
    with progress(log, f"reading {folder} with transformers"), _all_cores(), torch.inference_mode():
        model = independent_model(folder, dtype=getattr(torch, dtype))
        try:
            logits = model(ids[None]).logits[0, :-1]
        except Exception as error:  # of any type, for a model that needs a device or a package that is not here
            raise ModelError(f"model folder {folder}: transformers cannot run it here ({first_line(error)})") from error
        logp = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    found: FloatArray = logp.numpy().astype(np.float32)
    return found


def independent_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model of a folder, on the CPU, in eval mode, with eager attention.

    Raises ModelError if the folder cannot be loaded, lacks a tensor, or has one of another shape. Experts are computed
    one after the other, because their grouped product rounds differently and knows fewer dtypes.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    others = {"experts_implementation": "eager"}
    if is_supported(folder):
        others = {}
        with HfReader(folder) as reader:
            reader.check()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **others,
        )
    except Exception as error:  # of many types: for a model that it does not know, or a package that is not here
        raise ModelError(f"model folder {folder}: transformers cannot load it ({first_line(error)})") from error
    model, report = loaded
    invented = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if invented:
        raise ModelError(f"model folder {folder}: transformers finds no tensor for {invented[0]} ({len(invented)} so)")
    return model.eval()


@contextmanager
def _all_cores() -> Iterator[None]:
    """Use all cores that this process may use. A launcher gives each rank one thread, and the other ranks wait now."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
