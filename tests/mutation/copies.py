"""Copies of the repository below the work folder, so that the user's checkout never contains a fault."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.mutation.faults import Fault

REPOSITORY = Path(__file__).resolve().parents[2]


def snapshot(folder: Path) -> Path:
    """Copy tracked files, and untracked files that are not ignored, into an empty `folder`."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    ).stdout.decode()
    shutil.rmtree(folder, ignore_errors=True)
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def duplicate(copy: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(copy, folder)
    return folder


@contextmanager
def planted(copy: Path, fault: Fault) -> Iterator[None]:
    """Within the block, the file in the copy contains the fault."""
    path = copy / fault.file
    right = path.read_bytes()
    path.write_bytes(fault.planted(right))
    try:
        yield
    finally:
        path.write_bytes(right)


def environment(copy: Path, **extra: str) -> dict[str, str]:
    """The environment of a Python process that, with its child processes, imports our code from the copy."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MUTATION_", "COVERAGE_"))}
    paths = [str(copy / "tests" / "mutation" / "startup"), str(copy), *filter(None, [kept.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",  # otherwise bytecode with the fault would remain
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MUTATION_COPY": str(copy),
        **extra,
    }


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.mutation.plugin", *arguments]


def digest(path: Path) -> str:
    """The digest of a file's content. Empty if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def digest_of_all(copy: Path) -> str:
    """The digest of the product and its tests, without the code of the mutation run."""
    found = hashlib.sha256()
    for folder in ("tropd_mcore", "tests"):
        for path in sorted((copy / folder).rglob("*.py")):
            if "mutation" not in path.relative_to(copy).parts:
                found.update(f"{path.relative_to(copy)} {digest(path)}\n".encode())
    return found.hexdigest()[:16]


def reaches(copy: Path, file: str, packages: Iterable[str]) -> bool:
    """Whether a test file can run code of these packages: it imports one, directly or not, or starts a command."""
    wanted = tuple(f"tropd_mcore.{package}." for package in packages)
    seen: set[str] = set()
    left = [module for name in imported_tests(copy, copy / file) for module in imports(copy / name)]
    while left:
        module = left.pop()
        if module == "subprocess" or f"{module}.".startswith(wanted):
            return True
        if module not in seen and module.startswith("tropd_mcore"):
            seen.add(module)
            path = copy / f"{module.replace('.', '/')}.py"
            left += imports(path if path.is_file() else path.with_suffix("") / "__init__.py")
    return False


def imported_tests(copy: Path, path: Path) -> set[str]:
    """The test files that a test file imports, itself included, and every conftest.py above it."""
    found: set[str] = set()
    left = [path, *(parent / "conftest.py" for parent in path.parents if (copy / "tests") in (parent, *parent.parents))]
    while left:
        current = left.pop()
        name = current.relative_to(copy).as_posix()
        if name not in found and current.is_file():
            found.add(name)
            left += [copy / f"{module.replace('.', '/')}.py" for module in imports(current) if module[:6] == "tests."]
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules with a file that a file imports, at any depth. `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    if not path.is_file():
        return frozenset()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)
