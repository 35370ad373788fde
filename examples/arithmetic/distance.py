"""Measure how far the misled student is from the teacher, and refuse one that is no example of a wrong prior.

This module does not train. The numbers are those of a short check (128 problems); a run measures its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.arithmetic.models import Example, encode_problem, first_line, generate, right_padded, share_right
from examples.arithmetic.task import Problem

PROBLEMS = 128


@dataclass(frozen=True)
class Distance:
    """What makes a student one with a wrong prior. Divergences are per token, over the student's vocabulary."""

    total_variation: float
    """Of student and teacher, on answers that the student samples"""
    forward_kl: float
    """KL(teacher || student) in nats, on answers that the teacher samples"""
    right_alone: float
    """Share of right greedy answers"""
    right_after_first_line: float
    """Share of right greedy answers if the first line of the worked answer is given: the skill is there"""

    def problems(self) -> list[str]:
        """Return a line for each bound that is missed."""
        bounds = (
            ("total variation", self.total_variation, ">=", 0.8),
            ("forward KL", self.forward_kl, ">=", 0.5),
            ("right alone", self.right_alone, "<=", 0.4),
            ("right after the first line", self.right_after_first_line, ">=", 0.9),
        )
        return [
            f"{name} is {found:.3f}, expected {sign} {bound}"
            for name, found, sign, bound in bounds
            if not (found >= bound if sign == ">=" else found <= bound)
        ]

    def rounded(self) -> dict[str, float]:
        """Return the numbers for a summary."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def measure(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    seed: int,
) -> Distance:
    """Return the distance on the first `PROBLEMS` problems. Sampling draws from torch's generator, seeded here."""
    chosen = problems[:PROBLEMS]
    prompts = [encode_problem(tokenizer, problem).prompt_ids for problem in chosen]
    torch.manual_seed(seed)
    own = generate(student, tokenizer, prompts, max_new_tokens, sample=True)
    taught = generate(teacher, tokenizer, prompts, max_new_tokens, sample=True)
    tokens = len(tokenizer)  # both embeddings have padding rows beyond
    p_T, q_T = (_log_probs(model, tokenizer, prompts, own, tokens).exp() for model in (student, teacher))
    p_logs, q_logs = (_log_probs(model, tokenizer, prompts, taught, tokens) for model in (student, teacher))
    begun = [[*prompt, *first_line(tokenizer, problem)] for prompt, problem in zip(prompts, chosen, strict=True)]
    alone, continued = (
        share_right(tokenizer, generate(student, tokenizer, given, max_new_tokens), chosen)
        for given in (prompts, begun)
    )
    return Distance(
        total_variation=float((p_T - q_T).abs().sum(-1).mean() / 2),
        forward_kl=float((q_logs.exp() * (q_logs - p_logs)).sum(-1).mean()),
        right_alone=alone,
        right_after_first_line=continued,
    )


@torch.no_grad()
def _log_probs(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    tokens: int,
) -> Tensor:
    """Return log-probs [T, tokens] at every response token of all rows."""
    model.eval()
    examples = [Example(prompt, response, response) for prompt, response in zip(prompts, responses, strict=True)]
    ids, labels = right_padded(examples, tokenizer.pad_token_id)
    logits = model(input_ids=ids).logits[:, :-1, :tokens]
    chosen: Tensor = logits[labels[:, 1:] >= 0].double().log_softmax(-1)
    return chosen
