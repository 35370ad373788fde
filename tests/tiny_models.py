"""Tiny Hugging Face folders with random weights: real formats, real tokenizer files, a few hundred kilobytes.

For tests. The sizes are odd on purpose: hidden is not heads * head_dim, the vocabulary is not a multiple of 128, and
there are more query heads than key/value heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

from tropd_mcore.weights.hf_folder import copy_companions

transformers_logging.disable_progress_bar()

FAMILIES = ("qwen3", "qwen2", "llama")
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = "add apple count each five four give have how many more one pear seven six sum take the three two what zero"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CLASSES: dict[str, tuple[type, type[PreTrainedModel]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
_EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Settings of qwen3_moe: every layer has 6 experts, of which each token uses 2."""


def write_tiny_model(
    folder: Path,
    *,
    family: str = "qwen3",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    with_tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Save a random model (4 layers, 4 heads, 2 key/value heads, vocabulary 307 unless overridden) and a tokenizer.

    Norm weights and biases are random too, because their initial ones and zeros would hide a wrong name.
    """
    config_class, model_class = _CLASSES[family]
    settings: dict[str, Any] = {
        "vocab_size": 307,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "qwen2":
        settings |= {"hidden_size": 64}
        del settings["head_dim"]
    if family == "qwen3_moe":
        settings |= _EXPERTS
    model: Any = model_class(config_class(**(settings | overrides)))
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def write_moe_teacher(folder: Path, student: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Qwen3-MoE with the vocabulary, the tokenizer and the end tokens of `student`."""
    config = json.loads((student / "config.json").read_text())
    shared = {
        key: config[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    settings = {"num_hidden_layers": 2, **shared, **overrides}
    write_tiny_model(folder, family="qwen3_moe", seed=seed, with_tokenizer=False, **settings)
    copy_companions(student, folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (every text has ids) with a few whole words, three special tokens and a chat template."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges = _merges(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL_TOKENS[2],
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=[SPECIAL_TOKENS[1]],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merge the first words character by character; adds the pieces to `vocabulary` while it is below 300."""
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        piece = "Ġ"
        for character in word:
            if piece + character not in vocabulary:
                if len(vocabulary) >= 300:
                    return merges
                vocabulary[piece + character] = len(vocabulary)
                merges.append((piece, character))
            piece += character
    return merges


def _randomise(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.1 * noise if "norm" in name else 0.08 * noise)
