"""Versions of torch: the refused ones, and the replacement for a product that older ones lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tropd_mcore.kernel import source

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "version"), [("2.13.0+cpu", (2, 13)), ("2.9.0a0+145a3a7bda.nv25.10", (2, 9)), ("2.8.0", (2, 8))]
)
def test_a_torch_version_is_parsed_with_any_vendor_suffix(text: str, version: tuple[int, int]) -> None:
    with mock.patch("torch.__version__", text):
        assert source.torch_version() == version


def test_a_torch_that_is_too_old_gives_a_one_line_error_at_import() -> None:
    program = (
        "import torch; torch.__version__ = '2.7.1+cu126'\n"
        "try:\n    from tropd_mcore import distill_loss\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == (
        "tropd_mcore needs torch 2.8 or newer, found 2.7.1+cu126; older ones lack the mixed-precision product that the "
        "loss needs\n"
    ), done.stderr


@pytest.mark.parametrize(("version", "fused"), [("2.8.0", False), ("2.10.0", False), ("2.11.0", True), ("3.0.0", True)])
def test_torch_before_2_11_on_a_gpu_adds_a_product_in_two_steps(version: str, fused: bool) -> None:
    """A stand-in for a GPU tensor. It checks the calls, while tests/gpu checks the results."""
    total = mock.MagicMock(dtype=torch.float32, is_cuda=True)
    left, right = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(dtype=torch.bfloat16)
    with (
        mock.patch("torch.__version__", version),
        mock.patch("torch.mm", return_value="product") as mm,
        mock.patch("torch.addmm", return_value="fused") as addmm,
    ):
        found = source.matmul_into(total, left, right, accumulate=True)  # type: ignore[arg-type]
    if fused:
        addmm.assert_called_once_with(total, left, right, out_dtype=torch.float32, out=total)
        assert found == "fused" and not mm.called
    else:
        mm.assert_called_once_with(left, right, out_dtype=torch.float32)
        total.add_.assert_called_once_with("product")
        assert not addmm.called
