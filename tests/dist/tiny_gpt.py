"""A small GPTModel of whichever megatron-core comes first on the path, on gloo, for tests inside other stacks.

Our trainer's own tests use `layouts` instead. This module uses Megatron's own attention and norm. From our code it uses
only the replacement of "cuda" by the CPU. Only rank processes import it. Weights are the same at every tensor-parallel
size: each rank takes its part of a whole weight that is drawn from the name of the parameter. Megatron is imported on
use, so that a rank may put another version first on its path.

Also here: batches with a teacher, and the TrOPD of these in float64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCABULARY, PADDED, BATCH, LENGTH, K = 53, 56, 2, 12, 4
FUSIONS = ("bias_dropout_fusion", "masked_softmax_fusion", "persist_layer_norm", "gradient_accumulation_fusion")


@contextmanager
def layout(tensor: int = 1, context: int = 1) -> Iterator[None]:
    """Megatron's process groups."""
    import megatron.core
    from megatron.core import parallel_state, tensor_parallel

    from tropd_mcore.mcore.platform import choose, cpu_device, cpu_random

    if megatron.core.__version__.startswith("0.16."):
        choose("cpu").activate()  # remove all of it, because other tests use these processes
    elif not cpu_device.is_active():
        cpu_random.install()
        cpu_device.install()
        torch.cuda.current_stream = lambda device=None: None  # requested although no code waits for it
    parallel_state.destroy_model_parallel()  # of a task that ended with an error, and left its groups in the process
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def model(seed: int, *, per_token: bool = False) -> Any:
    """The model of this rank, in the data-parallel wrapper."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        calculate_per_token_loss=per_token,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **dict.fromkeys(FUSIONS, False),
    )
    module = GPTModel(config, get_gpt_layer_local_spec(), PADDED, LENGTH, share_embeddings_and_output_weights=False)
    for name, parameter in module.named_parameters():
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6]))
        if not getattr(parameter, "tensor_model_parallel", False):
            weight = torch.randn(parameter.shape, generator=draw)
        else:
            shape, dim = list(parameter.shape), parameter.partition_dim
            shape[dim] *= config.tensor_model_parallel_size
            whole = torch.randn(shape, generator=draw)
            weight = whole.chunk(config.tensor_model_parallel_size, dim)[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        scale = 0.02 if "layernorm" in name else 1.0 if "embedding" in name else 0.3
        with torch.no_grad():
            parameter.copy_(weight * scale + (1.0 if "layernorm.weight" in name else 0.0))
    config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(config, DistributedDataParallelConfig(), module)


class Loose(SimpleNamespace):
    """Settings of another stack's run. Missing attributes are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class IdleOptimizer:
    """Leaves the gradients as they are."""

    param_groups, grad_norms_by_group = ({},), {}

    def zero_grad(self) -> None:
        """They are read after the step."""

    def step(self, **options: Any) -> Any:
        """(done, norm, zeros), the result of Megatron's optimizers."""
        return True, 1.0, 0


Gradients = dict[str, tuple[Any, int]]
"""{name: (gradient of this rank, the dimension that is split, or -1)}, in NumPy, because Megatron-Core 0.20 pickles a
tensor in a form that only it can read."""


def gradients(wrapped: Any) -> Gradients:
    """The gradient in `main_grad` after the backward pass."""
    return {
        name: (
            parameter.main_grad.double().numpy().copy(),
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1,
        )
        for name, parameter in wrapped.module.named_parameters()
    }


def error_of(every: list[Gradients], expected: Gradients) -> float:
    """Largest error of all gradients over all tensor ranks, each relative to its largest element."""
    errors = []
    for name, (gradient, _) in expected.items():
        parts = [found[name] for found in every]
        dim = parts[0][1]
        wholes = [np.concatenate([part for part, _ in parts], dim)] if dim >= 0 else [part for part, _ in parts]
        errors += [float(np.abs(whole - gradient).max() / np.abs(gradient).max()) for whole in wholes]
    return max(errors)


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    """Micro-batches with different numbers of student tokens, and a teacher with mass outside its candidates."""
    return [batch(seed, VOCABULARY, spread=2.0, kept=0.4 + 0.4 * seed) for seed in range(count)]


def batch(seed: int, vocabulary: int, *, spread: float, kept: float) -> dict[str, Tensor]:
    """A micro-batch of random tokens. `spread` scales the teacher's logits, `kept` is the share of student tokens."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (BATCH, LENGTH), generator=random)
    log_q = (spread * torch.randn(BATCH, LENGTH, vocabulary, generator=random)).log_softmax(-1)
    labels, top = tokens.roll(-1, dims=1), log_q.topk(K)
    mask = torch.rand(BATCH, LENGTH, generator=random) < kept
    mask[:, -1] = False
    return {
        "tokens": tokens,
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "labels": labels,
        "student_mask": mask,
        "teacher_logp": log_q.gather(-1, labels[..., None])[..., 0],
        "teacher_ids": top.indices,
        "teacher_topk_logp": top.values,
        "trust_u": torch.rand(BATCH, LENGTH, generator=random),
    }


def tropd(logits: Tensor, batch: dict[str, Tensor], vocabulary: int = VOCABULARY) -> tuple[Tensor, int, int]:
    """(sum of TrOPD's losses in float64, number of tokens, number of outliers), written out over the whole vocabulary.

    A token with u < q(x) / p(x) is trusted and has the loss -log(q / p) log p(x) with a constant factor; an outlier has
    the forward KL on the teacher's candidates.
    """
    log_p = logits[..., :vocabulary].double().log_softmax(-1)
    logp_x = log_p.gather(-1, batch["labels"][..., None])[..., 0]
    r = batch["teacher_logp"].double() - logp_x.detach()
    trusted = batch["trust_u"].double() < r.exp()
    log_q = batch["teacher_topk_logp"].double()
    fkl = (log_q.exp() * (log_q - log_p.gather(-1, batch["teacher_ids"]))).sum(-1)
    mask = batch["student_mask"]
    loss = torch.where(trusted, -r * logp_x, fkl)[mask].sum()
    return loss, int(mask.sum()), int((mask & ~trusted).sum())
