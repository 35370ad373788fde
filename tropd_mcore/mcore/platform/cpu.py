"""The CPU platform: Megatron's own parallelism on gloo, with the few GPU assumptions of megatron-core replaced.

It serves tests and small runs. It is not fast, and it refuses to run if torch sees a GPU. Invariant: schedules,
point-to-point communication, DDP, optimizer and checkpoints are Megatron's, unmodified. All replacements are in the
modules `cpu_device`, `cpu_random`, `cpu_adam`, `cpu_attention` and `cpu_norm`.
"""

from __future__ import annotations

from typing import Any, Literal

import megatron.core
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.platform import cpu_adam, cpu_device, cpu_random
from tropd_mcore.mcore.platform.cpu_attention import CpuAttention
from tropd_mcore.mcore.platform.cpu_norm import CpuRMSNorm

VALIDATED_MEGATRON = ("0.16.",)
"""megatron-core releases on which tests/dist has passed with this platform."""


class CpuPlatform:
    """gloo and the local layer spec. Raises ConfigError on a CUDA machine or an unvalidated megatron-core."""

    name: Literal["cpu", "cuda"] = "cpu"
    backend = "gloo"
    device = torch.device("cpu")

    def __init__(self) -> None:
        version = megatron.core.__version__
        if torch.cuda.is_available():
            problem = (
                "platform.kind = cpu: torch sees a GPU, and the CPU platform replaces parts of torch.cuda; "
                "hide it (CUDA_VISIBLE_DEVICES=) or set platform.kind=cuda"
            )
            raise ConfigError([problem])
        if not version.startswith(VALIDATED_MEGATRON):
            wanted = " or ".join(f"{release}x" for release in VALIDATED_MEGATRON)
            raise ConfigError(
                [f"platform.kind = cpu: validated with megatron-core {wanted}, found {version}; install {wanted}"]
            )

    def activate(self) -> None:
        """Install the replacements for the calling thread (see `cpu_device`). A second call does nothing."""
        if cpu_device.is_active():
            return
        cpu_random.install()
        cpu_adam.install()
        cpu_device.install()

    def layer_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Return Megatron's local layers with our attention and norm."""
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        layer.submodules.input_layernorm = CpuRMSNorm
        layer.submodules.pre_mlp_layernorm = CpuRMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CpuAttention
        attention.q_layernorm = attention.k_layernorm = CpuRMSNorm if config.qk_layernorm else IdentityOp
        count = get_num_layers_to_build(config, vp_stage=vp_stage)
        return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=CpuRMSNorm)

    def config_defaults(self) -> dict[str, Any]:
        """Switch every fusion off: each one is a CUDA kernel or uses torch.compile."""
        return {
            "apply_rope_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
        }

    def empty_cache(self) -> None:
        """Nothing: a server on the CPU keeps its memory."""

    def prepare_training(self, module: torch.nn.Module) -> None:
        """Nothing: the data-parallel wrapper adds each gradient to a float32 buffer."""
