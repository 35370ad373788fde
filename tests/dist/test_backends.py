"""The compiled passes against the float64 oracle and against eager, and the choice of a backend.

Most tests are slow because every variant (dtype, softcap, set of terms) is compiled. Triton has its own tests
(tests/unit/test_triton.py).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.dist.kernel_cases import FORMS, LAYOUTS, assert_equals_the_oracle, make_case, run_cases
from tests.dist.test_near_convergence import relative_errors_on_this_rank
from tests.ranks import run_with_compiler
from tests.triton_cases import assert_close, oracle, passes_of
from tests.triton_cases import make_case as make_passes_case
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import RowGradient
from tropd_mcore.kernel.choose import backend
from tropd_mcore.kernel.compiled import CompiledBackend
from tropd_mcore.kernel.eager import EagerBackend
from tropd_mcore.kernel.shard import Scaling, VocabShard

CPU = torch.device("cpu")


def test_the_compiled_passes_equal_the_oracle() -> None:
    """One variant, in float32, on one padded shard."""
    case = make_passes_case("padded", torch.float32)
    assert_close(passes_of(backend("compile", CPU), case), oracle(case), 1e-5)


def test_each_name_gives_its_backend_and_the_same_object_each_time() -> None:
    assert backend("auto", CPU) is backend("auto", CPU)
    assert isinstance(backend("auto", CPU), EagerBackend) and isinstance(backend("eager", CPU), EagerBackend)
    assert backend("compile", CPU).name == "compile" and backend("compile", CPU) is backend("compile", CPU)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "loss.backend=triton runs on CUDA and the logits are on cpu; use auto or eager"),
        ("cuda", "loss.backend=cuda is none of auto, eager, compile, triton"),
    ],
)
def test_a_backend_that_cannot_run_gives_a_one_line_error_that_names_the_key(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        backend(name, CPU)
    assert str(error.value) == message


def test_a_missing_compiler_is_a_one_line_error_when_the_backend_is_created() -> None:
    with (
        mock.patch("torch._inductor.config.cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(ConfigError, match=r"^loss\.backend=compile needs a C\+\+ compiler .* use eager$"),
    ):
        CompiledBackend(CPU)


def test_missing_python_headers_are_a_one_line_error_when_the_backend_is_created() -> None:
    with (
        mock.patch("sysconfig.get_paths", return_value={"include": "/nowhere"}),
        pytest.raises(
            ConfigError, match=r"^loss\.backend=compile needs .*/nowhere/Python\.h does not exist; use eager$"
        ),
    ):
        CompiledBackend(CPU)


def test_missing_triton_for_a_gpu_is_a_one_line_error_when_the_backend_is_created() -> None:
    with (
        mock.patch("tropd_mcore.kernel.compiled.has_triton", return_value=False),
        pytest.raises(ConfigError, match=r"^loss\.backend=compile needs Triton .* use eager$"),
    ):
        CompiledBackend(torch.device("cuda"))


def test_eager_loads_neither_triton_nor_the_compiler() -> None:
    program = (
        "import sys, torch; from tropd_mcore.kernel.choose import backend; backend('auto', torch.device('cpu'));"
        "assert not {'triton', 'torch._inductor'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


# ---- slow: every variant compiles ----


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_through_compiled_passes_equal_the_oracle(layout: str) -> None:
    cases = [
        make_case(layout, dtype, **changes, softcap=softcap, backend="compile")
        for dtype, softcap in ((torch.float64, 5.0), (torch.float32, None))
        for changes in FORMS.values()
    ]
    for case, results in zip(cases, run_cases(cases), strict=True):
        assert_equals_the_oracle(results, case, 1e-12 if case.dtype == torch.float64 else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)], ids=str
)
@pytest.mark.parametrize("everything", [False, True])
def test_compiled_variants_equal_the_oracle_and_eager(dtype: torch.dtype, tolerance: float, everything: bool) -> None:
    """The smallest variant, and that with softcap, temperature, entropy term and dense term."""
    for layout in ("uneven", "empty-shard", "support-wider-than-shard"):
        case = make_passes_case(layout, dtype, scaling=Scaling(), grad_entropy_T=None)
        if everything:
            case = make_passes_case(layout, dtype, scaling=Scaling(0.7, 30.0), with_dense=True)
        found = passes_of(backend("compile", CPU), case)
        assert_close(found, oracle(case), tolerance)
        assert_close(found, passes_of(EagerBackend(), case), tolerance)


@pytest.mark.slow
def test_compiled_gradients_near_convergence_are_right_to_3_in_1000() -> None:
    ((hidden_error, weight_error),) = run_with_compiler(relative_errors_on_this_rank, 1, "compile")
    assert hidden_error <= 3e-3 and weight_error <= 3e-3


@pytest.mark.slow
def test_a_different_number_of_rows_or_slots_compiles_nothing_new() -> None:
    """The first call, and the first with one row, compile. No later call does."""
    from torch._dynamo.utils import counters

    compiled = CompiledBackend(CPU)
    for rows, slots in ((8, 5), (1, 5), (8, 1)):
        _both_passes(compiled, rows, slots)
    before = counters["stats"]["unique_graphs"]
    for rows, slots in ((5, 5), (13, 7), (37, 2), (1, 9), (8, 5)):
        _both_passes(compiled, rows, slots)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
def test_compiled_passes_accept_zero_rows_and_zero_slots() -> None:
    compiled = backend("compile", CPU)
    for rows, slots in ((0, 3), (4, 0)):
        assert _both_passes(compiled, rows, slots).shape == (rows, 11)


def _both_passes(compiled: CompiledBackend, rows: int, slots: int) -> Tensor:
    """Run on logits of a shard of 11 columns, 9 of them real. Returns the gradient."""
    random = torch.Generator().manual_seed(rows)
    logits_CW, shard = torch.randn(rows, 11, generator=random), VocabShard(0, 11, 9)
    ids_CJ = torch.randint(9, (rows, slots), generator=random)
    stats_C3, owned_CJ = compiled.stats_and_support(logits_CW, ids_CJ, shard, Scaling())
    assert stats_C3.shape == (rows, 3) and owned_CJ.shape == (rows, slots)
    per_row_C = torch.rand(rows, generator=random)
    row = RowGradient(
        ids_CJ,
        torch.rand(rows, slots, generator=random),
        per_row_C,
        per_row_C,
        per_row_C,
        unique_run_lengths=(1,) * slots,
    )
    compiled.write_gradient(logits_CW, row, shard, Scaling(), logits_CW)
    assert not logits_CW[:, 9:].any()
    return logits_CW
