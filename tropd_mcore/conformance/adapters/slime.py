"""slime: vocabulary-parallel log-prob and entropy. It has no differentiable distribution loss.

Shapes: T tokens, W vocabulary shard of this rank.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tropd_mcore.conformance.adapters.checkout import checkout
from tropd_mcore.conformance.adapters.inputs import CompositeInputs, student_logits, summed
from tropd_mcore.conformance.peers import PeerCase, covers

COMMIT = "624b824a898a"
MODULE = "slime.utils.ppo_utils"


@covers("log_prob", without=("uneven",), dtypes=("float32", "bfloat16"))
def log_prob(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """First result of `calculate_log_probs_and_entropy`."""
    module = checkout("slime", root, COMMIT).load(MODULE)
    logp_T1, _ = module.calculate_log_probs_and_entropy(student_logits(case), case.target_ids_T, case.group)
    return summed(case, -logp_T1[:, 0])


@covers("entropy", without=("uneven",), dtypes=("float32", "bfloat16"))
def entropy(case: PeerCase, *, root: Path | None = None) -> Tensor:
    """Second result of `calculate_log_probs_and_entropy`."""
    module = checkout("slime", root, COMMIT).load(MODULE)
    _, entropy_T = module.calculate_log_probs_and_entropy(
        student_logits(case), case.target_ids_T, case.group, with_entropy=True
    )
    return summed(case, -entropy_T)


def composite(inputs: CompositeInputs, *, root: Path | None = None) -> Tensor:
    """Log-prob and entropy in one call, in its chunks; no forward KL."""
    module = checkout("slime", root, COMMIT).load(MODULE)
    logp_T1, entropy_T = module.calculate_log_probs_and_entropy(
        inputs.logits_TW, inputs.target_ids_T, inputs.group, with_entropy=True, chunk_size=inputs.chunk_tokens
    )
    return inputs.total(logp_T1[:, 0], None, entropy_T)
