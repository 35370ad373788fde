"""What the rank of the Transformer Engine tests runs: our trainer's parts on NCCL and one GPU. Not a test.

Does not import transformers. `Pool` starts the process with a group on gloo, which gives way to one on NCCL.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.layouts import Case, Constants, build, gather_results, layout_of, pack_for, train_step
from tropd_mcore.kernel.source import OutputLayer
from tropd_mcore.mcore import checkpoint
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.model import Model
from tropd_mcore.mcore.optimizer import build_optimizer, optimizer_step
from tropd_mcore.mcore.parallel import Layout
from tropd_mcore.mcore.pipeline import run_pipeline
from tropd_mcore.mcore.weights_io import export_hf, iterate_hf, named_parameters
from tropd_mcore.types import MicroBatch, Rollout


@contextmanager
def job_on_nccl(case: Case) -> Iterator[tuple[Layout, Any]]:
    """A job of this one rank."""
    if dist.is_initialized() and dist.get_backend() != "nccl":
        dist.destroy_process_group()
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    with layout_of(case, "cuda") as job:
        yield job


def exact_gradients(model: Model, layout: Layout) -> dict[str, Tensor]:
    """{Hugging Face name: gradient} in float32 on the CPU: the buffers are exported in place of the weights."""
    parameters, dtype = named_parameters(model), model.config.params_dtype
    weights = {name: parameter.data for name, parameter in parameters.items()}
    try:
        model.config.params_dtype = torch.float32
        for parameter in parameters.values():
            parameter.data = parameter.main_grad.detach().view(parameter.shape)  # type: ignore[attr-defined]
        return dict(iterate_hf(model, layout))
    finally:
        model.config.params_dtype = dtype
        for name, parameter in parameters.items():
            parameter.data = weights[name]


def engine_layers(model: Model) -> list[Any]:
    """Modules of Transformer Engine that have a weight gradient to add."""
    return [part for module in model.modules for part in module.modules() if hasattr(part, "fuse_wgrad_accumulation")]


def step_of_case(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants
) -> dict[str, Any]:
    """One step, with gradients in float32 and what the model is made of."""
    with job_on_nccl(case) as (layout, platform):
        student = build(student_folder, case, layout, platform, trainable=True)
        teacher = build(teacher_folder, case, layout, platform, trainable=False)
        packed, results, _ = train_step(student, teacher, rollouts, case, constants)
        found = gather_results(layout, packed, results)
        found["gradients"] = exact_gradients(student, layout)
        found["fused"] = [part.fuse_wgrad_accumulation for part in engine_layers(student)]
        found["teacher_fused"] = [part.fuse_wgrad_accumulation for part in engine_layers(teacher)]
        found["main_grad_dtypes"] = {p.main_grad.dtype for p in named_parameters(student).values()}
        found["backend"] = dist.get_backend(layout.groups.dp)
    return found


def exported(folder: Path, out: Path, case: Case) -> None:
    """Load and export."""
    with job_on_nccl(case) as (layout, platform):
        export_hf(build(folder, case, layout, platform, trainable=False), layout, out, source_folder=folder)


def sum_of_hidden(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> tuple[Tensor, Tensor, None]:
    """A loss with a token count of one, so that nothing divides the gradients."""
    weights_T = torch.arange(1, layer.tokens + 1, device=layer.hidden_TD.device) / (layer.tokens * (index + 1))
    total = (layer.hidden_TD.float().sin() * weights_T[:, None]).sum()
    one = torch.ones((), dtype=torch.int32, device=total.device)
    return total + 0.0 * layer.weight_WD.float()[:0].sum(), one if index == 0 else one - 1, None


def weight_gradients(folder: Path, rollouts: list[Rollout], case: Case, fused: bool) -> dict[str, dict[str, Tensor]]:
    """Gradients of engine layers: of all micro-batches of a step, and of the first and the others alone."""
    with job_on_nccl(case) as (layout, platform):
        student = build(folder, case, layout, platform, trainable=True)
        for part in engine_layers(student):
            part.fuse_wgrad_accumulation = fused
        packed = pack_for(rollouts, case, layout, platform.device)
        count = len(packed.micro_batches)
        assert count > 2

        def only(chosen: set[int]) -> Callable[..., Any]:
            def loss(layer: OutputLayer, micro_batch: MicroBatch, index: int) -> Any:
                total, counted, nothing = sum_of_hidden(layer, micro_batch, index)
                return total * float(index in chosen), counted, nothing

            return loss

        found = {}
        for name, chosen in {"all": set(range(count)), "first": {0}, "others": set(range(1, count))}.items():
            run_pipeline(student, packed.micro_batches, packed.pack_length, loss=only(chosen), forward_only=False)
            found[name] = {
                key: parameter.main_grad.detach().cpu().clone()  # type: ignore[attr-defined]
                for key, parameter in named_parameters(student).items()
                if "linear" in key and key.endswith("weight") and "layer_norm" not in key
            }
        return found


@dataclass(frozen=True)
class Trained:
    """What steps on the GPU left."""

    norms: list[float]
    weights: dict[str, Tensor]
    allocated: list[int]
    """Bytes after each step."""
    peak: list[int]
    """Bytes, of each step."""
    resumed: dict[str, Tensor]
    """Weights after the same steps, of which the last was made by new parts that read the checkpoint before it."""
    restored: bool
    """The new parts had the weights, the moments and the float32 weights of the checkpoint, bit for bit."""


def trained_and_resumed(
    student_folder: Path, teacher_folder: Path, batches: list[list[Rollout]], case: Case, constants: Constants, at: Path
) -> Trained:
    """One optimizer step a batch; a checkpoint before the last one, from which new parts make it again."""
    with job_on_nccl(case) as (layout, platform):
        teacher = build(teacher_folder, case, layout, platform, trainable=False)

        def new_state() -> TrainState:
            student = build(student_folder, case, layout, platform, trainable=True)
            return TrainState(student, *build_optimizer(student, case.optimizer, len(batches)))

        def step(state: TrainState, number: int) -> float:
            train_step(state.model, teacher, batches[number - 1], case, constants)
            assert state.optimizer is not None and state.scheduler is not None
            norm, updated = optimizer_step(state.model, state.optimizer, state.scheduler, step=number)
            assert updated
            return norm

        state = new_state()
        norms, allocated, peak = [], [], []
        for number in range(1, len(batches) + 1):
            if number == len(batches):
                checkpoint.save(at, number - 1, state, {}, keep=1)
                before = numbers_of(state)
            torch.cuda.reset_peak_memory_stats()
            norms.append(step(state, number))
            allocated.append(torch.cuda.memory_allocated())
            peak.append(torch.cuda.max_memory_allocated())
        weights = dict(iterate_hf(state.model, layout))
        other = new_state()
        checkpoint.load(checkpoint.step_folder(at, len(batches) - 1), other)
        restored = all(map(torch.equal, before, numbers_of(other)))
        step(other, len(batches))
        return Trained(norms, weights, allocated, peak, dict(iterate_hf(other.model, layout)), restored)


def numbers_of(state: TrainState) -> list[Tensor]:
    """Weights, float32 weights and moments, on the CPU."""
    assert state.optimizer is not None
    numbers = [parameter.detach() for parameter in named_parameters(state.model).values()]
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kept = part.optimizer.state[parameter]
                numbers += [parameter.detach(), kept["exp_avg"], kept["exp_avg_sq"]]
    return [number.cpu().clone() for number in numbers]


def versions() -> dict[str, str]:
    """What ran."""
    names = ("torch", "transformer-engine", "megatron-core", "triton", "transformers")
    return {name: importlib.metadata.version(name) for name in names} | {
        "gpu": torch.cuda.get_device_name(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cudnn": str(torch.backends.cudnn.version()),
    }
