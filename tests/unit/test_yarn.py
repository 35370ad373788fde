"""YaRN in config.json: read as transformers and SGLang read it, or refused in one line."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import _compute_yarn_parameters

from tropd_mcore.errors import ModelError
from tropd_mcore.weights.architecture import Architecture, architecture_from_config

SIZES = {
    "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 307, "max_position_embeddings": 4096,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": 1024}
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""As in the model cards of Qwen2.5 and Qwen3."""


def read(family: str = "qwen3", **changes: Any) -> Architecture:
    return architecture_from_config({"model_type": family, **SIZES, **changes}, source="config.json")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize(
    "given",
    [
        {"factor": 4.0},
        {"factor": 1},
        {"factor": 40, "beta_fast": 16, "beta_slow": 2.5},
        {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.3},
        {"factor": 4.0, "attention_factor": 1.138629},
        {"factor": 4.0, "truncate": False, "beta_fast": None},
    ],
    ids=str,
)
def test_the_attention_factor_is_that_of_transformers(family: str, given: dict[str, Any]) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, **ORIGINAL, **given}
    arch = read(family, rope_parameters=rope)
    config = AutoConfig.for_model(family, **json.loads(json.dumps({**SIZES, "rope_parameters": rope})))
    _, expected = _compute_yarn_parameters(config)
    assert arch.rope_scaling is not None
    assert arch.rope_scaling["attention_factor"] == pytest.approx(expected, rel=1e-12)
    assert arch.rope_scaling["truncate"] is rope.get("truncate", True)
    assert (arch.rope_scaling["factor"], arch.rope_theta) == (given["factor"], 1e6)


def test_old_and_new_keys_of_qwens_model_cards_mean_the_same() -> None:
    new = read(rope_parameters={**QWEN, "rope_theta": 1e6})
    card = read(rope_scaling=QWEN, rope_theta=1e6)
    older = read(rope_scaling={**{key: value for key, value in QWEN.items() if key != "rope_type"}, "type": "yarn"},
                 rope_theta=1e6)  # fmt: skip
    stated = read(rope_scaling={**QWEN, "beta_fast": 32, "beta_slow": 1, "truncate": True}, rope_theta=1e6)
    assert new == card == older == stated
    assert new.rope_scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32.0,
        "beta_slow": 1.0, "attention_factor": 0.1 * math.log(4.0) + 1.0, "truncate": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"factor": None}, ["'yarn' needs positive numbers for factor"]),
        ({"original_max_position_embeddings": None}, ["needs positive numbers for original_max_position_embeddings"]),
        ({"factor": 0.5}, ["factor is 0.5", "expected a number >= 1"]),
        ({"beta_fast": -1}, ["beta_fast is -1", "positive number"]),
        ({"beta_slow": True}, ["beta_slow is True", "positive number"]),
        ({"beta_fast": 2, "beta_slow": 3}, ["beta_fast is 2 and beta_slow is 3", "expected beta_fast > beta_slow"]),
        ({"mscale": 1.0}, ["mscale has no effect without the other"]),
        ({"mscale_all_dim": 1.0}, ["mscale_all_dim has no effect without the other"]),
        ({"truncate": 1}, ["truncate is 1", "true or false"]),
        ({"attention_factor": 1.0}, ["attention_factor is 1.0", "SGLang ignores that key and computes 1.138629"]),
        ({"attention_factor": "1"}, ["attention_factor is '1'", "positive number"]),
        ({"attn_factor": 1.5}, ["attn_factor=1.5", "only SGLang applies"]),
        ({"extrapolation_factor": 0.5}, ["extrapolation_factor=0.5", "only SGLang applies"]),
        ({"low_freq_factor": 1.0}, ["low_freq_factor=1.0", "no effect on rope_type 'yarn'"]),
    ],
    ids=str,
)
def test_a_parameter_that_is_wrong_or_read_by_one_program_alone_is_refused(
    given: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        read(rope_scaling={**QWEN, **given}, rope_theta=1e6)
    message = str(caught.value)
    assert "config.json" in message and "\n" not in message
    assert all(word in message for word in words), message
