"""docs/library.md: every snippet runs, in the order of the page, on one rank and on two, and so does the script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "library.md"
SCRIPT = ROOT / "examples" / "loss_in_ten_minutes.py"


def _run_page(text: str) -> dict[str, float]:
    """Run all Python blocks in one namespace. Returns the results of the first and of the split loss."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return {name: float(names[name].value) for name in ("out", "split", "each", "whole")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_snippet_of_the_page_runs(ranks: int) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("```python") >= 6
    found = run_on_ranks(_run_page, ranks, text)
    assert all(numbers == found[0] for numbers in found), "the same on every rank"
    assert found[0]["split"] == pytest.approx(found[0]["out"], rel=1e-5)


def test_the_script_page_runs_with_torch_alone_and_its_gradient_is_that_of_autograd(tmp_path: Path) -> None:
    """Its own assertions compare every number. Other packages are also hidden from the two processes that it starts."""
    (tmp_path / "sitecustomize.py").write_text("from tests.library_alone import alone\nalone()\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in ("the gate:", "outliers:", "the gradient:", "two ranks:", "  rank 1: columns 10 to 19"):
        assert line in done.stdout
    (error,) = re.findall(r"relative error (\S+)", done.stdout)
    assert float(error) < 1e-12
