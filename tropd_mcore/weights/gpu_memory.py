"""Estimates the memory of a job per GPU, part by part, from the configuration and the shapes of the models.

Nothing is measured or allocated here. Invariant: each part is that of the GPU that needs most of it, so the sum is an
upper estimate. Activations were compared with one H200: within 15 % (docs/gpu.md, `tests/unit/test_gpu_memory.py`).
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from tropd_mcore.config.derived import chunk_tokens, reference_path
from tropd_mcore.config.fields import Dtype
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.teachers import teachers_of
from tropd_mcore.weights.architecture import Architecture
from tropd_mcore.weights.families import hf_weight_plan

GIB = 2**30
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}
MOMENT_BYTES = 8
"""Bytes per parameter in the optimizer: two float32 moments."""
MAIN_BYTES = 4
"""Bytes per parameter of a float32 main weight (of a bfloat16 student) or gradient."""
CANDIDATE_BYTES = 12
"""Bytes of a teacher candidate on the device: token id as int64, log-prob as float32."""
OWN_BYTES = 3 * GIB
"""CUDA context, NCCL and workspaces of a rank. A rough figure, not measured."""


def rank_memory(config: Config, models: dict[str, Architecture], ranks: int) -> dict[str, int]:
    """Return {part: bytes} of a rank of a job of `ranks`. `models` has the architectures by the keys of their folders.

    `ranks` must be a multiple of tensor * pipeline * context.
    """
    parallel, student = config.parallel, models["student.path"]
    own = stage_parameters(student, config)
    replicas = ranks // (parallel.tensor * parallel.pipeline)
    dtype = DTYPE_BYTES[config.student.dtype]
    state = own * (MOMENT_BYTES + (MAIN_BYTES if config.student.dtype != "float32" else 0))
    found = {
        "weights": own * dtype,
        "gradients": own * MAIN_BYTES,
        "optimizer": state // replicas if config.optimizer.distributed else state,
        "activations": activations(student, config),
        "loss": _loss(student, config),
        "scores": _scores(config, ranks),
    }
    if config.objective.self_teaching is not None:
        found["average"] = own * DTYPE_BYTES[config.teacher.dtype]
    elif config.objective.reads_teacher:
        found |= _teachers(config, models)
    if reference_path(config) is not None:
        found["reference"] = stage_parameters(models["objective.reference"], config) * dtype
    return {**found, "context": OWN_BYTES}


def _teachers(config: Config, models: dict[str, Architecture]) -> dict[str, int]:
    """Bytes of the weights of each teacher in the job. One that is copied to the GPU while it scores has the room of
    the largest such teacher, because they score one after the other."""
    found, visiting = {}, 0
    for teacher in teachers_of(config):
        if teacher.served:
            continue
        size = stage_parameters(models[teacher.path_key], config) * DTYPE_BYTES[teacher.config.dtype]
        if teacher.name is not None and teacher.config.offload:
            visiting = max(visiting, size)
        else:
            found["teacher" if teacher.name is None else f"teacher {teacher.name}"] = size
    return {**found, "teacher that scores": visiting} if visiting else found


def stage_parameters(arch: Architecture, config: Config) -> int:
    """Return the parameters of a rank on the pipeline stage with most of them, one with the embedding or the output
    layer."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    shapes = hf_weight_plan(arch)
    layers = sum(prod(shape) for name, shape in shapes if ".layers." in name)
    both = pipeline == 1 and not arch.tied_embeddings
    return (layers // pipeline + arch.vocab_size * arch.hidden_size * (2 if both else 1)) // tensor


def activations(arch: Architecture, config: Config) -> int:
    """Return the bytes that the backward pass needs of the micro-batches in flight on the first stage.

    Per token and layer, attention keeps its input, the norm of it, q, k, v, their norms and rotated forms, its output
    and the sum with the residual. The MLP keeps the norm of its input, both halves of the first product, and the input
    of the second. This is what Transformer Engine's fused attention and norms keep; unfused attention keeps all scores
    as well.
    """
    parallel, student = config.parallel, config.student
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    normed = query + key if arch.qk_norm else 0
    whole = parallel.tensor if parallel.sequence_parallel else 1
    hidden = arch.hidden_size / whole
    attention = 3 * hidden + (query + 2 * key + normed + query + key + query) / parallel.tensor
    mlp = hidden + 3 * arch.ffn_hidden_size / parallel.tensor
    layer, layers = attention + mlp, arch.num_layers
    # a full pipeline holds as many micro-batches as stages, on the first stage
    chunks = parallel.virtual_pipeline or 1
    in_flight = 1 + (parallel.pipeline - 1) / (parallel.pipeline * chunks) if chunks > 1 else 1.0
    kept = layers * layer
    if student.recompute == "selective" and "mlp" in student.recompute_modules:
        kept = layers * attention + mlp
    elif student.recompute == "full":
        stage = layers // parallel.pipeline
        redone = min(student.recompute_layers or stage, stage) * parallel.pipeline
        kept = (layers - redone) * layer + redone * hidden + layer
    tokens = config.batch.tokens_per_micro_batch / parallel.context
    return int(tokens * kept * in_flight * DTYPE_BYTES[student.dtype])


def _loss(arch: Architecture, config: Config) -> int:
    """Bytes of the logits: of a chunk, or of all tokens of a micro-batch if the model computes them."""
    columns = arch.vocab_size / config.parallel.tensor
    tokens = config.batch.tokens_per_micro_batch / config.parallel.context
    if config.loss.form == "logits":
        return int(tokens * columns * DTYPE_BYTES[config.student.dtype])
    return int(min(chunk_tokens(config), tokens) * columns * 4 * (2 if config.loss.overlap_chunks else 1))


def _scores(config: Config, ranks: int) -> int:
    """Bytes of the teacher's candidates of a step on a rank of the last stage, if every response is as long as it may
    be."""
    parallel, rollout = config.parallel, config.rollout
    data = max(ranks // (parallel.tensor * parallel.pipeline), 1)  # context ranks share the rows of a pack
    rows = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_new_tokens
    return rows * config.objective.teacher_topk * CANDIDATE_BYTES // data


def file_memory(folder: Path, server: ServerConfig) -> dict[str, int]:
    """Return {part: bytes} per GPU of a server whose model no mapping describes: its weights as they are on disk."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"weights, as on disk": size // server.tensor_parallel}


def server_memory(arch: Architecture, server: ServerConfig, dtype: Dtype) -> dict[str, int]:
    """Return {part: bytes} of a server per GPU: weights, and the KV cache if its size is given in tokens.

    `dtype` is that of its model. Its context, CUDA graphs and workspaces come on top.
    """
    size = DTYPE_BYTES[server.dtype or dtype]
    heads = max(arch.num_kv_heads // server.tensor_parallel, 1)  # with more ranks than heads, several hold the same
    found = {"weights": sum(prod(shape) for _, shape in hf_weight_plan(arch)) * size // server.tensor_parallel}
    if server.max_total_tokens is not None:
        found["KV cache"] = 2 * arch.num_layers * heads * arch.head_dim * size * server.max_total_tokens
    return found
