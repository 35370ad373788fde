"""ms-swift: GKD of its Megatron trainer on the teacher's top-k and on the full vocabulary, log-prob and entropy.

Its trainer passes the same arguments to `gkd_loss` as the adapter. `gkd_loss` returns a sum without weights, so the
adapter calls it once per token. It computes in the dtype of the logits, which Megatron converts to float32.

Shapes: T tokens, W vocabulary shard of this rank, K teacher top-k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropd_mcore.conformance.adapters.checkout import checkout
from tropd_mcore.conformance.adapters.inputs import megatron_tensor_group, student_logits, summed, teacher_logits
from tropd_mcore.conformance.peers import PeerCase, covers

COMMIT = "3602360a5623"
VOCAB_PARALLEL = "swift.megatron.trainers.vocab_parallel_utils"
GKD_UTILS = "swift.megatron.trainers.gkd_utils"
GKD_LOSS = "swift.rlhf_trainers.gkd_loss"
EXACT = ("float64", "float32")


@covers("gkd/*-renorm", without=("uneven",), dtypes=EXACT)
def gkd_topk(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`gkd_loss` with the teacher's top-k."""
    teacher = {"topk_logprobs": case.teacher_topk_logp_TK, "topk_indices": case.topk_ids_TK}
    return summed(case, _gkd(case, teacher, root))


@covers("gkd/*-full", dtypes=EXACT)
def gkd_full(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`gkd_loss` with the teacher's logits."""
    return summed(case, _gkd(case, {"full_logits": teacher_logits(case)}, root))


@covers("log_prob", without=("uneven",), dtypes=EXACT)
def log_prob(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """First result of `compute_logps_and_entropy_from_logits`."""
    module = checkout("ms_swift", root, COMMIT).load(VOCAB_PARALLEL)
    with megatron_tensor_group(case.group):
        logp_T, _ = module.compute_logps_and_entropy_from_logits(student_logits(case), case.target_ids_T)
    return summed(case, -logp_T)


@covers("entropy", dtypes=EXACT)
def entropy(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """Second result of `compute_logps_and_entropy_from_logits`."""
    module = checkout("ms_swift", root, COMMIT).load(VOCAB_PARALLEL)
    with megatron_tensor_group(case.group):
        _, entropy_T = module.compute_logps_and_entropy_from_logits(
            student_logits(case), case.target_ids_T, compute_entropy=True
        )
    return summed(case, -entropy_T)


def _gkd(case: PeerCase, teacher: dict[str, Tensor], root: Path | None) -> Tensor:
    """The divergence of each token, [T]; `beta` is 0 for the forward KL and 1 for the reverse."""
    files = checkout("ms_swift", root, COMMIT)
    vocab_parallel, utils, module = files.load(VOCAB_PARALLEL), files.load(GKD_UTILS), files.load(GKD_LOSS)
    objective: Any = case.objective
    beta = {"fkl": 0.0, "rkl": 1.0}.get(objective.divergence, objective.beta)
    logits_TW = student_logits(case)
    labels_11 = torch.zeros(1, 1, dtype=torch.int64)  # any token: only -100 means none
    losses = []
    with megatron_tensor_group(case.group):
        for row in range(len(logits_TW)):
            of_row = module.TeacherOutput(**{name: value[None, row : row + 1] for name, value in teacher.items()})
            loss, _ = module.gkd_loss(
                logits_TW[None, row : row + 1],
                of_row,
                labels_11,
                beta,
                1.0,
                gather_fn=utils.tp_gather_topk,
                log_softmax_fn=vocab_parallel.vocab_parallel_log_softmax,
                kl_div_fn=vocab_parallel.vocab_parallel_kl_div,
            )
            losses.append(loss)
    return torch.stack(losses)
