"""The pins of pyproject.toml and the lock of the CPU environment say the same, and the lock is complete."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED_EXTRAS = ("sglang", "eval", "dev")
KEPT_OUT = (
    "sglang",
    "sglang-kernel",
    "torchvision",
    "torchaudio",
    "transformer-engine",
    "apex",
    "wandb",
    "tensorboard",
)


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    names = [canonicalize_name(name) for name, _ in pins]
    assert len(set(names)) == len(names), "a package is locked twice"
    return dict(zip(names, (version for _, version in pins), strict=True))


def declared(extras: tuple[str, ...]) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def test_every_pin_of_the_project_is_the_locked_version():
    lock = locked()
    for requirement in declared(LOCKED_EXTRAS):
        assert str(requirement.specifier) == f"=={lock[canonicalize_name(requirement.name)]}", requirement.name


def test_the_build_uses_the_locked_setuptools():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == [f"setuptools=={locked()['setuptools']}"]


def test_the_lock_holds_what_the_project_needs_and_nothing_else():
    """Closure of the declared packages over the installed metadata, which are those of the lock."""
    lock, needed = locked(), set()
    queue = [("setuptools", frozenset())]
    queue += [(canonicalize_name(item.name), frozenset(item.extras)) for item in declared(LOCKED_EXTRAS)]
    while queue:
        name, extras = queue.pop()
        needed.add(name)
        for line in metadata.requires(name) or []:
            item = Requirement(line)
            wanted = item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            child = canonicalize_name(item.name)
            if wanted and (child not in needed or item.extras):
                queue.append((child, frozenset(item.extras)))
                needed.add(child)
    assert needed == set(lock)


def test_the_installed_environment_is_the_locked_one():
    for name, version in locked().items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_the_lock_has_no_local_versions_and_none_of_the_packages_that_break_a_cpu_host():
    lock = locked()
    assert not [name for name, version in lock.items() if "+" in version]
    assert not set(KEPT_OUT) & set(lock)


@pytest.mark.parametrize("path", ["examples/setup_env.sh", "pyproject.toml", "requirements/cpu.txt"])
def test_the_sglang_version_is_the_same_everywhere(path):
    found = re.findall(r"--no-deps\S* sglang==([0-9.]*[0-9])", (ROOT / path).read_text())
    assert set(found) == {"0.5.23"}


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    declared_lines = [line for line in text.splitlines() if re.match(r'  "[A-Za-z]\S*[=>]=\S*",', line)]
    assert len(declared_lines) == len(declared(("gpu", *LOCKED_EXTRAS)))
    for line in declared_lines:
        assert re.search(r"# \S+", line), line
