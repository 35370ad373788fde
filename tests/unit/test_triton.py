"""The Triton kernels against the float64 oracle and the eager backend, in Triton's interpreter.

The interpreter runs a kernel in NumPy, one program at a time. It shows what a kernel computes, but not that its threads
are synchronised (for that, see test_triton_ptx and tests/gpu). It truncates a float32 to a bfloat16, a GPU rounds it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.triton_cases import LAYOUTS, Case, Passes, assert_close, make_case, oracle, passes
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import RowGradient
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard
from tropd_mcore.kernel.triton_backend import TritonBackend


def interpreted(case: Case, backend_name: str = "triton", mutation: tuple[str, str] | None = None) -> Passes:
    found: Passes = run_on_ranks(passes, 1, case, backend_name, mutation)[0]
    return found


def cut_to_bfloat16(number: Tensor) -> Tensor:
    """The upper half of each float32, as the interpreter makes a bfloat16."""
    return (number.contiguous().view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "dtype"), [*product(LAYOUTS, [torch.float64]), *product(["padded", "empty-shard"], [torch.float32])]
)
def test_both_passes_equal_the_oracle_and_eager(layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype)
    found, tolerance = interpreted(case), 1e-12 if dtype == torch.float64 else 1e-5
    assert found.stats.dtype == found.support.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert_close(found, oracle(case), tolerance)
    assert_close(found, passes(case, "eager"), tolerance)


@pytest.mark.parametrize(
    ("softcap", "temperature", "with_entropy", "with_dense"),
    [(None, 1.0, False, False), (None, 1.3, True, True), (3.0, 1.0, True, False), (3.0, 1.3, False, True)],
)
def test_every_variant_equals_the_oracle_in_float64(
    softcap: float | None, temperature: float, with_entropy: bool, with_dense: bool
) -> None:
    case = make_case("uneven", scaling=Scaling(temperature, softcap), with_dense=with_dense)
    if not with_entropy:
        case = replace(case, grad_entropy_T=None)
    assert_close(interpreted(case), oracle(case), 1e-12)


def test_softcap_in_float32_is_off_by_a_few_rounding_steps_of_the_cap() -> None:
    case = make_case("uneven", torch.float32, scaling=Scaling(0.7, 30.0))
    assert_close(interpreted(case), oracle(case), 1e-5)


@pytest.mark.parametrize("layout", ["support-wider-than-shard", "empty-shard"])
def test_gradient_over_bfloat16_logits_is_the_float32_gradient_rounded_once(layout: str) -> None:
    case = make_case(layout, torch.bfloat16)
    wide = interpreted(replace(case, logits_TV=case.logits_TV.float()))
    found = interpreted(case)
    assert torch.equal(found.gradient_TV, cut_to_bfloat16(wide.gradient_TV))
    assert np.array_equal(found.stats, wide.stats) and np.array_equal(found.support, wide.support)
    assert_close(wide, oracle(case), 1e-5)


@pytest.mark.parametrize("layout", ["padded", "padding-only-shard"])
def test_bfloat16_gradient_in_the_first_half_of_float32_rows_is_the_float32_gradient_rounded_once(layout: str) -> None:
    case = make_case(layout, torch.float32)
    wide, found = interpreted(case), interpreted(replace(case, output=torch.bfloat16))
    assert found.gradient_TV.dtype == torch.bfloat16
    assert torch.equal(found.gradient_TV, cut_to_bfloat16(wide.gradient_TV))


@pytest.mark.parametrize(
    ("runs", "tokens", "width"), [((1,), 0, 130), ((), 1, 130), ((1,), 1, 1), ((1,), 1, 130), ((1, 128, 128), 1, 130)]
)
def test_both_passes_equal_eager_for_supports_of_zero_to_257_slots(
    runs: tuple[int, ...], tokens: int, width: int
) -> None:
    slots = sum(runs)
    ids_TJ = torch.tensor([v for run in runs for v in range(run)], dtype=torch.int64).expand(tokens, slots)
    logits_TW = torch.linspace(-2.0, 2.0, width, dtype=torch.float64).expand(tokens, width).clone()
    grad_TJ = torch.linspace(-1.0, 1.0, slots, dtype=torch.float64).expand(tokens, slots)
    arguments = (logits_TW, ids_TJ, grad_TJ, runs)
    found, eager = run_on_ranks(small_passes, 1, *arguments)[0]
    for ours, theirs in zip(found, eager, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-12, atol=1e-12)


def small_passes(
    logits_TW: Tensor, ids_TJ: Tensor, grad_TJ: Tensor, runs: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Statistics, support and gradient by Triton and by eager."""
    shard = VocabShard(0, logits_TW.shape[1], logits_TW.shape[1])
    lse_T = logits_TW.logsumexp(dim=1)
    entropy_T = lse_T - (logits_TW.softmax(dim=1) * logits_TW).sum(dim=1)
    row = RowGradient(ids_TJ, grad_TJ, entropy_T, lse_T, entropy_T, runs)
    results = []
    for backend in (TritonBackend(), EagerBackend()):
        out_TW = logits_TW.clone()
        stats_T3, support_TJ = backend.stats_and_support(out_TW, ids_TJ, shard, Scaling())
        backend.write_gradient(out_TW, row, shard, Scaling(), out_TW)
        results.append([stats_T3, support_TJ, out_TW])
    return results[0], results[1]


def test_the_block_width_changes_the_result_only_by_rounding() -> None:
    case = make_case("padded")
    assert_close(interpreted(replace(case, block=128)), interpreted(replace(case, block=8)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_interpreted_kernels_are_bit_identical_in_a_second_run(dtype: torch.dtype) -> None:
    first, second = (interpreted(make_case("uneven", dtype)) for _ in range(2))
    assert first.stats.tobytes() == second.stats.tobytes()
    assert first.support.tobytes() == second.support.tobytes()
    assert torch.equal(first.gradient_TV, second.gradient_TV)


FAULTS = {
    "padding in the sum": ("exp = tl.where(real,", "exp = tl.where(column < width,"),
    "padding in the gradient": ("gradient = tl.where(real,", "gradient = tl.where(column < width,"),
    "duplicates not added": ("tl.where(same,", "tl.where(same & (other[None, :] == slot[:, None]),"),
    "duplicates stored late": ("(earlier == 0)", "(earlier == 1)"),
}
"""What is right in the source of the kernels, and what is wrong."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_the_triton_kernels_is_detected(fault: str) -> None:
    case = make_case("padded")
    with pytest.raises(AssertionError):
        assert_close(interpreted(case, mutation=FAULTS[fault]), oracle(case), 1e-6)


def test_tensors_on_a_cpu_are_refused_in_one_line_that_names_the_key() -> None:
    backend, shard = TritonBackend(), VocabShard(0, 4, 4)
    with pytest.raises(ConfigError, match=r"^loss\.backend=triton needs CUDA tensors, found cpu; set [^\n]*$"):
        backend.stats_and_support(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), shard, Scaling())
