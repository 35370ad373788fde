"""Build a wheel of this checkout, from a copy so that no file is left here, and run pip for other environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = (
    "tropd_mcore", "configs", "conversion", "examples", "requirements",
    "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
)  # fmt: skip


def pip(*arguments: object, python: Path | None = None) -> str:
    """`pip ARGUMENTS` without an index, for the environment of `python`. Returns its output."""
    chosen = ["--python", str(python)] if python else []
    command = [sys.executable, "-m", "pip", *chosen, "--disable-pip-version-check", *map(str, arguments)]
    # Indexes and constraints from this machine's configuration are ignored.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel, in `folder`."""
    copy = folder / "checkout"
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy2(source, copy / name)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "wheel", copy)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel
