"""Two tiny Qwen3 folders with random weights, prompts, and the configuration of a job that trains one from the other.

Invariant: the sizes are those that every engine takes: heads of 64 for attention kernels on GPUs, and an even number of
heads for two tensor ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from tropd_mcore.serving.interpreter import beside

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 64
LAYERS = {"student": 2, "teacher": 3}
POSITIONS = 512
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = 16
STEPS = 2
"""The second step samples from weights that the first one has trained and published."""


def write_models(folder: Path) -> None:
    """Write `folder`/student and `folder`/teacher: float32 weights, a byte-level tokenizer, a chat template."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = _tokenizer()
    for name, layers in LAYERS.items():
        config = Qwen3Config(
            vocab_size=len(tokenizer) + 1,  # odd: the shards of two ranks are padded
            hidden_size=HEADS * 32,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_VALUE_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=POSITIONS,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model: Any = Qwen3ForCausalLM(config)
        generator = torch.Generator().manual_seed(layers)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1.0 + 0.1 * noise if "norm" in key else 0.05 * noise)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, TURN_START, TURN_END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def write_job(folder: Path, platform: Literal["cpu", "cuda"], tensor: int) -> Path:
    """Write prompts and the configuration of a job of `tensor` ranks; returns the configuration's path.

    float32 on a CPU, where engines agree to 1e-5 nats, and bfloat16 on a GPU, as in a real job.
    """
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"id": str(i), "prompt": f"How much is {i} and {3 * i}?"}) for i in range(PROMPTS)]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    dtype = "float32" if platform == "cpu" else "bfloat16"
    server: dict[str, Any] = {"max_total_tokens": 8192}
    if platform == "cuda":
        server["mem_fraction"] = 0.3
    if find_spec("sglang") is None and (python := beside()) is not None:
        server["python"] = str(python)
    config = {
        "run": {"dir": str(folder / "run"), "steps": STEPS},
        "platform": {"kind": platform},
        "parallel": {"tensor": tensor},
        "student": {"path": str(folder / "student"), "dtype": dtype},
        "teacher": {"kind": "megatron", "path": str(folder / "teacher"), "dtype": dtype},
        "data": {"prompts": str(prompts), "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 32, "server": server},
        "objective": {"kind": "tropd", "outlier": {"topk": 16}, "guidance": {"enabled": False}},
        "batch": {"tokens_per_micro_batch": 512},
        "optimizer": {"learning_rate": 1e-3},
    }
    path = folder / "selftest.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def job_command(python: str, config: Path, overrides: Sequence[str]) -> list[str]:
    """Return the command that runs the job of `write_job`."""
    return [python, "-m", "tropd_mcore.cli.main", "train", str(config), *overrides]
