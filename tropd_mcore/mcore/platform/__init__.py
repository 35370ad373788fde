"""The platform of the job: only this package knows whether tensors live on a GPU or on a CPU.

This package does not define the parallel layout (`mcore.parallel`) or the model (`mcore.model`). Invariant: the
platform is chosen once, from the configuration, and logged. No other module asks which platform it is. The module of a
platform is imported only if that platform is chosen, so the cuda path never imports a patch.
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
    """Properties of the machine that Megatron needs."""

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

    def empty_cache(self) -> None:
        """Return memory that torch's allocator holds and no tensor uses, so that another process can have it."""

    def prepare_training(self, module: torch.nn.Module) -> None:
        """Have the layers of a model that will be trained add up their weight gradients in float32."""


def meant(kind: PlatformKind) -> Literal["cpu", "cuda"]:
    """Resolve `platform.kind` on this machine: `auto` is cuda if torch sees a GPU, otherwise cpu."""
    if kind != "auto":
        return kind
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(kind: PlatformKind, local_rank: int = 0) -> Platform:
    """Return the platform that `platform.kind` asks for.

    `local_rank` is this rank's index on its machine and the index of its GPU. Raises ConfigError if the platform cannot
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
