"""Make the two models: Qwen3 from random weights, supervised training on worked answers, greedy accuracy.

This module does not distil; its models are the input of a distillation run. Invariants: all random numbers come from
the seed in the settings. A held-out problem is never trained on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.arithmetic.settings import ModelSettings, PretrainSettings
from examples.arithmetic.task import (
    Problem,
    Slip,
    Swap,
    forgotten_carries,
    random_slips,
    work,
    work_without_carries,
    worked_answer,
)
from tropd_mcore.progress import progress

log = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""The label that the loss of transformers ignores."""


@dataclass(frozen=True)
class Example:
    """A problem as token ids: the prompt, the worked answer as written, and as labels; both answers end with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]
    label_ids: list[int]


def encode_problem(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, slip: Slip | None = None, swap: Swap | None = None
) -> Example:
    """Return the ids of a problem and its worked answer. Written and right text differ in digits, not in length."""
    prompt = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, return_dict=False)
    answer = work(problem.a, problem.b, slip, swap)
    written, right = (
        [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        for text in (answer.written, answer.right)
    )
    return Example(list(prompt), written, right)


def encode_other(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> Example:
    """Return the ids of a problem and of its answer by the other procedure."""
    text = work_without_carries(problem.a, problem.b)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Example(encode_problem(tokenizer, problem).prompt_ids, ids, label_ids=ids)


def first_line(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> list[int]:
    """Return the ids of the first line of the worked answer."""
    line = worked_answer(problem.a, problem.b).partition("\n")[0] + "\n"
    return list(tokenizer.encode(line, add_special_tokens=False))


def new_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerFast, max_positions: int, seed: int
) -> Qwen3ForCausalLM:
    """Return a Qwen3 model with random float32 weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=settings.tied,
        initializer_range=0.5 / math.sqrt(settings.hidden_size),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load(folder: Path) -> Qwen3ForCausalLM:
    """Return a model that was saved by `save_pretrained`."""
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Iterator[Problem],
    settings: PretrainSettings,
    seed: int,
    *,
    what: str,
) -> None:
    """Train `model` in place on fresh problems. `what` is the model's name for the progress line."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    draw = _example_drawer(tokenizer, settings, Random(seed))
    model.train()
    with progress(log, f"{what}: training", total=settings.max_steps, unit="steps", amount_unit="tok") as state:
        for step in range(1, settings.max_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _rate_factor(settings, step)
            examples = [draw(problem) for problem in islice(stream, settings.batch_size)]
            ids, labels = right_padded(examples, tokenizer.pad_token_id)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state.advance(note=f"loss {float(loss.detach()):.3f}", amount=ids.numel())


def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], *, max_new_tokens: int
) -> str:
    """Return `right/all` for the greedy answers, judged by the text after `####`."""
    prompts = [encode_problem(tokenizer, problem).prompt_ids for problem in problems]
    responses = generate(model, tokenizer, prompts, max_new_tokens)
    return f"{round(share_right(tokenizer, responses, problems) * len(problems))}/{len(problems)}"


def share_right(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[list[int]], problems: Sequence[Problem]
) -> float:
    """Return the share of responses whose text after `####` is the problem's answer."""
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses]
    right = [
        text.rpartition("####")[2].strip() == problem.answer for text, problem in zip(texts, problems, strict=True)
    ]
    return sum(right) / len(right)


@torch.no_grad()
def generate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    sample: bool = False,
) -> list[list[int]]:
    """Return one response per prompt, with its EOS and nothing after it; greedy, or a `sample` at temperature 1."""
    model.eval()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    mask = (ids != tokenizer.pad_token_id).long()
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    padding = list(range(len(tokenizer), model.config.vocab_size))  # rows of the embedding that are no tokens
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, suppress_tokens=padding, **how
    )
    ends = tokenizer.eos_token_id
    rows = output[:, width:].tolist()
    return [row[: row.index(ends) + 1] if ends in row else row for row in rows]


def _example_drawer(
    tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings, random: Random
) -> Callable[[Problem], Example]:
    """Return the function that turns a problem into a training example under the settings."""
    slips = random_slips(random, settings.random_slip_rate)
    swap = (lambda: random.random() < settings.swap_rate) if settings.swap_rate else None

    def draw_other(problem: Problem) -> Example:
        other, worked, given = (
            encode_other(tokenizer, problem),
            encode_problem(tokenizer, problem),
            first_line(tokenizer, problem),
        )
        kind = random.random()
        if kind < settings.continued_share:
            return _begun(given, worked, worked.label_ids[len(given) :])
        if kind < settings.continued_share + settings.relapse_share:
            return _begun(given[: random.randrange(1, len(given))], other, other.label_ids)
        return other

    def draw(problem: Problem) -> Example:
        if settings.other_share and random.random() < settings.other_share:
            return draw_other(problem)
        if settings.forget_carry_from is not None:
            habit = forgotten_carries(random, settings.forget_carry_from, settings.forget_carry_probability)
            example = encode_problem(tokenizer, problem, habit, swap)
            return Example(example.prompt_ids, example.response_ids, label_ids=example.response_ids)
        return encode_problem(tokenizer, problem, slips if random.random() < 0.5 else None, swap)

    return draw


def _begun(given: list[int], example: Example, rest: list[int]) -> Example:
    """Return an example that learns `rest` after `given`, which is an input without labels."""
    return Example(example.prompt_ids, [*given, *rest], label_ids=[*[IGNORED_LABEL] * len(given), *rest])


def _rate_factor(settings: PretrainSettings, step: int) -> float:
    warmup = min(1.0, step / settings.warmup_steps)
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.max_steps)))


def right_padded(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels [rows, longest], with `IGNORED_LABEL` on prompts and padding."""
    width = max(len(example.prompt_ids) + len(example.response_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED_LABEL)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt_ids), len(example.prompt_ids) + len(example.response_ids)
        ids[row, :stop] = torch.tensor(example.prompt_ids + example.response_ids)
        labels[row, start:stop] = torch.tensor(example.label_ids)
    return ids, labels
