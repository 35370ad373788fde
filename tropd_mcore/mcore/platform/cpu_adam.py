"""Adam with the interface of the fused GPU optimizers, which Megatron's distributed optimizer expects.

It is not a faster Adam. In that interface each parameter group has one number `step`, and the state of a parameter is
exp_avg and exp_avg_sq. torch's AdamW keeps `step` in the state of each parameter. After loading a checkpoint, Megatron
would share one `step` tensor among all parameters, and each optimizer step would advance it once per parameter.
Invariant: the update equals torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distributed
import torch
from torch.optim.adam import adam


class CpuFusedAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`) or AdamW. It must not subclass torch's, because Megatron treats those differently."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Megatron passes no closure"
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],  # adam() counts it up in place
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )


def install() -> None:
    """Make Megatron use CpuFusedAdam as if it were an installed fused optimizer."""
    megatron_optimizer.Adam = CpuFusedAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_distributed.Adam = CpuFusedAdam
    megatron_distributed.HAVE_APEX_OR_TE = True
    megatron_distributed.USING_APEX_OPTIMIZER = True
