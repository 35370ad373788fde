"""NeMo-RL: chunked log-prob, log-probs of given ids, entropy, its top-k distillation loss, and its fused log-prob.

Shapes: B = 1 sequence of T tokens, W vocabulary shard of this rank, K teacher top-k, D hidden, N ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tropd_mcore.conformance.adapters.checkout import Checkout, checkout
from tropd_mcore.conformance.adapters.inputs import CompositeInputs, counted, student_logits, summed, topk_forward_kl
from tropd_mcore.conformance.peers import PeerCase, covers

COMMIT = "7ea279abfbeb"
SAMPLING = "nemo_rl.algorithms.logits_sampling_utils"
MODEL_UTILS = "nemo_rl.distributed.model_utils"
INTERFACES = "nemo_rl.algorithms.loss.interfaces"
UTILS = "nemo_rl.algorithms.utils"
LOSSES = "nemo_rl.algorithms.loss.loss_functions"
BATCH = "nemo_rl.distributed.batched_data_dict"
CHUNK_TOKENS = 10
"""Smaller than the cases, so that there are several chunks."""


@covers("log_prob", dtypes=("float32", "bfloat16"))
def log_prob(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`ChunkedDistributedLogprob`."""
    module = _model_utils(checkout("nemo_rl", root, COMMIT))
    logp_1T = module.ChunkedDistributedLogprob.apply(
        student_logits(case)[None], case.target_ids_T[None], *_place(case), CHUNK_TOKENS, case.group, False
    )
    return summed(case, -logp_1T[0])


@covers("gkd/fkl-truncated", dtypes=("float32", "bfloat16"))
def gathered_forward_kl(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`ChunkedDistributedGatherLogprob`; the sum over the top-k is ours."""
    module = _model_utils(checkout("nemo_rl", root, COMMIT))
    logp_1TK = module.ChunkedDistributedGatherLogprob.apply(
        student_logits(case)[None], case.topk_ids_TK[None], *_place(case), CHUNK_TOKENS, case.group, False
    )
    return summed(case, topk_forward_kl(case.teacher_topk_logp_TK, logp_1TK[0]))


@covers("entropy", dtypes=("float32", "bfloat16"))
def entropy(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`ChunkedDistributedEntropy`, which returns sum p log p."""
    module = _model_utils(checkout("nemo_rl", root, COMMIT))
    negative_1T = module.ChunkedDistributedEntropy.apply(student_logits(case)[None], CHUNK_TOKENS, case.group, False)
    return summed(case, negative_1T[0])


@covers("gkd/fkl-renorm", "gkd/rkl-renorm", without=("uneven",), dtypes=("float32", "bfloat16"))
def distillation(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`get_distillation_topk_logprobs_from_logits` and `DistillationLossFn`, whose default is the renormalised top-k.

    The loss is of the next token, so the last row is repeated. The weights are passed as its token mask.
    """
    files = checkout("nemo_rl", root, COMMIT)
    model_utils, losses = _model_utils(files), _losses(files)
    kind: Literal["forward", "reverse"] = "forward" if case.name == "gkd/fkl-renorm" else "reverse"
    config = losses.DistillationLossConfig(kl_type=kind, mixed_kl_weight=0.0, zero_outside_topk=False)
    student_1TK, teacher_1TK, entropy_1T = model_utils.get_distillation_topk_logprobs_from_logits(
        _last_twice(student_logits(case)),
        _last_twice(case.teacher_topk_logp_TK),
        _last_twice(case.topk_ids_TK),
        zero_outside_topk=False,
        calculate_entropy=False,
        vocab_parallel_rank=case.group.rank(),
        vocab_parallel_group=case.group,
    )
    mask_T = case.weight_T * counted(case)
    data = {
        "input_ids": case.target_ids_T[None],
        "token_mask": torch.cat([mask_T[:1], mask_T])[None],
        "sample_mask": mask_T.new_ones(1),
    }
    one = mask_T.new_ones(())  # the mean's denominator, so that the loss is the sum
    loss, _ = losses.DistillationLossFn(config)(student_1TK, teacher_1TK, entropy_1T, data, one, one)
    total: Tensor = loss
    return total


def composite(inputs: CompositeInputs, *, root: Path | None = None) -> Tensor:
    """Its three functions on the same logits, in its chunks; the sum over the top-k is ours."""
    module = _model_utils(checkout("nemo_rl", root, COMMIT))
    logits_1TW, start = inputs.logits_TW[None], inputs.vocab_start
    place = (start, start + inputs.logits_TW.shape[1], inputs.chunk_tokens, inputs.group, False)
    logp_1T = module.ChunkedDistributedLogprob.apply(logits_1TW, inputs.target_ids_T[None], *place)
    logp_1TK = module.ChunkedDistributedGatherLogprob.apply(logits_1TW, inputs.topk_ids_TK[None], *place)
    negative_1T = module.ChunkedDistributedEntropy.apply(logits_1TW, inputs.chunk_tokens, inputs.group, False)
    return inputs.total(logp_1T[0], topk_forward_kl(inputs.topk_logp_TK, logp_1TK[0]), -negative_1T[0])


def fused_log_prob(
    hidden_SD: Tensor,
    weight_WD: Tensor,
    target_ids_T: Tensor,
    *,
    group: ProcessGroup,
    chunk_tokens: int,
    root: Path | None = None,
) -> Tensor:
    """`ChunkedDistributedHiddenStatesToLogprobs`: log p(x) of all tokens, [T], with logits computed chunk by chunk.

    `hidden_SD` is this rank's T / N rows (sequence parallel), `weight_WD` its rows of the output layer.
    """
    module = _model_utils(checkout("nemo_rl", root, COMMIT))
    start = group.rank() * weight_WD.shape[0]
    logp_1T: Tensor = module.ChunkedDistributedHiddenStatesToLogprobs.apply(
        hidden_SD[:, None],
        target_ids_T[None],
        weight_WD,
        start,
        start + weight_WD.shape[0],
        chunk_tokens,
        group,
        False,
    )
    return logp_1T[0]


def _place(case: PeerCase) -> tuple[int, int]:
    return case.vocab_start, case.vocab_stop


def _last_twice(values_TX: Tensor) -> Tensor:
    return torch.cat([values_TX, values_TX[-1:]])[None]


def _model_utils(files: Checkout) -> Any:
    files.load(SAMPLING)
    return files.load(MODEL_UTILS, real=(SAMPLING,))


def _losses(files: Checkout) -> Any:
    _model_utils(files)
    files.load(INTERFACES, absent=(BATCH,))
    chat, tokenizers = "nemo_rl.data.chat_templates", "nemo_rl.utils.fastokens"
    files.load(UTILS, absent=(chat, tokenizers, "nemo_rl.models.policy", "nemo_rl.utils.logger"))
    cross_tokenizer, parallelize = "nemo_rl.algorithms.x_token.loss_utils", "nemo_rl.models.dtensor.parallelize"
    return files.load(LOSSES, real=(INTERFACES, UTILS, MODEL_UTILS), absent=(cross_tokenizer, BATCH, parallelize))
