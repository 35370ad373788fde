"""Which files of the checkout a wheel carries beside the package, and where they are now.

Not for copying (`recipes_command`). Invariant: imports nothing of ours, because setup.py reads it while the wheel is
made, in an environment that has neither this package nor torch.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = "shipped"
"""Folder of the package that has them in a wheel, in the layout of the checkout."""

PATTERNS = (
    "configs/*.yaml",
    "examples/*.sh",
    "examples/*.sbatch",
    "examples/*.py",
    "examples/arithmetic/*.py",
    "examples/integrations/*.py",
    "examples/integrations/patches/*.patch",
    "conversion/*.py",
    "requirements/*.txt",
)
NOT_SHIPPED = ("examples/setup_env.sh",)
"""It installs a checkout."""


def files_of(root: Path) -> list[Path]:
    """The files to ship, relative to `root`, a checkout or the folder of a wheel."""
    found = sorted(path.relative_to(root) for pattern in PATTERNS for path in root.glob(pattern) if path.is_file())
    return [path for path in found if path.as_posix() not in NOT_SHIPPED]


def root() -> Path:
    """The folder that has them: in the installed package, or the checkout that the package lies in."""
    package = Path(__file__).resolve().parents[1]
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent
