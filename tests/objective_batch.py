"""Random rows of all three origins with every input that an objective can use, from full-vocabulary float64 logits.

For tests of objectives. It is not an oracle. The policy may have moved since the rollout (`moved`): `z_TV` are the
student's logits now, `old_z_TV` those before the first update, from which the tokens were sampled.

Shapes: T tokens, V vocabulary, K teacher top-k, L student top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd_mcore.objectives.inputs import TokenInputs

TOKENS, VOCABULARY, TOPK, STUDENT_TOPK = 37, 101, 16, 8
ORIGINS = ("student", "student", "prefix", "student", "none")


class Batch:
    """Each attribute may be set before `inputs()` is called; the gradient of a loss is taken in `z_TV`."""

    def __init__(
        self,
        seed: int = 0,
        tokens: int = TOKENS,
        *,
        vocabulary: int = VOCABULARY,
        topk: int = TOPK,
        student_topk: int = STUDENT_TOPK,
        moved: float = 0.0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.topk, self.student_topk = topk, student_topk
        self.z_TV = normal(tokens, vocabulary).requires_grad_(True)
        self.log_q_TV = (self.z_TV.detach() + 1.5 * normal(tokens, vocabulary)).log_softmax(dim=1)
        self.log_reference_TV = (self.z_TV.detach() + 0.5 * normal(tokens, vocabulary)).log_softmax(dim=1)
        self.old_z_TV = self.z_TV.detach() + moved * normal(tokens, vocabulary)
        self.x_T = torch.multinomial(self.old_z_TV.softmax(1), 1, generator=random)[:, 0]
        self.u_T = torch.rand(tokens, generator=random, dtype=torch.float64)
        self.rollout_logp_T = at(self.old_z_TV.log_softmax(dim=1), self.x_T) + 0.5 * normal(tokens)
        self.statistic_T = normal(tokens)
        self.weight_T = torch.rand(tokens, generator=random, dtype=torch.float64) + 0.5
        self.origin = [ORIGINS[token % len(ORIGINS)] for token in range(tokens)]

    @property
    def on_T(self) -> Tensor:
        """bool [T], sampled by the student"""
        return torch.tensor([origin == "student" for origin in self.origin], dtype=torch.bool)

    @property
    def off_T(self) -> Tensor:
        """bool [T], of a teacher prefix"""
        return torch.tensor([origin == "prefix" for origin in self.origin], dtype=torch.bool)

    @property
    def uncounted_T(self) -> Tensor:
        """bool [T], in neither mask"""
        return ~(self.on_T | self.off_T)

    def inputs(self) -> TokenInputs:
        """All fields, differentiable in `z_TV`, without a divergence over the whole vocabulary."""
        log_p_TV = self.z_TV.log_softmax(dim=1)
        old_log_p_TV = self.old_z_TV.log_softmax(dim=1)
        log_q_TK, ids_TK = self.log_q_TV.topk(self.topk, dim=1)
        old_own_TL, own_ids_TL = old_log_p_TV.topk(self.student_topk, dim=1)
        return TokenInputs(
            student_logp_T=at(log_p_TV, self.x_T),
            student_topk_logp_TK=log_p_TV.gather(1, ids_TK),
            student_own_logp_TL=log_p_TV.gather(1, own_ids_TL),
            student_entropy_T=-(log_p_TV.exp() * log_p_TV).sum(dim=1),
            divergence_T=None,
            teacher_logp_T=at(self.log_q_TV, self.x_T),
            teacher_topk_logp_TK=log_q_TK,
            teacher_own_logp_TL=self.log_q_TV.gather(1, own_ids_TL),
            teacher_entropy_T=-(self.log_q_TV.exp() * self.log_q_TV).sum(dim=1),
            topk_ids_TK=ids_TK,
            own_ids_TL=own_ids_TL,
            target_ids_T=self.x_T,
            reference_logp_T=at(self.log_reference_TV, self.x_T),
            old_logp_T=at(old_log_p_TV, self.x_T),
            old_own_logp_TL=old_own_TL,
            rollout_logp_T=self.rollout_logp_T,
            selected_T=self.statistic_T,
            advantage_T=self.statistic_T,
            history_weight_T=self.statistic_T,
            trust_u_T=self.u_T,
            student_mask_T=self.on_T,
            prefix_mask_T=self.off_T,
            weight_T=self.weight_T,
        )

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d z, [T, V]."""
        (gradient_TV,) = torch.autograd.grad(loss, self.z_TV)
        return gradient_TV


def token_inputs(*, student_logp_T: Tensor, teacher_logp_T: Tensor, **given: Tensor | None) -> TokenInputs:
    """Rows that the student sampled from the current policy, without candidates. `given` replaces any field."""
    tokens = len(student_logp_T)
    zero_T, none_T0 = torch.zeros_like(teacher_logp_T), teacher_logp_T.new_zeros(tokens, 0)
    ids_T0 = torch.zeros(tokens, 0, dtype=torch.int64)
    everything_T = torch.ones(tokens, dtype=torch.bool)
    fields: dict[str, Tensor | None] = {
        "student_logp_T": student_logp_T,
        "student_topk_logp_TK": none_T0,
        "student_own_logp_TL": none_T0,
        "student_entropy_T": zero_T,
        "divergence_T": None,
        "teacher_logp_T": teacher_logp_T,
        "teacher_topk_logp_TK": none_T0,
        "teacher_own_logp_TL": none_T0,
        "teacher_entropy_T": zero_T,
        "topk_ids_TK": ids_T0,
        "own_ids_TL": ids_T0,
        "target_ids_T": torch.zeros(tokens, dtype=torch.int64),
        "reference_logp_T": torch.full_like(zero_T, torch.nan),
        "old_logp_T": student_logp_T.detach(),
        "old_own_logp_TL": none_T0,
        "rollout_logp_T": student_logp_T.detach(),
        "selected_T": zero_T + 1.0,
        "advantage_T": zero_T + 1.0,
        "history_weight_T": zero_T + 1.0,
        "trust_u_T": zero_T + 0.5,
        "student_mask_T": everything_T,
        "prefix_mask_T": ~everything_T,
        "weight_T": zero_T + 1.0,
    }
    return TokenInputs(**{**fields, **given})  # type: ignore[arg-type]


def filled(inputs: TokenInputs, rows_T: Tensor, fill: float) -> dict[str, Tensor]:
    """The inputs with every number in these rows replaced by `fill`. Masks and ids are unchanged."""
    return {
        name: number.masked_fill(rows_T if number.ndim == 1 else rows_T[:, None], fill)
        for name, number in vars(inputs).items()
        if number is not None and number.is_floating_point()
    }


def at(values_TV: Tensor, ids_T: Tensor) -> Tensor:
    """The entry of each row at its id, [T]."""
    return values_TV.gather(1, ids_T[:, None])[:, 0]
