"""verl: top-k forward KL of its Megatron trainer, vocabulary-parallel log-prob and entropy.

Its fused linear cross-entropy is not here: its kernels refuse tensors that are not on a GPU.

Shapes: T tokens, W vocabulary shard of this rank, K teacher top-k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tropd_mcore.conformance.adapters.checkout import Checkout, checkout
from tropd_mcore.conformance.adapters.inputs import CompositeInputs, megatron_tensor_group, student_logits, summed
from tropd_mcore.conformance.peers import PeerCase, covers

COMMIT = "1dda039b9c63"
DISTILLATION = "verl.trainer.distillation.megatron.losses"
DISTILLATION_IMPORTS = ("verl.models.mcore.util", "verl.workers.config")
TENSOR_PARALLEL = "verl.utils.megatron.tensor_parallel"


@covers("gkd/fkl-truncated", without=("uneven",), dtypes=("float32", "bfloat16"))
def forward_kl_topk(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`_VocabParallelKLDivergence`, without its clamp."""
    distillation = _distillation(checkout("verl", root, COMMIT))
    with megatron_tensor_group(case.group):
        kl_T = _forward_kl(distillation, student_logits(case), case.teacher_topk_logp_TK, case.topk_ids_TK)
    return summed(case, kl_T)


@covers("log_prob", without=("uneven",), dtypes=("float32", "bfloat16"))
def log_prob(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`vocab_parallel_log_probs_from_logits`, which is Megatron's own vocabulary-parallel cross entropy."""
    module = checkout("verl", root, COMMIT).load(TENSOR_PARALLEL)
    with megatron_tensor_group(case.group):
        logp_T = module.vocab_parallel_log_probs_from_logits(student_logits(case), case.target_ids_T)
    return summed(case, -logp_T)


@covers("entropy", without=("uneven",), dtypes=("float32",))
def entropy(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """`vocab_parallel_entropy`."""
    module = checkout("verl", root, COMMIT).load(TENSOR_PARALLEL)
    with megatron_tensor_group(case.group):
        entropy_T = module.vocab_parallel_entropy(student_logits(case))
    return summed(case, -entropy_T)


def composite(inputs: CompositeInputs, *, root: Path | None = None) -> Tensor:
    """The order of verl's logits processor: a copy of the logits, entropy, forward KL, log-prob."""
    files = checkout("verl", root, COMMIT)
    distillation, tensor_parallel = _distillation(files), files.load(TENSOR_PARALLEL)
    with megatron_tensor_group(inputs.group):
        copy_TW = inputs.logits_TW.clone()
        entropy_T = tensor_parallel.vocab_parallel_entropy(inputs.logits_TW)
        kl_T = _forward_kl(distillation, copy_TW, inputs.topk_logp_TK, inputs.topk_ids_TK)
        logp_T = tensor_parallel.vocab_parallel_log_probs_from_logits(copy_TW, inputs.target_ids_T)
    return inputs.total(logp_T, kl_T, entropy_T)


def _distillation(files: Checkout) -> Any:
    return files.load(DISTILLATION, absent=DISTILLATION_IMPORTS)


def _forward_kl(distillation: Any, logits_TW: Tensor, topk_logp_TK: Tensor, topk_ids_TK: Tensor) -> Tensor:
    kl_T: Tensor = distillation._VocabParallelKLDivergence.apply(logits_TW, topk_logp_TK, topk_ids_TK, None)[0]
    return kl_T
