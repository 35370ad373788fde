"""The whole loss on a GPU, through NCCL: no host sync, repeatable bits, the results of a float64 run.

How to run: see test_kernel_on_cuda. One rank, so that the collectives are real but have nothing to sum.

Shapes: T tokens, V vocabulary, J support ids, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from tests.objective_batch import STUDENT_TOPK, TOPK, Batch
from tropd_mcore.config.objectives import KINDS as SECTIONS
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.kernel.backend import Backend, Kernel
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.source import GivenLogits, LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import TokenLoss, WeightGradientMode, support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.kernel.triton_backend import TritonBackend
from tropd_mcore.objectives.inputs import TokenInputs
from tropd_mcore.objectives.registry import bind_objective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE, COLLECTIVES = "cuda", "nccl"
TOKENS, WIDTH, VOCABULARY, HIDDEN = 300, 5_008, 5_000, 256
DISTINCT = (1, TOPK, STUDENT_TOPK)
MODES = ("deferred", "folded", "recompute")
KINDS = sorted(SECTIONS.keys() - {"custom"})
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group(COLLECTIVES, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextmanager
def no_host_sync() -> Iterator[None]:
    """An operation that waits for the GPU raises. Code that compiles or initialises must have run before."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] and weight [V, D], whose logits have a standard deviation of 3."""
    random = torch.Generator().manual_seed(1)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=random)
    weight_VD = 3.0 * HIDDEN**-0.5 * torch.randn(WIDTH, HIDDEN, generator=random)
    # Values rounded to bfloat16 are exact in float64.
    return hidden_TD.bfloat16().to(DEVICE, dtype), weight_VD.bfloat16().to(DEVICE, dtype)


def constants(dtype: torch.dtype) -> TokenInputs:
    """The values of teacher, sampler and the pass before the update for each token."""
    given = Batch(tokens=TOKENS, moved=0.1).inputs()
    moved = {
        field.name: value.detach().to(DEVICE, dtype if value.is_floating_point() else value.dtype)
        for field in fields(given)
        if isinstance(value := getattr(given, field.name), Tensor)
    }
    return replace(given, **moved)


def objective_loss(kind: str, dtype: torch.dtype) -> tuple[Tensor, TokenLoss]:
    """Support ids and token loss of an objective with the default keys of its section."""
    config: Any = TypeAdapter(ObjectiveConfig).validate_python({"kind": kind})
    objective, given = bind_objective(config), constants(dtype)
    ids_TJ = torch.cat([given.target_ids_T[:, None], given.topk_ids_TK, given.own_ids_TL], dim=1)

    def token_loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        cut = {
            field.name: value[rows]
            for field in fields(given)
            if isinstance(value := getattr(given, field.name), Tensor)
        }
        sampled_C1, topk_CK, own_CL = logp_CJ.split(DISTINCT, dim=1)
        student = {
            "student_logp_T": sampled_C1[:, 0],
            "student_topk_logp_TK": topk_CK,
            "student_own_logp_TL": own_CL,
            "student_entropy_T": entropy_C,
            "divergence_T": entropy_C,  # stands in for a divergence over the whole vocabulary
        }
        return objective(replace(given, **{**cut, **student}))

    return ids_TJ, token_loss


def prepared(
    kind: str = "tropd",
    *,
    form: str = "fused",
    mode: WeightGradientMode = "deferred",
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
    overlap: bool = False,
) -> Callable[[], Gradients]:
    """A function that runs forward and backward pass on the GPU. Each call starts from the same values."""
    assert dist.group.WORLD is not None
    kernel = Kernel(
        shard=VocabShard(0, WIDTH, VOCABULARY),
        group=dist.group.WORLD,
        backend=backend or TritonBackend(),
        scaling=Scaling(0.7),
        chunk_tokens=128,
        overlap=overlap,
    )
    hidden_TD, weight_VD = operands(dtype)
    ids_TJ, token_loss = objective_loss(kind, torch.float64 if dtype == torch.float64 else torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run() -> Gradients:
        hidden, weight = hidden_TD.clone().requires_grad_(True), weight_VD.clone().requires_grad_(True)
        source: LogitSource = OutputLayer(hidden, weight)
        if form == "logits":
            source = GivenLogits((hidden_TD @ weight_VD.T).requires_grad_(True))
        else:
            weight.main_grad = torch.zeros_like(weight, dtype=wide, requires_grad=False)  # type: ignore[attr-defined]
        output = support_loss(source, ids_TJ, token_loss, kernel, unique_run_lengths=DISTINCT, weight_gradient=mode)
        output.loss_sum.backward()
        found = {"loss": output.loss_sum.detach()}
        if isinstance(source, GivenLogits):
            assert source.logits_TW.grad is not None
            return found | {"logits": source.logits_TW.grad}
        assert hidden.grad is not None
        return found | {"hidden": hidden.grad, "weight": weight.main_grad}  # type: ignore[attr-defined]

    return run


@pytest.mark.parametrize("form", ["fused", "logits"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_loss_and_its_gradients_never_wait_for_the_gpu(form: str, mode: WeightGradientMode, overlap: bool) -> None:
    run = prepared(form=form, mode=mode, overlap=overlap)
    run()
    with no_host_sync():
        run()


@pytest.mark.parametrize("kind", KINDS)
def test_no_objective_waits_for_the_gpu(kind: str) -> None:
    run = prepared(kind)
    run()
    with no_host_sync():
        run()


def test_the_sync_check_detects_a_host_sync() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        torch.ones((), device=DEVICE).item()


@pytest.mark.parametrize("form", ["fused", "logits"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_on_cuda_are_bit_identical_in_a_second_run(form: str, mode: WeightGradientMode) -> None:
    run = prepared(form=form, mode=mode)
    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["fused", "logits"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 2.0**-7)]
)
def test_loss_and_gradients_on_cuda_equal_eager_in_float64(
    form: str, mode: WeightGradientMode, dtype: torch.dtype, tolerance: float
) -> None:
    """Errors relative to the largest entry. The objective has no gate, because rounding could open or close it."""
    if form == "logits" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 logits are other numbers than those of float64")
    found = prepared("vopd", form=form, mode=mode, dtype=dtype)()
    right = prepared("vopd", form=form, mode=mode, dtype=torch.float64, backend=EagerBackend())()
    assert found.keys() == right.keys()
    for name, expected in right.items():
        error = (found[name].double() - expected).abs().max() / expected.abs().max()
        assert float(error) <= tolerance, f"{name}: {float(error)}"
