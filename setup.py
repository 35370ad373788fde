"""Adds recipes and scripts to a wheel; everything else about the distribution is in pyproject.toml.

An editable installation needs no copies: `tropd recipes` finds them in the checkout.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("shipped", ROOT / "tropd_mcore" / "cli" / "shipped.py")
shipped = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shipped)


class BuildWithRecipes(build_py):
    """The package, and the files of `tropd_mcore.cli.shipped` in a folder of it."""

    def run(self) -> None:
        """Build; copy them."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "tropd_mcore", shipped.FOLDER)
        shutil.rmtree(target, ignore_errors=True)  # a build folder that was there may have older ones
        for path in shipped.files_of(ROOT):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target / path)


setup(cmdclass={"build_py": BuildWithRecipes})
