"""Refuses Megatron settings that would give wrong numbers, or hang, without an error.

This module does not repeat checks that Megatron makes itself. Invariant: every setting is checked just before it is
used, on every platform, so a CPU test also catches settings of a GPU run. Each check names the measured effect.
"""

from __future__ import annotations

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from tropd_mcore.errors import ConfigError


def check_transformer_config(config: TransformerConfig) -> None:
    """Raise ConfigError for a model configuration that trains on wrong gradients."""
    problems = []
    if config.virtual_pipeline_model_parallel_size is not None:
        if config.batch_p2p_comm or not config.overlap_p2p_comm:
            problems.append(
                "interleaved pipeline: batch_p2p_comm must be False and overlap_p2p_comm True; with the library's "
                "defaults two stages exchange wrong tensors (gradients off by up to 200 times)"
            )
        if config.deallocate_pipeline_outputs:
            problems.append(
                "interleaved pipeline: deallocate_pipeline_outputs must be False; an output is freed while it is still "
                "being sent (measured on gloo: wrong activations in most runs, at times NaN)"
            )
        if config.virtual_pipeline_model_parallel_size < 2:
            problems.append("interleaved pipeline: parallel.virtual_pipeline must be at least 2 (or unset)")
    if not config.calculate_per_token_loss:
        problems.append("calculate_per_token_loss must be True: the loss is a sum, divided once by the token count")
    if config.cross_entropy_loss_fusion:
        problems.append("cross_entropy_loss_fusion must be False: it rounds the gradient of the logits to bfloat16")
    if config.variable_seq_lengths:
        problems.append("variable_seq_lengths must be False: packs of one step have one length")
    if problems:
        raise ConfigError(problems)


def check_optimizer_config(config: OptimizerConfig, overrides: dict[object, object] | None) -> None:
    """Raise ConfigError for an optimizer configuration that updates wrongly."""
    problems = []
    if overrides is None:
        problems.append("config_overrides must be given; otherwise Megatron decides whether norms decay")
    if config.use_precision_aware_optimizer or config.optimizer_cpu_offload:
        problems.append(
            "precision-aware and offloaded optimizers are not supported: the check for finite gradients cannot see "
            "the gradients that they keep"
        )
    if config.fp16:
        problems.append("fp16 is not supported: there is no loss scaling")
    if problems:
        raise ConfigError(problems)
