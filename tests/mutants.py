"""Fresh imports of the kernel and the objectives for a test, optionally with one text of one module replaced.

Invariant: `sys.modules` is unchanged afterwards, so only the test that created a mutant knows it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from types import CodeType, ModuleType
from typing import Any

ROOT = "tropd_mcore"
PACKAGES = ("tropd_mcore.kernel", "tropd_mcore.objectives")
MODULES = (
    "kernel.backend",
    "kernel.choose",
    "kernel.eager",
    "kernel.exchange",
    "kernel.shard",
    "kernel.source",
    "kernel.support_log_probs",
    "kernel.support_loss",
    "kernel.token_losses",
    "kernel.topk",
    "objectives.candidates",
    "objectives.inputs",
    "objectives.parts.batch_statistics",
    "objectives.parts.divergences",
    "objectives.parts.mismatch",
    "objectives.parts.policy_gradient",
    "objectives.parts.trust",
    "objectives.rewards",
    "objectives.sampled",
    "objectives.trust_region",
    "objectives.verified",
)


@dataclass(frozen=True)
class Losses:
    """The modules under test by their name below `tropd_mcore`, all from one import."""

    modules: dict[str, ModuleType]

    def __getitem__(self, name: str) -> Any:
        return self.modules[name]


def real_losses() -> Losses:
    return Losses({name: importlib.import_module(f"{ROOT}.{name}") for name in MODULES})


def mutant_losses(module: str, right: str, wrong: str) -> Losses:
    """The packages with `right` replaced by `wrong` in one module, as all the others see it too.

    Raises AssertionError if the text is not in the source exactly once.
    """
    spec = find_spec(f"{ROOT}.{module}")
    assert spec is not None and spec.origin is not None
    loader = _MutantLoader(spec.name, spec.origin, right, wrong)
    with _imported_anew(_OneModule(loader)):
        return real_losses()


class _MutantLoader(SourceFileLoader):
    def __init__(self, name: str, path: str, right: str, wrong: str) -> None:
        super().__init__(name, path)
        self.right, self.wrong = right, wrong

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname)
        assert source is not None
        count = source.count(self.right)
        assert count == 1, f"{fullname} has {count} times {self.right!r}"
        return compile(source.replace(self.right, self.wrong), f"<mutant of {fullname}>", "exec")


class _OneModule(MetaPathFinder):
    def __init__(self, loader: _MutantLoader) -> None:
        self.loader = loader

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.loader.name:
            return None
        return spec_from_file_location(fullname, self.loader.path, loader=self.loader)


@contextmanager
def _imported_anew(finder: MetaPathFinder) -> Iterator[None]:
    """Within the block, no module of the packages is imported yet and `finder` is asked first."""
    root = importlib.import_module(ROOT)
    for package in PACKAGES:
        importlib.import_module(package)
    saved = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in saved:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(saved)
        for package in PACKAGES:
            setattr(root, package.rpartition(".")[2], saved[package])


def _is_ours(name: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in PACKAGES)
