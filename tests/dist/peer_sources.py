"""Sources of other training stacks, for the tests that run our adapters inside them.

PEERS names a folder of checkouts, `slime`, `verl`, `nemo_rl`, `megatron_lm` and `megatron_bridge`, each at its commit
below. Without it these tests are skipped, and only tests/dist/test_integrations.py checks the contracts of the hooks.
A patch contains no line of the other project. It only inserts lines, at line numbers of that commit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMMITS = {
    "slime": "624b824a898ab0ec1fcb4d373004c7f3852bf515",
    "verl": "1dda039b9c6311889a9c9a26040677e1254814f9",
    "nemo_rl": "7ea279abfbeb698b092856d0dab61e7cf39bc909",
    "megatron_lm": "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
    "megatron_bridge": "067f987df03b8355b03192d88d70f1709fedf51a",
}
PATCHES = Path(__file__).parents[2] / "examples" / "integrations" / "patches"


def source(name: str) -> Path:
    """The checkout of a stack. Skips the test if there is none."""
    root = os.environ.get("PEERS")
    if not root:
        pytest.skip(f"PEERS names no folder of checkouts; {name} at {COMMITS[name][:12]} is needed")
    found = Path(root) / name
    assert found.is_dir(), f"PEERS={root} has no folder {name}"
    return found


def patched(name: str, folder: Path, packages: str) -> Path:
    """A copy of the package `packages` of a stack in `folder`, with our patch of that stack applied."""
    root = source(name)
    copy = folder / name
    shutil.copytree(root / packages, copy / packages, ignore=shutil.ignore_patterns("__pycache__"))
    patch = PATCHES / f"{name}.patch"
    subprocess.run(
        ["git", "apply", "--unidiff-zero", f"--directory={copy.name}", str(patch)],
        cwd=folder, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
    )  # fmt: skip
    return copy
