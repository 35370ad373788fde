"""The records that the parts of one training step exchange; each is frozen and created once.

Prompt -> Rollout -> MicroBatch (+ StudentPass, TeacherScores, RowContext) -> TokenTable -> metrics.

Per-sample arrays are numpy on the host. Per-token tensors of a `MicroBatch` are torch. A *row* is a position whose
next token is supervised. `rows_T` lists these positions, and everything that the loss sees has one entry per row,
indexed by the *predicted* token. The shift by one is done once, in `data.packing`, before any context-parallel split.

Shapes: S samples in a pack, P positions on this context-parallel rank, T rows on this rank, K teacher top-k, L student
top-k, D hidden size of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """One rendered prompt. `teacher_response_ids` has no EOS; it is None if no response is stored."""

    prompt_id: str
    token_ids: IntArray
    answer: str | None
    teacher_response_ids: IntArray | None
    teacher_finished: bool = True
    """Whether the teacher ended the stored response by itself"""
    teacher: str | None = None
    """Name of its teacher in `teachers`; None in a run with one teacher"""


@dataclass(frozen=True)
class SampleRequest:
    """One continuation to sample: the student continues `prompt_ids + prefix_ids` (never re-tokenised)."""

    sample_id: str
    prompt_id: str
    prompt_ids: IntArray
    prefix_ids: IntArray
    max_new_tokens: int
    carries_prefix_loss: bool
    """True in exactly one of the samples that share a prompt and its prefix, so that the prefix counts once. False in
    all if the objective has no term for prefixes"""
    answer: str | None
    teacher: str | None = None


@dataclass(frozen=True)
class Rollout:
    """A sampled continuation with its log-probs and uniforms. All arrays over the response have its length."""

    sample_id: str
    prompt_id: str
    prompt_ids: IntArray
    prefix_ids: IntArray
    response_ids: IntArray
    """Includes EOS if the student ended by itself."""
    rollout_logp: FloatArray
    """Log-prob (nats) of each response token at the rollout temperature, from the rollout engine."""
    trust_u: FloatArray
    """One uniform in [0, 1) per response token, drawn from (run seed, step, sample id)."""
    policy_version: str
    finish_reason: str
    """`stop` (EOS) or `length`."""
    carries_prefix_loss: bool
    answer: str | None
    teacher: str | None = None
    """Name of the teacher that scores all of its tokens; None in a run with one teacher"""

    @property
    def token_ids(self) -> IntArray:
        """prompt + prefix + response, int32 [length]."""
        return np.concatenate([self.prompt_ids, self.prefix_ids, self.response_ids]).astype(np.int32)


@dataclass(frozen=True)
class MicroBatch:
    """One pack of whole samples without padding between them, and this rank's context-parallel slice of it."""

    input_ids_P: Tensor
    """int64 [P]"""
    position_ids_P: Tensor
    """int64 [P], restarting at 0 in each sample"""
    cu_seqlens: Tensor
    """int32 [S+1], sample boundaries of the whole pack (all context ranks); the padding tail is the last sample"""
    max_seqlen: int
    rows_T: Tensor
    """int64 [T], positions in [0, P) whose next token is supervised"""
    target_ids_T: Tensor
    """int64 [T], the predicted token of each row"""
    student_mask_T: Tensor
    """bool [T], sampled by the student"""
    prefix_mask_T: Tensor
    """bool [T], teacher prefix in the sample that carries the prefix loss; never both"""
    rollout_logp_T: Tensor
    """float32 [T], 0 on prefix rows"""
    trust_u_T: Tensor
    """float32 [T], 0 on prefix rows"""
    weight_T: Tensor
    """float32 [T], factor of each row's loss from `loss.aggregation`; 1 for the token mean"""
    sample_index_T: Tensor
    """int64 [T], index into the step's list of rollouts"""
    token_index_T: Tensor
    """int64 [T], index of the predicted token in `Rollout.token_ids` (>= 1)"""

    def without_rows(self) -> MicroBatch:
        """Return the same pack with nothing supervised (T = 0)."""
        per_row = [field.name for field in fields(self) if field.name.endswith("_T")]
        return replace(self, **{name: getattr(self, name)[:0] for name in per_row})


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's scores of the rows of one `MicroBatch`, on the last pipeline stage. Full-vocabulary log-probs."""

    logp_T: Tensor
    """float32 [T], log q of the predicted token, nats"""
    topk_ids_TK: Tensor
    """int64 [T, K], global ids, descending log q, ties by lower id"""
    topk_logp_TK: Tensor
    """float32 [T, K], true log q (not renormalised), nats"""
    tail_mass_T: Tensor
    """float32 [T], 1 - sum of the top-k probabilities, in [0, 1]"""
    entropy_T: Tensor | None
    """float32 [T], full-vocabulary entropy, nats; None if the scorer cannot give it"""
    scored_T: Tensor
    """bool [T], False if the teacher failed on the sample; such rows leave the loss and its denominator"""
    logp_of_student_topk_TL: Tensor | None = None
    """float32 [T, L], true log q of the student's own candidates, -inf if the teacher's vocabulary lacks the id; None
    if the scorer was not asked for them"""
    hidden_TD: Tensor | None = None
    """[T, D] in the teacher's dtype, input of its output layer. Only for a teacher in this process and an objective
    over the whole vocabulary; never stored on disk"""
    excluded_T: Tensor | None = None
    """int32 [T], number of the teacher's K best tokens that only the teacher has, and that are therefore no candidates
    (`teacher.extra_tokens`); None if the teacher has no such tokens"""


@dataclass(frozen=True)
class StudentPass:
    """The student's log-probs of the rows of one `MicroBatch` before the first update on the rollout batch.

    On the last pipeline stage, without gradients, at the rollout temperature.
    """

    logp_T: Tensor
    """float32 [T], log p of the predicted token, nats"""
    entropy_T: Tensor
    """float32 [T], full-vocabulary entropy, nats"""
    own_ids_TL: Tensor
    """int64 [T, L], the student's own candidates by descending log p, ties by lower id; L = 0 if none are needed"""
    own_logp_TL: Tensor
    """float32 [T, L], true log p of them, nats"""


@dataclass(frozen=True)
class RowContext:
    """Per-row values computed once per rollout batch, before its first update, for the rows of one `MicroBatch`.

    A field is None if the objective does not need it. Exists on the last pipeline stage only.
    """

    old_logp_T: Tensor | None = None
    """float32 [T], log p of the predicted token, nats"""
    reference_logp_T: Tensor | None = None
    """float32 [T], its log-prob under the frozen reference model, nats"""
    statistic_T: Tensor | None = None
    """float32 [T], the row's value of the objective's batch statistic (`parts.batch_statistics`)"""
    own_ids_TL: Tensor | None = None
    """int64 [T, L], the student's own candidates"""
    old_own_logp_TL: Tensor | None = None
    """float32 [T, L], log p of them, nats"""
    teacher_own_logp_TL: Tensor | None = None
    """float32 [T, L], log q of them, nats; -inf marks an entry that does not count"""


@dataclass(frozen=True)
class TokenTable:
    """The step's per-row results of all ranks on rank 0: one numpy array per column, by sample, token and epoch.

    Each token has one row per epoch, in which one update trains on it. Columns: sample_index, token_index, epoch (from
    0), on (bool), off (bool), impossible (bool: the teacher's log q is -inf, and teacher_logp is the floor), excluded
    (number of candidates that only the teacher's tokenizer has; NaN if it has no such tokens), trusted (weight of the
    gate), student_logp (at that update), old_logp (before the first), rollout_logp, teacher_logp, log_ratio, loss,
    divergence (nats; NaN if not computed), advantage, ratio (p / p_old), clipped (1 if PPO's clip makes the gradient
    0), student_entropy, teacher_entropy (NaN if unknown), teacher_mass (m_A), student_mass (c_A), topk_overlap (NaN if
    not computed), tv (distance of p and q on the teacher's top-k and the rest; NaN without a top-k), force (L1 norm of
    the gradient of the token's loss in the scaled logits; NaN if not computed), clipped_entries (`opsd` only: number of
    clipped entries of the divergence; NaN if not computed).
    """

    columns: dict[str, npt.NDArray[np.generic]]

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        return self.columns[name]


@dataclass(frozen=True)
class HeldOutDistance:
    """The distance of the student to the teacher on stored responses of the teacher, in nats per token.

    The first three are NaN if the teacher's log-probs are not known.
    """

    forward_kl: float
    """Mean KL(q || p) on the teacher's top-k and the rest as one more token"""
    sampled_kl: float
    """Mean log q(x) - log p(x) of the stored tokens x"""
    teacher_mass: float
    """Mean probability that the teacher gives its top-k"""
    nll: float
    """Mean -log p(x) of the stored tokens x"""
    tokens: int
    unscored: int
    """Tokens without scores of the teacher; they are not in the first three numbers"""
    responses: int


@dataclass(frozen=True)
class OptimizerReport:
    """The report of one optimizer step, or of a skipped one because no token counted (`token_count` 0)."""

    grad_norm: float
    """Global L2 norm before clipping; 0 without an optimizer step."""
    learning_rate: float
    """Learning rate of the last optimizer step that was made."""
    loss: float
    """Sum of the surrogate over all rows / token_count, nats."""
    token_count: int
    """Rows that count in the denominator, over all ranks."""

    @property
    def made(self) -> bool:
        """Whether there was an optimizer step."""
        return self.token_count > 0
