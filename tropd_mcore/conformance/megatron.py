"""Our loss at the end of a Megatron model on one rank: packs, pipeline schedule, head, loss, reduction of gradients.

At the input of the output layer, the hidden states of the case replace the decoder's output. Everything after that is
this package's and Megatron's real code; the code before is tested by tests/dist/test_layouts.py. This part of the
matrix runs in float32 or bfloat16 only, because models are built in these.

Shapes: T tokens of the case, P positions on this context rank, D hidden, W vocabulary shard.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.conformance.batch import CaseBatch
from tropd_mcore.conformance.cases import SAMPLE_LENGTHS, SHAPES, TEACHER_ROWS, make_batch
from tropd_mcore.conformance.cells import Cell
from tropd_mcore.conformance.entries import Entry
from tropd_mcore.conformance.layouts import ALL_LAYOUTS, CaseLayout
from tropd_mcore.conformance.our_loss import Answer, batch_statistic
from tropd_mcore.kernel.support_loss import WeightGradientMode
from tropd_mcore.mcore.loss import make_distillation_loss
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.packs import pack_on
from tropd_mcore.mcore.parallel import Layout, RankEnvironment, initialize
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.platform import choose
from tropd_mcore.objectives.registry import objective_of
from tropd_mcore.types import MicroBatch, Rollout, RowContext, TeacherScores
from tropd_mcore.weights.architecture import Architecture

PROMPT_TOKENS = 3
TOKENS_PER_MICRO_BATCH = 24
CHUNK_TOKENS = 4


def run_megatron(cell: Cell, entry: Entry) -> Answer:
    """Return the answer of a Megatron model with our loss to a cell; called on every rank."""
    batch = make_batch(cell.conditions())
    model = _model(cell.layout, cast(Dtype, cell.dtype))
    layout = model.layout
    assert model.head is not None, "one pipeline stage has everything"
    with torch.no_grad():
        model.head.weight_WD.copy_(batch.student.weight_WD[model.shard.start : model.shard.stop])
    packed = pack_on(layout, _rollouts(batch), tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, device="cpu")
    micro_batches = [_with_numbers(micro_batch, batch) for micro_batch in packed.micro_batches]
    loss = make_distillation_loss(
        model,
        objective_of(entry.objective, entry.progress),
        [_scores(micro_batch, batch) for micro_batch in micro_batches],
        [_context(micro_batch, batch, entry) for micro_batch in micro_batches],
        _settings(cell, batch),
    )
    entrance = _Entrance(model, batch, micro_batches)
    try:
        results = run_pipeline(model, micro_batches, packed.pack_length, loss=loss, forward_only=False)
    finally:
        entrance.remove()
    totals = torch.zeros(2, dtype=torch.float64)
    for result in results:
        assert result is not None, "one pipeline stage has everything"
        totals += torch.tensor([float(result.loss_sum), float(result.token_count)], dtype=torch.float64)
    dist.all_reduce(totals, group=layout.groups.cp)
    count = int(totals[1])
    # Megatron has divided by the token count.
    weight_WD = model.head.weight_WD.main_grad.double() * count  # type: ignore[attr-defined]
    return Answer(float(totals[0]), count, hidden_TD=entrance.gradient(), weight_WD=weight_WD)


class _Entrance:
    """Replaces the input of the output layer by the hidden states of the case, and collects their gradients."""

    def __init__(self, model: Model, batch: CaseBatch, micro_batches: list[MicroBatch]) -> None:
        self._layout, self._batch, self._micro_batches = model.layout, batch, micro_batches
        self._leaves: list[Tensor] = []
        self._hook = model.modules[-1].output_layer.register_forward_pre_hook(self._enter)

    def remove(self) -> None:
        """Restore the model."""
        self._hook.remove()

    def gradient(self) -> Tensor:
        """[T, D] in float64, the same on every rank."""
        gradient_TD = torch.zeros(self._batch.student.hidden_TD.shape, dtype=torch.float64)
        for micro_batch, leaf in zip(self._micro_batches, self._leaves, strict=True):
            assert leaf.grad is not None, "the loss depends on every micro-batch"
            found_PD = torch.zeros(self._positions(micro_batch), leaf.shape[-1], dtype=torch.float64)
            found_PD[self._own_positions(micro_batch)] = leaf.grad[:, 0].double()
            gradient_TD[_rows_of(micro_batch)] = found_PD[micro_batch.rows_T]
        if self._layout.sequence_parallel:
            dist.all_reduce(gradient_TD, group=self._layout.groups.tp)
        dist.all_reduce(gradient_TD, group=self._layout.groups.cp)
        return gradient_TD

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        micro_batch = self._micro_batches[len(self._leaves)]
        hidden_TD = self._batch.student.hidden_TD
        hidden_P1D = hidden_TD.new_ones(self._positions(micro_batch), 1, hidden_TD.shape[1])
        hidden_P1D[micro_batch.rows_T, 0] = hidden_TD[_rows_of(micro_batch)]
        leaf = hidden_P1D[self._own_positions(micro_batch)].clone().requires_grad_()
        assert leaf.shape == args[0].shape, f"{leaf.shape} hidden states for {args[0].shape}"
        self._leaves.append(leaf)
        return (leaf, *args[1:])

    def _positions(self, micro_batch: MicroBatch) -> int:
        return len(micro_batch.input_ids_P)

    def _own_positions(self, micro_batch: MicroBatch) -> slice:
        """With sequence parallelism, a tensor rank has only a part of the positions of its context rank."""
        if not self._layout.sequence_parallel:
            return slice(0, self._positions(micro_batch))
        share = self._positions(micro_batch) // self._layout.tp_size
        return slice(self._layout.tp_rank * share, (self._layout.tp_rank + 1) * share)


@lru_cache(maxsize=1)
def _layout(name: str) -> Layout:
    """The layout of this process. A later call with another name replaces it."""
    environment = RankEnvironment(dist.get_rank(), dist.get_world_size(), local_rank=0)
    return initialize(_parallel(ALL_LAYOUTS[name]), choose("cpu"), seed=1, environment=environment)


@lru_cache(maxsize=1)
def _model(name: str, dtype: Dtype) -> Model:
    """A model of one layer."""
    wanted, shape = ALL_LAYOUTS[name], SHAPES["megatron"]
    layout = _layout(name)
    architecture = Architecture(
        family="qwen2",
        num_layers=1,
        hidden_size=shape.hidden,
        ffn_hidden_size=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=shape.vocabulary,
        rope_theta=10_000.0,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        tied_embeddings=False,
        qk_norm=False,
        qkv_bias=True,
        max_position_embeddings=64,
        dtype=dtype,
    )
    return build_model(
        architecture,
        _parallel(wanted),
        layout,
        choose("cpu"),
        dtype=dtype,
        trainable=True,
        optimizer=OptimizerConfig(distributed=False),  # every rank holds all reduced gradients
    )


def _parallel(wanted: CaseLayout) -> ParallelConfig:
    return ParallelConfig(tensor=wanted.tensor, context=wanted.context, sequence_parallel=wanted.sequence_parallel)


def _settings(cell: Cell, batch: CaseBatch) -> LossSettings:
    return LossSettings(
        temperature=batch.temperature,
        form=cell.form,
        backend=cast(Literal["eager", "compile"], cell.backend),
        weight_gradient=cast(WeightGradientMode, cell.mode),
        chunk_tokens=CHUNK_TOKENS,
        overlap_chunks=cell.schedule == "overlap",
        logit_softcap=batch.softcap,
        topk_overlap=False,
    )


def _rollouts(batch: CaseBatch) -> list[Rollout]:
    """The samples of the case, each after a prompt. The tokens that the teacher sampled are their prefixes."""
    target_ids, start, rollouts = batch.tokens.target_ids_T.numpy().astype(np.int32), 0, []
    for sample, length in enumerate(SAMPLE_LENGTHS):
        ids = target_ids[start : start + length]
        prefix = sum(row in TEACHER_ROWS for row in range(start, start + length))
        response = ids[prefix:]
        rollouts.append(
            Rollout(
                sample_id=str(sample),
                prompt_id=str(int(batch.group_S[sample])),
                prompt_ids=np.ones(PROMPT_TOKENS, dtype=np.int32),
                prefix_ids=ids[:prefix],
                response_ids=response,
                rollout_logp=np.zeros(len(response), dtype=np.float32),
                trust_u=np.zeros(len(response), dtype=np.float32),
                policy_version="0",
                finish_reason="stop",
                carries_prefix_loss=True,
                answer=None,
            )
        )
        start += length
    return rollouts


def _rows_of(micro_batch: MicroBatch) -> Tensor:
    """For each row of the micro-batch, its row in the case."""
    starts_S = torch.tensor([0, *SAMPLE_LENGTHS[:-1]]).cumsum(0)
    return starts_S[micro_batch.sample_index_T] + micro_batch.token_index_T - PROMPT_TOKENS


def _with_numbers(micro_batch: MicroBatch, batch: CaseBatch) -> MicroBatch:
    """The micro-batch with the sampler's log-probs, the uniforms and the weights of the case."""
    tokens = batch.tokens.rows(_rows_of(micro_batch))
    return replace(
        micro_batch,
        rollout_logp_T=tokens.rollout_logp_T.float(),
        trust_u_T=tokens.trust_u_T.float(),
        weight_T=tokens.weight_T.float(),
    )


def _scores(micro_batch: MicroBatch, batch: CaseBatch) -> TeacherScores:
    """The teacher's scores of the case. Tokens in neither mask count as not scored."""
    tokens = batch.tokens.rows(_rows_of(micro_batch))
    return TeacherScores(
        logp_T=tokens.teacher_logp_T.float(),
        topk_ids_TK=tokens.topk_ids_TK,
        topk_logp_TK=tokens.teacher_topk_logp_TK.float(),
        tail_mass_T=1.0 - tokens.teacher_topk_logp_TK.float().exp().sum(dim=1),
        entropy_T=tokens.teacher_entropy_T.float(),
        scored_T=tokens.student_mask_T | tokens.prefix_mask_T,
    )


def _context(micro_batch: MicroBatch, batch: CaseBatch, entry: Entry) -> RowContext:
    """The numbers from before the update."""
    rows = _rows_of(micro_batch)
    tokens = batch.tokens.rows(rows)
    context = RowContext(
        old_logp_T=tokens.old_logp_T.float(),
        reference_logp_T=tokens.reference_logp_T.float(),
        statistic_T=batch_statistic(entry, batch)[rows].float(),
    )
    if not entry.objective.student_candidates:
        return context
    return replace(
        context,
        own_ids_TL=tokens.own_ids_TL,
        old_own_logp_TL=tokens.old_own_logp_TL.float(),
        teacher_own_logp_TL=tokens.teacher_own_logp_TL.float(),
    )
