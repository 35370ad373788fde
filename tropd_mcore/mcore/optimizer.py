"""Megatron's Adam and learning-rate schedule, and one optimizer step.

This module does not compute gradients (`pipeline` finishes them). A training step can have several optimizer steps, or
none. Invariants: no parameter is updated from a non-finite gradient. Optimizer step t (from 1) uses the learning rate
at position t of the schedule, so no rollout is wasted on a step with rate 0.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tropd_mcore.config.schema import OptimizerConfig
from tropd_mcore.errors import TrainingError
from tropd_mcore.mcore.checks import check_optimizer_config
from tropd_mcore.mcore.model import Model


def build_optimizer(
    model: Model, config: OptimizerConfig, steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimizer of a trainable model and its schedule over `steps` optimizer steps.

    The weights must be loaded first. Weight decay is decoupled and does not apply to biases and norms.
    """
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad_norm,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=config.distributed,
        overlap_param_gather=config.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(megatron_config)
    check_optimizer_config(megatron_config, overrides)
    optimizer = get_megatron_optimizer(megatron_config, model.model_chunks, config_overrides=overrides)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(steps, config.warmup_steps + 1),  # Megatron requires one step after the warm-up
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def optimizer_step(
    model: Model, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, step: int
) -> tuple[float, bool]:
    """Clip the finished gradients and update the parameters once.

    Returns (global L2 norm before clipping, whether the update happened). If the norm is not finite, raises
    TrainingError on every rank, names a parameter with a non-finite gradient, and leaves parameters and optimizer
    unchanged. `step` is the training step and is used only in that message.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        optimizer.zero_grad()
        raise TrainingError(
            f"step {step}: the gradient norm is {grad_norm}, expected a finite number; {_culprit(model)}"
        )
    scheduler.step(1)
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0.0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    updated = bool(optimizer.step_with_ready_grads())
    optimizer.zero_grad()
    return grad_norm, updated


def skip_step(optimizer: MegatronOptimizer) -> float:
    """Replace `optimizer_step` when no token counts: drop the gradients, which are 0, and change nothing else.

    Weights, moments and schedule stay bit-identical. A normal step would still move the weights by Adam's momentum and
    weight decay. If this comes before the first optimizer step, the moments are created as zeros of step 0, because
    Megatron cannot save an optimizer without them. Returns the gradient norm, 0.
    """
    optimizer.zero_grad()
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:  # this rank has no parameter of the part
            continue
        part.init_state_fn(part.optimizer, part.config)  # skips parameters that already have moments
        for group in part.optimizer.param_groups:
            if group["params"]:
                group.setdefault("step", 0)
    return 0.0


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the rate of the last optimizer step; before the first one, the rate at position 0 of the schedule."""
    return float(optimizer.param_groups[0]["lr"])


def _culprit(model: Model) -> str:
    """Name the first parameter with a non-finite gradient on the lowest rank that has one. Collective."""
    name = next((name for module in model.modules for name, param in module.named_parameters() if _broken(param)), None)
    names: list[str | None] = [None] * model.layout.world_size
    dist.all_gather_object(names, name, group=model.layout.groups.control)
    found = [(rank, name) for rank, name in enumerate(names) if name is not None]
    if not found:
        return "every gradient is finite, so the sum of their squares overflowed"
    rank, name = found[0]
    return f"first in {name} of rank {rank} ({len(found)} of {len(names)} ranks have such gradients)"


def _broken(param: torch.nn.Parameter) -> bool:
    return not bool(param.main_grad.isfinite().all())  # type: ignore[attr-defined]
