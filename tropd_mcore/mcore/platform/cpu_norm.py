"""RMSNorm for the CPU platform, with the signature that Megatron's layer specs call.

Other normalisations are not supported. Invariant: the weight has the attribute `sequence_parallel`, which tells
Megatron that its gradient is partial on each tensor rank. The weight of torch's RMSNorm has no such attribute, so
Megatron refuses torch's RMSNorm with sequence parallelism.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CpuRMSNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), in float32, rounded to the dtype of x before the weight is applied."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm", f"CpuRMSNorm asked to be {config.normalization}"
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(x.dtype)
