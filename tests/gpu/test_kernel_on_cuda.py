"""The kernel on a GPU, which the interpreter cannot replace. Run with an NVIDIA GPU and a CUDA build of torch:

    .venv/bin/python -m pytest tests/gpu

The tests need one GPU, about 10 GiB of its memory, and a minute or two. Without a GPU every test is skipped.
tests/run.sh hides all GPUs. No time is measured. Eager in float64 is the oracle here: tests/dist checks it against
equations.

Shapes: T tokens, W width of a vocabulary shard, R its real columns, J support ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from tropd_mcore.kernel.backend import Backend, RowGradient
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.triton_backend import TritonBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
WIDTHS = {"aligned": 19_072, "odd": 19_061, "narrow": 7}
"""Columns of a shard. All but five of them are real."""


@dataclass(frozen=True)
class Rows:
    """The arguments of both passes."""

    logits_TW: Tensor
    row: RowGradient
    shard: VocabShard
    scaling: Scaling

    def out(self, dtype: torch.dtype) -> Tensor:
        """A buffer for a gradient that does not overwrite the logits."""
        return torch.full_like(self.logits_TW, torch.nan, dtype=dtype)


def make_rows(
    width: int,
    dtype: torch.dtype,
    *,
    tokens: int = 300,
    runs: tuple[int, ...] = (1, 64),
    scaling: Scaling | None = None,
    with_entropy: bool = True,
    seed: int = 0,
) -> Rows:
    """Random logits of a shard that is not the first; in half of the rows the first id is also in the second run."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    scaling, start = scaling or Scaling(0.7), 1000
    shard = VocabShard(start, start + width, start + width - 5)
    logits_TW = 3.0 * torch.randn(tokens, width, generator=random, device=DEVICE)
    pools = [torch.rand(tokens, start + width - 5, generator=random, device=DEVICE).argsort(dim=1) for _ in runs]
    ids_TJ = torch.cat([pool_TV[:, :run] for pool_TV, run in zip(pools, runs, strict=True)], dim=1)
    if len(runs) > 1:
        ids_TJ[::2, 0] = ids_TJ[::2, 1]
    ids_TJ[1::4, -2:] = -1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_TJ = torch.randn(ids_TJ.shape, generator=random, device=DEVICE, dtype=wide).masked_fill(ids_TJ == -1, 0.0)
    scaled_TR = scaling.apply_(logits_TW[:, : shard.real_width].to(dtype).double())
    lse_T = scaled_TR.logsumexp(dim=1)
    entropy_T = lse_T - (scaled_TR.softmax(dim=1) * scaled_TR).sum(dim=1)
    grad_entropy_T = torch.randn(tokens, generator=random, device=DEVICE, dtype=wide) if with_entropy else None
    row = RowGradient(ids_TJ, grad_TJ, grad_entropy_T, lse_T.to(wide), entropy_T.to(wide), runs)
    return Rows(logits_TW.to(dtype), row, shard, scaling)


def in_float64(rows: Rows) -> Rows:
    given = {field.name: getattr(rows.row, field.name) for field in fields(rows.row)}
    wide = {name: value.double() for name, value in given.items() if isinstance(value, Tensor) and name != "ids_CJ"}
    return replace(rows, logits_TW=rows.logits_TW.double(), row=replace(rows.row, **wide))


def stats_and_support(backend: Backend, rows: Rows) -> tuple[Tensor, Tensor]:
    return backend.stats_and_support(rows.logits_TW, rows.row.ids_CJ, rows.shard, rows.scaling)


def write_gradient(backend: Backend, rows: Rows, out_TW: Tensor) -> Tensor:
    backend.write_gradient(rows.logits_TW, rows.row, rows.shard, rows.scaling, out_TW)
    return out_TW


def over_the_logits(rows: Rows, dtype: torch.dtype) -> Tensor:
    """The gradient over a copy of the logits, or in the first bytes of its rows."""
    rows = replace(rows, logits_TW=rows.logits_TW.clone())
    out_TW = rows.logits_TW if dtype == rows.logits_TW.dtype else rows.logits_TW.view(dtype)[:, : rows.shard.width]
    return write_gradient(TritonBackend(), rows, out_TW)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("runs", "softcap"), [((1,), None), ((1, 64), None), ((1, 4, 2), 30.0), ((1, 128, 128), None)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_both_passes_equal_eager_in_float64(
    width: str, runs: tuple[int, ...], softcap: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Beyond the tolerance, a bfloat16 gradient has one rounding to the nearest."""
    rows = make_rows(WIDTHS[width], dtype, runs=runs, scaling=Scaling(0.7, softcap))
    oracle = in_float64(rows)
    for found, right in zip(
        stats_and_support(TritonBackend(), rows), stats_and_support(EagerBackend(), oracle), strict=True
    ):
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)
    right = write_gradient(EagerBackend(), oracle, oracle.out(torch.float64))
    found = over_the_logits(rows, dtype)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), right, rtol=tolerance + rounding, atol=tolerance)
    assert not found[:, rows.shard.real_width :].any(), "padding columns have a gradient"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    ("dtype", "output"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_a_gradient_written_over_the_logits_has_the_same_bits_as_one_written_elsewhere(
    width: str, with_entropy: bool, dtype: torch.dtype, output: torch.dtype
) -> None:
    """A thread that stores before another has loaded would be detected, because every program runs many times."""
    rows = make_rows(WIDTHS[width], dtype, tokens=2000, with_entropy=with_entropy)
    elsewhere = write_gradient(TritonBackend(), rows, rows.out(output))
    for _ in range(10):
        assert torch.equal(over_the_logits(rows, output), elsewhere)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_passes_are_bit_identical_in_repeated_runs(dtype: torch.dtype) -> None:
    rows = make_rows(WIDTHS["odd"], dtype, tokens=2000)
    first = [*stats_and_support(TritonBackend(), rows), over_the_logits(rows, dtype)]
    for _ in range(5):
        second = [*stats_and_support(TritonBackend(), rows), over_the_logits(rows, dtype)]
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_rows_beyond_two_to_the_31_elements_are_addressed_correctly() -> None:
    width = 131_072
    tokens = 2**31 // width + 5
    few = make_rows(width, torch.bfloat16, tokens=8)
    logits_TW = torch.zeros(tokens, width, device=DEVICE, dtype=torch.bfloat16)
    logits_TW[-8:] = few.logits_TW

    def spread(number: Tensor) -> Tensor:
        return torch.cat([number[:1].expand(tokens - 8, *number.shape[1:]), number])

    row = few.row
    assert row.grad_entropy_C is not None
    many = replace(
        few,
        logits_TW=logits_TW,
        row=replace(
            row,
            ids_CJ=spread(row.ids_CJ),
            grad_logp_CJ=spread(row.grad_logp_CJ),
            grad_entropy_C=spread(row.grad_entropy_C),
            lse_C=spread(row.lse_C),
            entropy_C=spread(row.entropy_C),
        ),
    )
    for found, right in zip(
        stats_and_support(TritonBackend(), many), stats_and_support(TritonBackend(), few), strict=True
    ):
        assert torch.equal(found[-8:], right)
    write_gradient(TritonBackend(), many, many.logits_TW)
    assert torch.equal(logits_TW[-8:], over_the_logits(few, torch.bfloat16))


def test_both_passes_can_be_captured_in_a_cuda_graph() -> None:
    """A captured graph contains no host sync, and on new inputs gives the same bits as a direct call."""
    backend, rows = TritonBackend(), make_rows(WIDTHS["odd"], torch.float32)
    others = make_rows(WIDTHS["odd"], torch.float32, seed=1)
    buffer_TW = rows.logits_TW.clone()
    static = replace(rows, logits_TW=buffer_TW)
    shrunk_TW = buffer_TW.view(torch.bfloat16)[:, : rows.shard.width]
    stats_and_support(backend, static)  # compiles, as does the next
    write_gradient(backend, static, shrunk_TW)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats_T3, support_TJ = stats_and_support(backend, static)
        write_gradient(backend, static, shrunk_TW)
    for logits_TW in (rows.logits_TW, others.logits_TW):
        buffer_TW.copy_(logits_TW)
        graph.replay()
        direct = replace(rows, logits_TW=logits_TW)
        right_T3, right_TJ = stats_and_support(backend, direct)
        assert torch.equal(stats_T3, right_T3) and torch.equal(support_TJ, right_TJ)
        assert torch.equal(shrunk_TW, over_the_logits(direct, torch.bfloat16))
