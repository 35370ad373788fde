"""Megatron-Core loops that call the library, in `run_on_ranks`, and the same step by plain softmaxes in float64."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from examples.integrations import megatron_core, nemo_rl, slime, verl
from tests.dist import tiny_gpt
from tests.dist.layouts import Case, build, layout_of
from tests.dist.tiny_gpt import BATCH, LENGTH, K
from tropd_mcore import VocabParallel
from tropd_mcore.mcore.model import Model
from tropd_mcore.megatron import tap_output_layer

NAMES = ("output_layer.weight", "decoder.final_layernorm.weight", "embedding.word_embeddings.weight")


def batches(vocabulary: int) -> list[dict[str, Tensor]]:
    """Two micro-batches, the same on every rank."""
    return [tiny_gpt.batch(seed, vocabulary, spread=1.0, kept=0.7) for seed in range(2)]


def _trainable(folder: Path, case: Case, layout: Any, platform: Any) -> tuple[Model, Any]:
    """A model without data-parallel wrapper and without our trainer's tap."""
    model = build(folder, case, layout, platform, trainable=False)
    (module,) = model.modules
    assert model.head is not None
    model.head.remove()
    return model, module.requires_grad_(True).train()


def own_loop(folder: Path, case: Case) -> dict[str, Tensor]:
    """Gradients of the sum over both micro-batches, by Megatron's schedule and the example."""
    with layout_of(case) as (layout, platform):
        model, module = _trainable(folder, case, layout, platform)
        tap = tap_output_layer(module, layout.groups.tp)
        vp = VocabParallel(layout.groups.tp, model.arch.vocab_size, chunk_tokens=8)
        module.config.calculate_per_token_loss = True
        data = batches(model.arch.vocab_size)
        reports = get_forward_backward_func()(
            forward_step_func=megatron_core.make_forward_step(tap, vp),
            data_iterator=iter(data),
            model=[module],
            num_microbatches=len(data),
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        totals = torch.stack([report["distill"] for report in reports]).sum(dim=0)
        return {"loss": totals, **_gradients(module)}


def by_softmax(folder: Path) -> dict[str, Tensor]:
    """The same in one process: logits of Megatron's own output layer, TrOPD written out in float64."""
    with layout_of(Case()) as (layout, platform):
        model, module = _trainable(folder, Case(), layout, platform)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches(model.arch.vocab_size):
            logits = module(batch["tokens"], batch["position_ids"], attention_mask=None)
            loss, tokens, _ = tiny_gpt.tropd(logits, batch, model.arch.vocab_size)
            total, count = total + loss, count + tokens
        total.backward()
        return {"loss": torch.tensor([float(total.detach()), count]), **_gradients(module)}


def _gradients(module: Any) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return {name: named[name].grad.double() for name in NAMES if name in named and named[name].grad is not None}


RESPONSES, TOTALS, VOCABULARY = (5, 3, 8), (9, 4, 13), 41
ARGUMENTS = SimpleNamespace(vocab_size=VOCABULARY, rollout_temperature=0.7)


def slime_batch() -> tuple[Tensor, dict[str, Any], Tensor]:
    """Packed float64 logits [1, T, V], the inputs of slime's hook, and the mask of the response tokens."""
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(1, sum(TOTALS), VOCABULARY, generator=random, dtype=torch.float64)
    tokens = [torch.randint(VOCABULARY, (total,), generator=random) for total in TOTALS]
    numbers = [-torch.rand(3, count, generator=random) * 4.0 for count in RESPONSES]
    batch = {
        "unconcat_tokens": tokens,
        "response_lengths": list(RESPONSES),
        "total_lengths": list(TOTALS),
        "teacher_log_probs": [each[0] for each in numbers],
        "log_probs": [each[1] for each in numbers],
    }
    return logits, batch, torch.rand(sum(RESPONSES), generator=random) < 0.8


def sum_of_sample_mean(mask: Tensor, numbers: Tensor) -> Tensor:
    """slime's normalisation per sample: masked sums, each divided by its number of tokens."""
    parts = zip(numbers.split(RESPONSES), mask.split(RESPONSES), strict=True)
    return torch.stack([(part * keep).sum() / keep.sum().clamp(min=1) for part, keep in parts]).sum()


def slime_hook(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of this rank's logits, trusted), float32."""
    with layout_of(Case(tensor=size)) as (layout, _):
        logits, batch, mask = slime_batch()
        width = -(-VOCABULARY // size)
        padded = torch.nn.functional.pad(logits.float(), (0, width * size - VOCABULARY))
        leaf = padded[..., width * layout.tp_rank : width * (layout.tp_rank + 1)].contiguous().requires_grad_()
        loss, report = slime.tropd_loss(ARGUMENTS, batch, leaf * 1.0, partial(sum_of_sample_mean, mask))
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad, report["trusted"].detach()


def slime_by_softmax() -> tuple[Tensor, Tensor, Tensor]:
    """The same, written out: threshold gate, masked outliers, PPO's clip with its dual."""
    logits, batch, mask = slime_batch()
    leaf = logits.requires_grad_()
    log_p = (leaf[0] / ARGUMENTS.rollout_temperature).log_softmax(-1)
    losses, trusts, end = [], [], 0
    for total, count, tokens, q, old in zip(
        TOTALS, RESPONSES, batch["unconcat_tokens"], batch["teacher_log_probs"], batch["log_probs"], strict=True
    ):
        end += total
        for place in range(count):
            row = end - count - 1 + place
            logp = log_p[row, int(tokens[total - count + place])]
            r = float(q[place] - old[place])
            trusted = r > math.log(0.3 / 0.7)
            advantage, ratio = r if trusted else 0.0, (logp - float(old[place])).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            losses.append(-surrogate if advantage >= 0 else -torch.maximum(surrogate, logp.new_tensor(3.0 * advantage)))
            trusts.append(logp.new_tensor(float(trusted)))
    loss = sum_of_sample_mean(mask, torch.stack(losses))
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, sum_of_sample_mean(mask, torch.stack(trusts))


def nemo_data() -> tuple[Tensor, dict[str, Tensor]]:
    """Float64 logits [B, S, V], and the fields of NeMo-RL's data."""
    random = torch.Generator().manual_seed(6)
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, generator=random, dtype=torch.float64)
    top = torch.randn(BATCH, LENGTH, VOCABULARY, generator=random).topk(K)
    return logits, {
        "input_ids": torch.randint(VOCABULARY, (BATCH, LENGTH), generator=random),
        "token_mask": (torch.rand(BATCH, LENGTH, generator=random) < 0.7).float(),
        "sample_mask": torch.tensor([1.0, 1.0]),
        "teacher_topk_logits": top.values + 3.0,
        "teacher_topk_indices": top.indices,
    }


def nemo_loss(size: int) -> tuple[Tensor, Tensor]:
    """(loss, gradient of this rank's logits), float32."""
    with layout_of(Case(tensor=size)) as (layout, _):
        logits, data = nemo_data()
        width = -(-VOCABULARY // size)
        padded = torch.nn.functional.pad(logits.float(), (0, width * size - VOCABULARY))
        leaf = padded[..., width * layout.tp_rank : width * (layout.tp_rank + 1)].contiguous().requires_grad_()
        count = data["token_mask"][:, 1:].sum()
        loss_fn = nemo_rl.LocalSupportMatching(VOCABULARY, layout.groups.tp)
        loss, report = loss_fn(data, torch.tensor(BATCH), count, leaf * 1.0)
        loss.backward()
        assert leaf.grad is not None and report["num_valid_samples"] == BATCH
        return loss.detach(), leaf.grad


def nemo_by_softmax() -> tuple[Tensor, Tensor]:
    """The same, written out in float64."""
    logits, data = nemo_data()
    leaf = logits.requires_grad_()
    log_p = leaf.log_softmax(-1).gather(-1, data["teacher_topk_indices"]).log_softmax(-1)
    log_q = data["teacher_topk_logits"].double().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1]
    mask = data["token_mask"][:, 1:].double()
    loss = (each * mask).sum() / (mask.sum() + 1e-8)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def verl_loss(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss of each token, gradient of this rank's logits, masses of student and teacher), float32."""
    with layout_of(Case(tensor=size)) as (layout, _):
        logits, data = nemo_data()
        width = -(-VOCABULARY // size)
        padded = torch.nn.functional.pad(logits.float(), (0, width * size - VOCABULARY))
        leaf = padded[..., width * layout.tp_rank : width * (layout.tp_rank + 1)].contiguous().requires_grad_()
        log_q = (data["teacher_topk_logits"] - 9.0).clamp(max=-1.5)
        with patch.object(verl, "as_the_logits", lambda rows, _: rows):  # verl's packing: test_integrations_verl.py
            found = verl.compute_forward_kl_topk(
                VOCABULARY, student_logits=leaf * 1.0, teacher_topk_log_probs=log_q,
                teacher_topk_ids=data["teacher_topk_indices"], config=None, data_format="bshd",
            )  # fmt: skip
        losses = found["distillation_losses"]
        losses.mul(data["token_mask"]).sum().backward()
        assert leaf.grad is not None
        return losses.detach(), leaf.grad, found["student_mass"], found["teacher_mass"]


def verl_by_softmax() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, written out in float64: sum over top-k and tail of q log(q / p)."""
    logits, data = nemo_data()
    leaf = logits.requires_grad_()
    log_p = leaf.log_softmax(-1).gather(-1, data["teacher_topk_indices"])
    log_q = (data["teacher_topk_logits"].double() - 9.0).clamp(max=-1.5)
    p, q = log_p.exp().sum(-1), log_q.exp().sum(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1) + (1 - q) * torch.log((1 - q) / (1 - p))
    (each * data["token_mask"]).sum().backward()
    assert leaf.grad is not None
    return each.detach(), leaf.grad, p.detach(), q
