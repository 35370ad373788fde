"""The one-state problem: one softmax over a few tokens, its teacher, and the exact expected gradient of an objective.

The student is right about everything but one state, so what a method does there can be followed step by step. The
expectation over the sampled token is exact: every token x is a row with weight p(x).

Shapes: V tokens, which are also the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.objectives.catalogue import Objective
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.registry import function_of

WRONG, RIGHT = 0, 1
TEACHER_V = torch.tensor([1e-6, 1.0 - 1e-6 - 2e-6, 1e-6, 1e-6], dtype=torch.float64)
"""The teacher gives WRONG almost nothing."""
TOKENS = len(TEACHER_V)


def student(wrong: float, right: float) -> Tensor:
    """Logits of a student with these probabilities; the rest is shared by the other tokens."""
    rest = (1.0 - wrong - right) / (TOKENS - 2)
    return torch.tensor([wrong, right, rest, rest], dtype=torch.float64).log()


def inputs_of(logits_V: Tensor, draws: Tensor) -> TokenInputs:
    """One row per (token, uniform number of the gate), weighted with its probability. `draws` are uniform numbers."""
    log_p_V = logits_V.log_softmax(0)
    rows, count = TOKENS * len(draws), len(draws)
    x_T = torch.arange(TOKENS).repeat_interleave(count)
    log_p_T, log_q_V = log_p_V[x_T], TEACHER_V.log()
    everyone_TV = torch.arange(TOKENS).expand(rows, TOKENS)
    unknown_T, all_T = torch.full((rows,), torch.nan, dtype=torch.float64), torch.ones(rows, dtype=torch.bool)
    entropy = -(log_p_V.exp() * log_p_V).sum()
    return TokenInputs(
        student_logp_T=log_p_T,
        student_topk_logp_TK=log_p_V.expand(rows, TOKENS),
        student_own_logp_TL=log_p_V.expand(rows, TOKENS),
        student_entropy_T=entropy.expand(rows),
        divergence_T=None,
        teacher_logp_T=log_q_V[x_T],
        teacher_topk_logp_TK=log_q_V.expand(rows, TOKENS),
        teacher_own_logp_TL=log_q_V.expand(rows, TOKENS),
        teacher_entropy_T=torch.full((rows,), float(-(TEACHER_V * log_q_V).sum()), dtype=torch.float64),
        topk_ids_TK=everyone_TV,
        own_ids_TL=everyone_TV,
        target_ids_T=x_T,
        reference_logp_T=unknown_T,
        old_logp_T=log_p_T.detach(),
        old_own_logp_TL=log_p_V.detach().expand(rows, TOKENS),
        rollout_logp_T=log_p_T.detach(),
        selected_T=unknown_T,
        advantage_T=unknown_T,
        history_weight_T=torch.ones(rows, dtype=torch.float64),
        trust_u_T=draws.repeat(TOKENS),
        student_mask_T=all_T,
        prefix_mask_T=~all_T,
        weight_T=log_p_T.detach().exp() / count,
    )


def expected_gradient(objective: Objective, logits_V: Tensor, *, draws: int = 64) -> Tensor:
    """Return the expectation of the gradient over the sampled token and the gate's uniform number, [V].

    The uniform numbers are a grid of `draws` midpoints, so a probability of the gate is exact to 1 / (2 draws).
    """
    leaf = logits_V.detach().clone().requires_grad_()
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    (gradient,) = torch.autograd.grad(function_of(objective)(inputs_of(leaf, grid)).loss_sum, leaf)
    return gradient


def steps_to_leave(objective: Objective, eps: float, *, rate: float = 1.0, limit: int = 100_000) -> int:
    """Return the steps of gradient descent until a student with p(WRONG) = 1 - 2 eps gives it less than one half."""
    logits_V = student(1.0 - 2 * eps, eps)
    for step in range(limit):
        if float(logits_V.softmax(0)[WRONG]) < 0.5:
            return step
        logits_V = logits_V - rate * expected_gradient(objective, logits_V)
    return limit


def wrong_mass_after(
    objective: Objective, steps: tuple[int, ...], *, begin: float = 0.2, rate: float = 1.0
) -> list[float]:
    """Return the probability of WRONG after each number of steps, from a student that is nearly right."""
    logits_V, found = student(begin, 1.0 - begin - 0.01), []
    for step in range(max(steps) + 1):
        if step in steps:
            found.append(float(logits_V.softmax(0)[WRONG]))
        logits_V = logits_V - rate * expected_gradient(objective, logits_V)
    return found
