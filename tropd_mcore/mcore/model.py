"""Builds a sharded GPTModel, student or teacher, from an `Architecture`. Only this file uses Megatron's model builder.

This module does not load weights (`weights_io`). The matrices of a new model are NaN, so a model that was never loaded
cannot train. Invariants: the student is wrapped for data parallelism with float32 gradients. A teacher is frozen and in
eval mode. Columns of the padded vocabulary at or above `Architecture.vocab_size` belong to no token.

A teacher shares only the process groups of the job with the student. Its sizes and its vocabulary padding are separate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import OptimizerConfig, ParallelConfig
from tropd_mcore.errors import ModelError
from tropd_mcore.kernel.shard import VocabShard
from tropd_mcore.mcore.checks import check_transformer_config
from tropd_mcore.mcore.head import OutputLayerTap
from tropd_mcore.mcore.offload import HostWeights
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.platform import Platform
from tropd_mcore.weights.architecture import Architecture, cut_problems, frozen_cut_problems, layers_of_stages

Recompute = Literal["none", "selective", "full"]

VOCABULARY_MULTIPLE = 128
"""Each tensor rank's vocabulary shard is a multiple of this, as in Megatron's own trainer."""

# Constants that Megatron fixes in its llama3 rotary scaling; only the factor is a parameter.
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

_TORCH_DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """One rank's part of a model."""

    model_chunks: list[GPTModel | DistributedDataParallel]
    """One chunk per virtual stage; wrapped in DistributedDataParallel if the model is trainable."""
    config: TransformerConfig
    arch: Architecture
    shard: VocabShard
    """Columns of the logits that this tensor rank computes."""
    padded_vocab_size: int
    layout: Layout
    platform: Platform
    trainable: bool
    head: OutputLayerTap | None
    """Selects the supervised positions; None if this rank has no output layer."""
    host: HostWeights | None = None
    """Weights of a frozen model that is on the device only while it is asked (`offloaded`); None = always there."""

    @property
    def modules(self) -> list[GPTModel]:
        """The chunks without their data-parallel wrapper."""
        return [chunk.module if self.trainable else chunk for chunk in self.model_chunks]


def offloaded(model: Model) -> Model:
    """Return the loaded, frozen `model` with its weights in host memory. `resident` brings them back."""
    assert not model.trainable, "the optimizer needs a trained model's weights"
    parameters = [parameter for module in model.modules for parameter in module.parameters()]
    return replace(model, host=HostWeights(parameters, model.platform.device))


def resident(model: Model) -> AbstractContextManager[None]:
    """Return a block in which the weights of `model` are on its device."""
    return nullcontext() if model.host is None else model.host.resident()


def padded_vocabulary(vocab_size: int, tp_size: int) -> int:
    """Return the smallest multiple of 128 * tp_size that holds `vocab_size` columns."""
    multiple = VOCABULARY_MULTIPLE * tp_size
    return -(-vocab_size // multiple) * multiple


def build_model(
    arch: Architecture,
    parallel: ParallelConfig,
    layout: Layout,
    platform: Platform,
    *,
    dtype: Dtype,
    trainable: bool,
    recompute: Recompute = "none",
    recompute_modules: Sequence[str] = ("mlp",),
    recompute_layers: int | None = None,
    optimizer: OptimizerConfig | None = None,
    cut_like_student: bool = False,
    stage_layers: Sequence[int] | None = None,
) -> Model:
    """Build this rank's chunks on the platform's device, with weights that are not yet loaded.

    `recompute` and the two arguments after it are the keys of the section `student`. `optimizer` sets how the student's
    gradients are reduced; it is required if `trainable`. A teacher is interleaved only with `cut_like_student`;
    otherwise `parallel.virtual_pipeline` does not apply to it, and its layers need not divide over the stages:
    `stage_layers` are those of each stage (None = as even as possible). Raises ModelError if the architecture cannot be
    divided as `parallel` asks.
    """
    own_cut = not (trainable or cut_like_student)
    virtual_pipeline = None if own_cut or layout.vpp_size == 1 else layout.vpp_size
    problems = (
        frozen_cut_problems(arch, parallel, stage_layers) if own_cut else cut_problems(arch, parallel, virtual_pipeline)
    )
    if problems:
        raise ModelError("; ".join(problems))
    recomputed = _recomputed(recompute, recompute_modules, recompute_layers)
    config = _transformer_config(arch, layout, platform, _TORCH_DTYPES[dtype], recomputed, virtual_pipeline)
    uneven = own_cut and _cut_unevenly(config, stage_layers or layers_of_stages(arch.num_layers, layout.pp_size))
    _set_yarn(config, arch)
    check_transformer_config(config)
    padded = padded_vocabulary(arch.vocab_size, layout.tp_size)
    # Megatron asks for the chunk's number in an uneven cut if any model of the process is interleaved.
    stages = ([0] if uneven else [None]) if virtual_pipeline is None else list(range(virtual_pipeline))
    modules = [_chunk(arch, config, layout, platform, padded, vp_stage) for vp_stage in stages]
    head = None
    if modules[-1].post_process:
        head = OutputLayerTap(modules[-1], layout.groups.tp, layout.sequence_parallel)
    if trainable:
        assert optimizer is not None, "a trainable model needs the optimizer section"
        for module in modules:
            platform.prepare_training(module)
        chunks = _wrap(modules, config, optimizer)
    else:
        chunks = [module.requires_grad_(False).eval() for module in modules]
    width = padded // layout.tp_size
    shard = VocabShard(start=layout.tp_rank * width, stop=(layout.tp_rank + 1) * width, vocab_size=arch.vocab_size)
    return Model(chunks, config, arch, shard, padded, layout, platform, trainable, head)


def _transformer_config(
    arch: Architecture,
    layout: Layout,
    platform: Platform,
    dtype: torch.dtype,
    recomputed: dict[str, Any],
    virtual_pipeline: int | None,
) -> TransformerConfig:
    interleaved = virtual_pipeline is not None
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method=_not_loaded,
        output_layer_init_method=_not_loaded,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        # Other values make interleaved stages exchange wrong tensors without an error (see `checks`).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved,
        **recomputed,
        **platform.config_defaults(),
    )


def _recomputed(recompute: Recompute, modules: Sequence[str], layers: int | None) -> dict[str, Any]:
    """Return the TransformerConfig fields of what is recomputed.

    Megatron's module `layernorm` is not offered: in Transformer Engine's layers a norm belongs to the matrix product
    after it, so Megatron finds none to recompute.
    """
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
    if recompute == "full" and layers is not None:
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {}


def _cut_unevenly(config: TransformerConfig, stage_layers: Sequence[int]) -> bool:
    """Give each pipeline stage its number of layers; returns False, and does nothing, if all have the same number."""
    if len(set(stage_layers)) == 1:
        return False
    stages = [[LayerType.decoder] * count for count in stage_layers]
    stages[0].insert(0, LayerType.embedding)
    stages[-1].append(LayerType.loss)
    cut = PipelineParallelLayerLayout(stages, config.pipeline_model_parallel_size)
    cut.validate_layer_layout(config.num_layers, config.mtp_num_layers)
    config.pipeline_model_parallel_layout = cut
    return True


def _chunk(
    arch: Architecture,
    config: TransformerConfig,
    layout: Layout,
    platform: Platform,
    padded_vocab_size: int,
    vp_stage: int | None,
) -> GPTModel:
    vpp_size = config.virtual_pipeline_model_parallel_size or 1
    return GPTModel(
        config=config,
        transformer_layer_spec=platform.layer_spec(config, vp_stage),
        vocab_size=padded_vocab_size,
        max_sequence_length=arch.max_position_embeddings,
        pre_process=layout.is_first_stage and vp_stage in (None, 0),
        post_process=layout.is_last_stage and vp_stage in (None, vpp_size - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="yarn" if _is_yarn(arch) else "rope",
        rotary_base=arch.rope_theta,
        **_rope_scaling(arch),
        vp_stage=vp_stage,
    )


def _rope_scaling(arch: Architecture) -> dict[str, Any]:
    """Return GPTModel's arguments for the rope scaling of `arch`. Raises ModelError if Megatron does not support it."""
    scaling = arch.rope_scaling
    if scaling is None or _is_yarn(arch):  # for yarn see `_set_yarn`
        return {}
    if scaling["rope_type"] == "linear":
        return {"seq_len_interpolation_factor": float(scaling["factor"])}
    if scaling["rope_type"] != "llama3":
        raise ModelError(f"rope_type {scaling['rope_type']!r} of {arch.family}: supported are linear, llama3 and yarn")
    other = {key: scaling[key] for key, fixed in _LLAMA3_FIXED.items() if scaling[key] != fixed}
    if other:
        raise ModelError(f"llama3 rope scaling with {other}: megatron-core computes it with {_LLAMA3_FIXED} only")
    return {"rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}


def _is_yarn(arch: Architecture) -> bool:
    return arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "yarn"


def _set_yarn(config: TransformerConfig, arch: Architecture) -> None:
    """Set the attributes that GPTModel and the attention read for yarn. They are no fields of TransformerConfig.

    Megatron has no attention factor of its own. It computes (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor
    + 1), so mscale is chosen to give ours.
    """
    if not _is_yarn(arch):
        return
    assert arch.rope_scaling is not None
    scaling, growth = arch.rope_scaling, 0.1 * math.log(arch.rope_scaling["factor"])
    values = {
        "rotary_scaling_factor": scaling["factor"],
        "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "beta_fast": scaling["beta_fast"],
        "beta_slow": scaling["beta_slow"],
        "mscale": (scaling["attention_factor"] - 1.0) / growth if growth else 0.0,
        "mscale_all_dim": 0.0,
        "correction_range_round_to_int": scaling["truncate"],
    }
    for name, value in values.items():
        setattr(config, f"yarn_{name}", value)
    config.apply_rope_fusion = False  # the fused kernel for packed samples leaves the attention factor out


@torch.no_grad()
def _not_loaded(weight: Tensor) -> Tensor:
    """Initialise a matrix with NaN.

    `perform_initialization=False` is not used, because it would also skip the attributes that Megatron sets on it.
    """
    return weight.fill_(float("nan"))


def _wrap(
    modules: list[GPTModel], config: TransformerConfig, optimizer: OptimizerConfig
) -> list[DistributedDataParallel]:
    """Wrap the chunks for data parallelism and tell Megatron's schedules how to finish gradients."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
    )
    chunks = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=module,
            # As in Megatron's trainer: buckets help only the first chunk, whose reduction is on the critical path.
            disable_bucketing=index > 0,
        )
        for index, module in enumerate(modules)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if optimizer.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return chunks
