"""The reference that every layout must equal: tiny models, rollouts, and a float64 training step with transformers.

Not a test module. Invariant: the reference imports only the value types from the package. It runs each sample alone,
unpacked and unsharded. Its gradients come from autograd over the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from tropd_mcore.types import Rollout

VOCABULARY = 101
TEACHER_VOCABULARY = 131
"""The teacher has 30 rows that the student does not have."""
TOPK = 16
TEMPERATURE = 0.8
BETA = 0.05
OUTLIER_WEIGHT = 0.7
EPS = 1e-3
"""Adam's epsilon. It is large, so that an update depends smoothly on a small gradient."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
STUDENTS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**_SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE),
}
TEACHER = Qwen2Config(
    **{**_SIZES, "vocab_size": TEACHER_VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
)


def small_vocabulary(size: int) -> PretrainedConfig:
    """A student's architecture with fewer tokens."""
    return Qwen2Config(**{**_SIZES, "vocab_size": size})


def write_model(config: PretrainedConfig, folder: Path, seed: int) -> Path:
    """Save a model with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def make_rollouts(lengths: Sequence[tuple[int, int, int]], seed: int = 3) -> list[Rollout]:
    """Random samples of (prompt, prefix, response) tokens; every second one carries its prefix loss."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> Any:
        return random.integers(0, VOCABULARY, count, dtype=np.int32)

    return [
        Rollout(
            sample_id=f"sample-{index}",
            prompt_id=f"prompt-{index}",
            prompt_ids=ids(prompt),
            prefix_ids=ids(prefix),
            response_ids=ids(response),
            rollout_logp=random.normal(-4.0, 1.0, response).astype(np.float32),
            trust_u=random.random(response, dtype=np.float32),
            policy_version="0",
            finish_reason="stop",
            carries_prefix_loss=index % 2 == 0,
            answer=None,
        )
        for index, (prompt, prefix, response) in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Step:
    """One training step. Columns have one row per supervised token, in the order of (sample, token)."""

    loss: float
    """Surrogate sum / token count."""
    token_count: int
    gradients: dict[str, Tensor]
    columns: dict[str, Tensor]
    logits: list[Tensor]
    """[tokens, vocabulary] of each sample."""


def reference_model(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.double().eval()


def reference_step(student: torch.nn.Module, teacher: torch.nn.Module, rollouts: Sequence[Rollout]) -> Step:
    """TrOPD with the Bernoulli gate, direct truncated forward KL on outliers and NLL on prefixes, token mean."""
    student.zero_grad()
    device = next(student.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    columns: dict[str, list[Tensor]] = {}
    all_logits = []
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.token_ids.astype(np.int64)).to(device)
        logits = student(ids[None]).logits[0].double()
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(ids[None]).logits[0].double(), dim=-1)
        log_p = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        all_logits.append(logits.detach())
        start = len(rollout.prompt_ids)
        first_response = start + len(rollout.prefix_ids)
        for token in range(start, len(ids)):
            is_prefix = token < first_response
            if is_prefix and not rollout.carries_prefix_loss:
                continue
            lp, lq, x = log_p[token - 1], log_q[token - 1], ids[token]
            ratio = float((lq[x] - lp[x]).detach())
            top = [v for v in lq.topk(TOPK).indices.tolist() if v < log_p.shape[1]]
            fkl = sum(lq[v].exp() * (lq[v] - lp[v]) for v in top)
            trusted = is_prefix or np.log(rollout.trust_u[token - first_response]) < ratio
            loss = -BETA * lp[x] if is_prefix else -ratio * lp[x] if trusted else OUTLIER_WEIGHT * fkl
            total = total + loss
            (slope,) = torch.autograd.grad(loss, log_p, retain_graph=True)
            pushed = slope[token - 1] - lp.exp() * slope[token - 1].sum()
            inside = [float(lp[v].detach().exp() - lq[v].exp()) for v in top]
            row = {
                "force": pushed.abs().sum(),
                "tv": torch.tensor(0.5 * (sum(map(abs, inside)) + abs(sum(inside)))),
                "student_logp": lp[x],
                "teacher_logp": lq[x],
                "student_entropy": -(lp.exp() * lp).sum(),
                "teacher_entropy": -(lq.exp() * lq).sum(),
                "on": torch.tensor(float(not is_prefix)),
                "trusted": torch.tensor(float(trusted and not is_prefix)),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value.detach())
    count = len(columns["student_logp"])
    (total / count).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    stacked = {name: torch.stack(values) for name, values in columns.items()}
    return Step(float(total.detach()) / count, count, gradients, stacked, all_logits)


def reference_training(
    student: torch.nn.Module, teacher: torch.nn.Module, batches: Sequence[Sequence[Rollout]], settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """AdamW with clipping over `batches` at a constant rate; returns (gradient norms, parameters)."""
    parameters = dict(student.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.eps)
    norms = []
    for rollouts in batches:
        reference_step(student, teacher, rollouts)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_grad_norm)))
        optimizer.step()
    return norms, {name: parameter.detach().clone() for name, parameter in parameters.items()}
