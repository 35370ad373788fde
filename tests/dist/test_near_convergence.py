"""The error of bfloat16 against float64: log-probs, and the gradient of a student that almost equals its teacher.

Near convergence, dz on the support is a small difference of p and q, so every rounding of p before the subtraction of q
is visible. The sizes are smaller than those of docs/numerics.md.

Shapes: T tokens (64), V vocabulary (4096), K teacher top-k (64), D hidden (128).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.mutants import Losses, mutant_losses, real_losses
from tests.oracles import log_softmax, top_ids
from tests.ranks import run_on_ranks
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_log_probs import support_log_probs

TOKENS, VOCABULARY, K, HIDDEN = 64, 4096, 64, 128
LOGIT_STD, NOISE = 5.0, 0.05
BORDERS = {1: (0, 4100), 2: (0, 2500, 4100)}
"""By world size."""
ROWS = 4100

ADDED_BEFORE_ROUNDING = """            add_support_(grad_BR, local_CJ[rows], owned_CJ[rows], row.unique_run_lengths)
            out_CW[rows, :real] = scaling.chain_(grad_BR, scaled_BR)
"""
ADDED_AFTER_ROUNDING = """            out_CW[rows, :real] = scaling.chain_(grad_BR, scaled_BR)
            add_support_(out_CW[rows, :real], local_CJ[rows], owned_CJ[rows].to(out_CW.dtype), row.unique_run_lengths)
"""


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight, bfloat16, and the noise that makes the teacher's logits, float64 [T, V]."""
    random = torch.Generator().manual_seed(2)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=random)
    weight_VD = torch.randn(ROWS, HIDDEN, generator=random) * LOGIT_STD / HIDDEN**0.5
    noise_TV = NOISE * torch.randn(TOKENS, VOCABULARY, generator=random, dtype=torch.float64)
    return hidden_TD.to(torch.bfloat16), weight_VD.to(torch.bfloat16), noise_TV


def teacher_topk() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and probabilities [T, K] of the teacher, and the student's logits [T, V], float64."""
    hidden_TD, weight_VD, noise_TV = operands()
    logits = hidden_TD.double().numpy() @ weight_VD[:VOCABULARY].double().numpy().T
    ids, q = [], []
    for z in logits + noise_TV.numpy():
        ids.append(top_ids(z, K))
        q.append(np.exp(log_softmax(z)[ids[-1]]))
    return np.array(ids), np.array(q), logits


def relative_errors(losses: Losses, backend: str) -> tuple[float, float]:
    """Of the gradients of hidden states and weight shard, by the Frobenius norm."""
    ids, q, logits = teacher_topk()
    hidden_TD, weight_VD, _ = operands()
    start, stop = BORDERS[dist.get_world_size()][dist.get_rank() :][:2]
    hidden, weight = hidden_TD.requires_grad_(), weight_VD[start:stop].clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    assert dist.group.WORLD is not None
    kernel = losses["kernel.backend"].Kernel(
        shard=losses["kernel.shard"].VocabShard(start, stop, VOCABULARY),
        group=dist.group.WORLD,
        backend=losses["kernel.choose"].backend(backend, torch.device("cpu")),
        scaling=losses["kernel.shard"].Scaling(),
        chunk_tokens=24,
    )
    q_TK = torch.from_numpy(q).float()

    def forward_kl(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> Any:
        loss_C = (q_TK[rows] * (q_TK[rows].log() - logp_CJ)).sum(dim=1)
        return losses["kernel.token_losses"].TokenLosses(loss_C, torch.ones(len(logp_CJ), dtype=torch.bool))

    source = losses["kernel.source"].OutputLayer(hidden, weight)
    output = losses["kernel.support_loss"].support_loss(
        source, torch.from_numpy(ids), forward_kl, kernel, unique_run_lengths=(K,)
    )
    output.loss_sum.backward()

    dz = np.stack([np.exp(log_softmax(z)) for z in logits]) * q.sum(axis=1, keepdims=True)
    for token in range(TOKENS):
        dz[token, ids[token]] -= q[token]
    right_hidden = dz @ weight_VD[:VOCABULARY].double().numpy()
    right_weight = (dz.T @ hidden_TD.detach().double().numpy())[start:stop]
    assert hidden.grad is not None
    found_weight = weight.main_grad[: len(right_weight)]  # type: ignore[attr-defined]
    return _error(hidden.grad, right_hidden), _error(found_weight, right_weight)


def _log_prob_errors(form: str) -> float:
    """Largest error of the log-probs of the teacher's top-k, nats."""
    ids, _, logits = teacher_topk()
    hidden_TD, weight_VD, _ = operands()
    assert dist.group.WORLD is not None
    kernel = Kernel(VocabShard(0, ROWS, VOCABULARY), dist.group.WORLD, EagerBackend(), Scaling(), chunk_tokens=24)
    layer = OutputLayer(hidden_TD, weight_VD)
    source: LogitSource = layer if form == "fused" else GivenLogits(hidden_TD @ weight_VD.t())
    logp_TK, _ = support_log_probs(source, torch.from_numpy(ids), kernel, unique_run_lengths=(K,))
    right = np.stack([log_softmax(z)[row] for z, row in zip(logits, ids, strict=True)])
    return float(np.abs(logp_TK.double().numpy() - right).max())


def test_log_probs_of_the_fused_layer_are_exact_and_those_of_bfloat16_logits_are_off_by_percents() -> None:
    assert run_on_ranks(_log_prob_errors, 1, "fused")[0] <= 1e-5
    assert run_on_ranks(_log_prob_errors, 1, "logits")[0] >= 2e-2


def _error(found: Tensor, right: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - right) / np.linalg.norm(right))


def relative_errors_on_this_rank(backend: str) -> tuple[float, float]:
    return relative_errors(real_losses(), backend)


def _errors_of_the_mutant() -> tuple[float, float]:
    return relative_errors(mutant_losses("kernel.eager", ADDED_BEFORE_ROUNDING, ADDED_AFTER_ROUNDING), "eager")


def test_gradients_near_convergence_have_a_relative_error_below_3_in_1000() -> None:
    ((hidden_error, weight_error),) = run_on_ranks(relative_errors_on_this_rank, 1, "eager")
    assert hidden_error <= 3e-3 and weight_error <= 3e-3


def test_on_two_ranks_the_hidden_gradient_has_a_relative_error_below_4_in_1000() -> None:
    for hidden_error, weight_error in run_on_ranks(relative_errors_on_this_rank, 2, "eager"):
        assert hidden_error <= 4e-3 and weight_error <= 3e-3


def test_adding_the_support_after_rounding_is_off_by_more_than_2_in_100() -> None:
    for hidden_error, weight_error in run_on_ranks(_errors_of_the_mutant, 2):
        assert hidden_error > 2e-2 and weight_error > 2e-2
