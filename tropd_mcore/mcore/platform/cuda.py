"""The GPU platform: NCCL and Transformer Engine, and nothing of our own.

Not for tuning: the fusions named here are those that change no result. Invariant: no attribute of torch or Megatron is
replaced.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core.extensions.transformer_engine import TENorm  # importable, though unusable, without the engine
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from tropd_mcore.errors import ConfigError


class CudaPlatform:
    """One GPU a rank. Raises ConfigError where Transformer Engine is not installed."""

    name: Literal["cpu", "cuda"] = "cuda"
    backend = "nccl"

    def __init__(self, local_rank: int) -> None:
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError(["platform.kind = cuda: transformer_engine is not installed; install transformer-engine"])
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            problem = f"platform.kind = cuda: local rank {local_rank} has no GPU, this machine has {gpus}"
            raise ConfigError([f"{problem}; launch one rank a GPU (torchrun --nproc-per-node={gpus})"])
        self.device = torch.device("cuda", local_rank)

    def activate(self) -> None:
        """Make this rank's GPU the current device, and have bfloat16 matrix products add up in float32.

        The hidden states' gradient is a product over the whole vocabulary shard. Where the library splits that sum, it
        may round the parts to bfloat16 first, which near convergence is most of the gradient's error.
        """
        torch.cuda.set_device(self.device)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def layer_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Return Transformer Engine layers."""
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TENorm)

    def config_defaults(self) -> dict[str, Any]:
        """Return the kernel fusions; the weight-gradient fusion of Megatron's layers only where Apex is installed."""
        return {
            "apply_rope_fusion": True,
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "gradient_accumulation_fusion": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        }

    def empty_cache(self) -> None:
        """Return the allocator's unused memory. Costs one wait for the GPU."""
        torch.cuda.empty_cache()

    def prepare_training(self, module: torch.nn.Module) -> None:
        """Have Transformer Engine's layers add their weight gradients to `main_grad` inside the matrix product.

        Megatron asks them to only where Apex's extension is installed, which they do not use. Without it each gradient
        would be rounded to bfloat16 before it is added. They read the attribute at every forward pass.
        """
        for part in module.modules():
            if hasattr(part, "fuse_wgrad_accumulation"):
                part.fuse_wgrad_accumulation = True  # type: ignore[assignment]
