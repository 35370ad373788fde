"""Makes the model folders that both trainers can read, from the quickstart's pair or from random weights.

The folders have the rows of the tokenizer and no padding rows, because TRL refuses two models with different numbers
of rows and trains padding rows as if they were tokens. A row that is left out belongs to no token.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, Qwen3ForCausalLM

from examples.arithmetic.models import load, new_model
from examples.arithmetic.settings import ModelSettings

ROLES = ("student", "teacher")
EXAMPLE = "example.json"
"""Summary of `examples.make_models`, with a hash of what it made."""
VOCABULARY = 151_936
"""Rows of Qwen3's embedding."""


SYNTHETIC = {
    "student": ModelSettings(
        hidden_size=256, num_layers=8, intermediate_size=1024, vocab_size=VOCABULARY, tied=True, head_dim=64
    ),
    "teacher": ModelSettings(
        hidden_size=384, num_layers=10, intermediate_size=1536, vocab_size=VOCABULARY, tied=True, head_dim=64
    ),
}
MAX_POSITIONS = 512


def trim(models: Path, out: Path, student: str = "student") -> Path:
    """Return `out` with a student and the teacher of `models`, cut to the rows of the tokenizer.

    `student` is the name of the student's folder in `models`.
    """
    _forget_others(out, models, student)
    for role, name in (("student", student), ("teacher", "teacher")):
        folder = out / role
        if folder.exists():
            continue
        model = load(models / name)
        model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(models / name)))
        _save(model, models / name, folder)
    return out


def synthesize(models: Path, out: Path, *, seed: int = 20) -> Path:
    """Return `out` with the two models of `SYNTHETIC`, with random weights, and a tokenizer of as many tokens as rows.

    The tokenizer is that of `models` with fillers: tokens that no text contains. The student has `seed`, the
    teacher the next one.
    """
    _forget_others(out, models, "synthetic")
    for number, role in enumerate(ROLES):
        folder = out / role
        if folder.exists():
            continue
        tokenizer = AutoTokenizer.from_pretrained(models / role)
        shape = SYNTHETIC[role]
        _save(new_model(shape, tokenizer, MAX_POSITIONS, seed + number), models / role, folder)
        _fill_tokenizer(folder / "tokenizer.json", shape.vocab_size)
    return out


def parameters(folder: Path) -> int:
    """Return the number of parameters of a model folder; tied embeddings count once."""
    return sum(parameter.numel() for parameter in load(folder).parameters())


def _forget_others(out: Path, models: Path, student: str) -> None:
    """Remove `out` if it was made from other models or another student, and note what it is made from."""
    example, note = models / EXAMPLE, out / "made_from.json"
    made_from = {"student": student, "models": json.loads(example.read_text())["content_hash"]}
    if not note.exists() or json.loads(note.read_text()) != made_from:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        note.write_text(json.dumps(made_from))


def _save(model: Qwen3ForCausalLM, tokenizer_from: Path, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer_from / name).exists():
            shutil.copyfile(tokenizer_from / name, partial / name)
    partial.rename(folder)


def _fill_tokenizer(path: Path, size: int) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    taken = set(vocabulary.values()) | {added["id"] for added in content["added_tokens"]}
    for number in range(size):
        if number not in taken:
            vocabulary[f"<filler {number}>"] = number
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
