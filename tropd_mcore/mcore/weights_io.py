"""Copies weights between a Hugging Face folder and a sharded Megatron model, in both directions, one tensor at a time.

This module does not handle optimizer state (`checkpoint`) and does not define how a tensor is sharded
(`weights.mapping`). Invariants: loading fills every parameter and uses every tensor of the folder, or raises. An export
has the same names, order and bytes at every layout. Load a model before building its optimizer, because the optimizer
copies the parameters into its float32 main weights when it is built.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from tropd_mcore.errors import ModelError
from tropd_mcore.mcore.collective import raise_on_all_ranks
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.progress import counted, progress
from tropd_mcore.weights.architecture import check_same_architecture
from tropd_mcore.weights.dense import EMBEDDING, OUTPUT
from tropd_mcore.weights.families import check_mcore_names, rule_by_mcore_name, rules
from tropd_mcore.weights.hf_folder import MAX_SHARD_BYTES, HfReader, write_hf_folder
from tropd_mcore.weights.mapping import Rule, Split, to_hf, to_mcore_shard

log = logging.getLogger(__name__)

_LAYERS = "decoder.layers."


@torch.no_grad()
def load_hf(model: Model, folder: Path, layout: Layout) -> None:
    """Fill the parameters of `model` from a Hugging Face folder. Each rank reads only the slices that it holds.

    If the folder has another dtype, values are rounded to the model's. Collective over all ranks. Raises ModelError if
    the folder is damaged or describes another architecture, or if its tensors do not match the model's parameters.
    """
    with HfReader(folder) as reader:
        check_same_architecture(reader.arch, model.arch, source=str(folder))
        reader.check()
        _gather_owners(model, layout)
        by_name, parameters = rule_by_mcore_name(model.arch), named_parameters(model)
        with progress(log, f"loading {folder}", total=len(parameters), unit="tensors", amount_unit="B") as state:
            for name, parameter in parameters.items():
                shard = _read_shard(by_name[name], reader, model, layout)
                if shard.shape != parameter.shape:
                    raise ModelError(f"{name}: expected shape {tuple(parameter.shape)}, found {tuple(shard.shape)}")
                parameter.copy_(shard)
                state.advance(amount=shard.nbytes)


@torch.no_grad()
def iterate_hf(model: Model, layout: Layout, *, on_device: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of every weight on global rank 0, and nothing on the other ranks.

    Names, shapes and order are those of `weights.families.hf_weight_plan`; the dtype is the model's. Collective: every
    rank must exhaust the iterator. Tensor shards are gathered on the first tensor rank of their stage, which sends the
    full tensor to rank 0. Only the first data and context replica takes part. Rank 0 holds one parameter at a time.

    The tensors are copies on the CPU. With `on_device` they stay on the device of the model. Some are then parameters
    themselves: do not write to them, and use them before the next optimizer step.
    """
    synchronize_parameters(model)
    owners = _gather_owners(model, layout)
    if layout.dp_rank != 0 or layout.cp_rank != 0:
        return
    parameters = named_parameters(model)
    for rule in rules(model.arch):
        if not rule.exported:
            continue
        owner, name = next((owners[name], name) for name in rule.mcore_names if name in owners)
        full = _gather_tensor_ranks(rule, parameters[name], model, layout) if layout.pp_rank == owner else None
        if layout.tp_rank != 0:
            continue
        for hf_name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            tensor = _to_first_stage(full[hf_name] if full else None, shape, owner, model, layout)
            if layout.rank == 0:
                assert tensor is not None, "rank 0 is on the first stage, which receives every weight"
                yield hf_name, tensor if on_device else tensor.to("cpu", copy=True)


def export_hf(
    model: Model, layout: Layout, out: Path, *, source_folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model` as a Hugging Face folder from rank 0. Collective.

    Everything except the weights comes from `source_folder`. Raises ModelError like `write_hf_folder`, on every rank.
    """
    count = sum(len(rule.hf_names) for rule in rules(model.arch) if rule.exported)
    with (
        progress(log, f"writing {out}", total=count, unit="tensors") as state,
        raise_on_all_ranks(layout.groups.control),
    ):
        weights = counted(iterate_hf(model, layout), state)
        try:
            if layout.rank == 0:
                write_hf_folder(out, weights, source_folder=source_folder, max_shard_bytes=max_shard_bytes)
        finally:
            deque(weights, maxlen=0)  # exhaust it on every rank, also after an error on rank 0: it holds collectives


def synchronize_parameters(model: Model) -> None:
    """Finish a pending all-gather of updated parameters (`optimizer.overlap_param_gather`). Collective.

    With that option the parameters stay stale after an optimizer step until the next forward pass gathers them.
    """
    for chunk in model.model_chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def named_parameters(model: Model) -> dict[str, Tensor]:
    """Return {name: parameter} of this rank's chunks, with layers numbered over the whole model.

    Megatron's names count the layers of each chunk from 0, but each layer knows its number in the whole model.
    """
    found: dict[str, Tensor] = {}
    for module in model.modules:
        for name, parameter in module.named_parameters():
            if name.startswith(_LAYERS):
                index, rest = name.removeprefix(_LAYERS).split(".", 1)
                name = f"{_LAYERS}{module.decoder.layers[int(index)].layer_number - 1}.{rest}"
            assert name not in found, f"{name} is in two chunks"
            found[name] = parameter
    return found


def _gather_owners(model: Model, layout: Layout) -> dict[str, int]:
    """Return {parameter name: pipeline stage}, the same on all ranks.

    The copy of a tied embedding on the last stage has its own name. Raises ModelError if a rule has no parameter, or a
    parameter no rule.
    """
    mine = (layout.pp_rank, list(named_parameters(model)))
    everyone: list[tuple[int, list[str]]] = [mine] * layout.world_size
    dist.all_gather_object(everyone, mine, group=layout.groups.control)
    owners = {name: stage for stage, names in everyone for name in names}
    check_mcore_names(owners, model.arch, source="Megatron model")
    return owners


def _read_shard(rule: Rule, reader: HfReader, model: Model, layout: Layout) -> Tensor:
    def read(rule: Rule) -> Tensor:
        return to_mcore_shard(
            rule,
            {name: reader[name] for name in rule.hf_names},
            model.arch,
            tp_rank=layout.tp_rank,
            tp_size=layout.tp_size,
            padded_vocab=model.padded_vocab_size,
        )

    shard = read(rule)
    stored_twice = model.arch.tied_embeddings and rule.hf_names == (EMBEDDING,) and OUTPUT in reader.names()
    if stored_twice and not torch.equal(shard, read(replace(rule, hf_names=(OUTPUT,)))):
        raise ModelError(
            f"model folder {reader.folder}: config.json says tie_word_embeddings, but {OUTPUT} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false, or remove {OUTPUT}"
        )
    return shard


def _gather_tensor_ranks(rule: Rule, parameter: Tensor, model: Model, layout: Layout) -> dict[str, Tensor] | None:
    """Return full Hugging Face tensors on tensor rank 0 of this stage, on the device; None on its other ranks."""
    shard = parameter.detach().contiguous()
    assert shard.dtype == model.config.params_dtype, f"{rule.mcore_names}: {shard.dtype} in a model of another dtype"
    if layout.tp_size == 1 or rule.split is Split.REPLICATED:
        return to_hf(rule, [shard], model.arch)
    if layout.tp_rank != 0:
        dist.gather(shard, None, group=layout.groups.tp, group_dst=0)
        return None
    shards = [torch.empty_like(shard) for _ in range(layout.tp_size)]
    dist.gather(shard, shards, group=layout.groups.tp, group_dst=0)
    return to_hf(rule, shards, model.arch)


def _to_first_stage(
    tensor: Tensor | None, shape: tuple[int, ...], owner: int, model: Model, layout: Layout
) -> Tensor | None:
    """Return the tensor of stage `owner` on the device of stage 0; None on the other stages."""
    if owner != 0 and layout.pp_rank == owner:
        assert tensor is not None
        dist.send(tensor.contiguous(), group=layout.groups.pp, group_dst=0)
    if layout.pp_rank != 0:
        return None
    if owner != 0:
        tensor = torch.empty(shape, dtype=model.config.params_dtype, device=model.platform.device)
        dist.recv(tensor, group=layout.groups.pp, group_src=owner)
    assert tensor is not None
    return tensor
