"""Where the job runs: the one place that knows whether tensors live on a GPU or on a CPU.

Not for the parallel layout (`mcore.parallel`) or for the model (`mcore.model`). Invariant: a platform is chosen once,
from the configuration, and logged; no other module asks which one it is. A module of a platform is imported only when
that platform is chosen, so the cuda path never imports a patch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from tropd_mcore.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

logger = logging.getLogger(__name__)

PlatformKind = Literal["auto", "cpu", "cuda"]


class Platform(Protocol):
    """What Megatron needs to know of the machine."""

    name: Literal["cpu", "cuda"]
    """`cpu` or `cuda`."""
    device: torch.device
    """Where this rank's parameters, activations and micro-batches live."""
    backend: str
    """torch.distributed backend of the collectives on `device`: `gloo` or `nccl`."""

    def activate(self) -> None:
        """Prepare the process; called once, by the thread that trains, before any process group or model."""

    def layer_spec(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """Return the modules that the transformer layers of one model chunk are built from."""

    def config_defaults(self) -> dict[str, Any]:
        """Return the TransformerConfig fields (kernel fusions) that depend on the machine."""

    def prepare_training(self, module: torch.nn.Module) -> None:
        """Have the layers of a model that will be trained add up their weight gradients in float32."""


def meant(kind: PlatformKind) -> Literal["cpu", "cuda"]:
    """Return what `platform.kind` means on this machine: `auto` is cuda where torch sees a GPU, else cpu."""
    if kind != "auto":
        return kind
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(kind: PlatformKind, local_rank: int = 0) -> Platform:
    """Return the platform that `platform.kind` asks for.

    `local_rank` is this rank's index on its machine, which is its GPU. Raises ConfigError where the platform cannot
    work on this machine.
    """
    platform: Platform
    if meant(kind) == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(["platform.kind = cuda: torch sees no GPU on this machine; set platform.kind=cpu"])
        from tropd_mcore.mcore.platform.cuda import CudaPlatform

        platform = CudaPlatform(local_rank)
    else:
        from tropd_mcore.mcore.platform.cpu import CpuPlatform

        platform = CpuPlatform()
    logger.info("platform: %s (platform.kind = %s), backend %s", platform.name, kind, platform.backend)
    return platform
