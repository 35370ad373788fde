"""The files of the checkout that a wheel carries beside the package, and their present location.

This module copies nothing (`recipes_command`). Invariant: it imports no other module of this package, because setup.py
reads it while the wheel is built, in an environment that has neither this package nor torch.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = "shipped"
"""Folder of the package that holds them in a wheel, in the layout of the checkout."""

PATTERNS = (
    "configs/*.yaml",
    "configs/study/*.yaml",
    "examples/*.sh",
    "examples/*.sbatch",
    "examples/kubernetes/*.yaml",
    "examples/*.py",
    "examples/*.json",
    "examples/arithmetic/*.py",
    "examples/integrations/*.py",
    "examples/integrations/patches/*.patch",
    "conversion/*.py",
    "requirements/*.txt",
)
NOT_SHIPPED = ("examples/setup_env.sh",)
"""Left out because it installs a checkout."""


def files_of(root: Path) -> list[Path]:
    """The files to ship, relative to `root`, which is a checkout or the folder in a wheel."""
    found = sorted(path.relative_to(root) for pattern in PATTERNS for path in root.glob(pattern) if path.is_file())
    return [path for path in found if path.as_posix() not in NOT_SHIPPED]


def root() -> Path:
    """The folder that holds them: in the installed package, or the checkout that contains the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent
