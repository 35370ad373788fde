"""Full TrOPD in NeMo-RL's Megatron workers, with patches/nemo_rl.patch applied and this repository on PYTHONPATH:

    run_distillation.py ... ++loss_fn.tropd_vocab_size=V ++teacher.tropd_vocab_size=V      # V: without padding

The patch calls this file. The top-k "logits" are then true log-probs [B, S, K + 1]: the teacher's candidates, then the
next token. Logits are already divided by the temperature. They are left unchanged, because with packing the loss is
called per sequence on slices of them. NeMo-RL divides a loss by the number of context ranks, hence the factor.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, cat, distributed
from torch.nn.functional import pad

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, distributed_topk, objectives, trust_uniforms


def teacher_numbers(ids: Tensor, cu_seqlens: Any, vocab: int, logits: Tensor, k: int, group: Any, **_: Any) -> Any:
    """(log-probs, ids) [*T, k] of k - 1 candidates and the next token. Replaces NeMo-RL's `distributed_vocab_topk`."""
    after, cp = ids.roll(-1, 1), import_module("megatron.core.parallel_state").get_context_parallel_group()
    if cu_seqlens is not None:
        pack = import_module("nemo_rl.algorithms.loss.utils")._pack_input_ids
        after = pack(ids, cu_seqlens, cu_seqlens, cp.rank(), cp.size(), -1)
    top: Any = distributed_topk(logits, k=k - 1, vp=VocabParallel(group, vocab), ids_TJ=after[..., None])
    return cat([top.logp_TK, top.logp_TJ], -1), cat([top.ids_TK, after[..., None]], -1)


class Tropd:
    """The loss of one step. It is created on the driver, which adds the uniforms of the gate to the batch."""

    def __init__(self, data: Any, vocab_size: int, seed: int) -> None:
        kinds, self.vocab_size = import_module("nemo_rl.algorithms.loss.interfaces"), vocab_size
        self.loss_type, self.input_type = kinds.LossType.TOKEN_LEVEL, kinds.LossInputType.LOGIT
        data["trust_u"] = trust_uniforms(data["input_ids"].shape, seed=seed)

    def __call__(self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, logits: Tensor) -> Any:
        groups, cut = import_module("megatron.core.parallel_state"), import_module("nemo_rl.distributed.model_utils")
        cp, tp = groups.get_context_parallel_group(), groups.get_tensor_model_parallel_group()
        mask = pad((data["token_mask"] * data["sample_mask"][:, None])[:, 1:], (0, 1)) > 0
        room = logits.shape[1] * cp.size() - mask.shape[1]  # rows of the whole sequence, then of this context rank
        rows = [pad(each, (0, room)) for each in (mask, data["trust_u"])]
        rows += [pad(data[f"teacher_topk_{name}"], (0, 0, 0, room)) for name in ("logits", "indices")]
        mask, u, logp, ids = (cut._get_tokens_on_this_cp_rank(each, cp.rank(), cp.size()) for each in rows)
        teacher, vp = TeacherTopK(logp[..., -1], ids[..., :-1], logp[..., :-1]), VocabParallel(tp, self.vocab_size)
        given: Any = {"student_mask_T": mask, "trust_u_T": u, "vp": vp, "preserve_logits": True}
        out = distill_loss(logits, ids[..., -1], teacher, objectives.tropd(), **given)
        distributed.all_reduce(out.value, group=cp)
        report = {"loss": float(out.value / global_valid_toks), "num_valid_samples": len(mask)}
        return out.loss_sum * cp.size() / (global_valid_toks + 1e-8), report
