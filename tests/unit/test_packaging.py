"""Ranges in pyproject.toml, exact pins in requirements/, and a wheel that needs torch but keeps a vendor's torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.wheels import build, pip
from tropd_mcore.cli import shipped
from tropd_mcore.cli.main import COMMANDS
from tropd_mcore.serving.interpreter import ROUTER

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED_EXTRAS = ("train", "eval", "data", "docs", "dev")
VENDOR = "2.9.0a0+145a3a7bda.nv25.10"
"""A version as in a vendor's container: a pre-release with a local part."""
KEPT_OUT = {
    "sglang",
    "sglang-kernel",
    "torchvision",
    "torchaudio",
    "transformer-engine",
    "apex",
    "wandb",
    "tensorboard",
}


def pins(name: str) -> dict[str, tuple[str, str]]:
    """Package -> (version, reason) of a file of requirements."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9_.-]+)==(\S+)(?:  # (.+))?", line) for line in lines if not line.startswith("#")]
    assert all(found), [line for line, match in zip(lines, found, strict=False) if match is None]
    names = [canonicalize_name(match[1]) for match in found if match]
    assert len(set(names)) == len(names), "a package is pinned twice"
    return dict(zip(names, ((match[2], match[3] or "") for match in found if match), strict=True))


def declared(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return [Requirement(line) for line in lines]


def test_the_project_declares_ranges_and_the_core_is_torch_alone() -> None:
    assert [item.name for item in declared()] == ["torch"]
    for item in declared(*EXTRAS):
        assert not {part.operator for part in item.specifier} & {"==", "~=", "==="}, (
            f"{item}: pins live in requirements/"
        )


def test_every_declared_package_is_locked_inside_its_range() -> None:
    lock = pins("cpu.txt")
    for item in declared(*LOCKED_EXTRAS):
        assert item.specifier.contains(lock[canonicalize_name(item.name)][0]), item


def test_the_lower_bounds_are_versions_that_were_tested() -> None:
    oldest = pins("oldest.txt")
    for item in declared("train"):
        (lower,) = [part.version for part in item.specifier if part.operator == ">="]
        ran = Version(oldest[canonicalize_name(item.name)][0])
        assert ran.release[: len(Version(lower).release)] == Version(lower).release, f"{item}, and {ran} was run"


LOCKS = ["cpu.txt", "oldest.txt", "trainer-gpu.txt", "trainer-gpu-source.txt", "server-gpu.txt", "router.txt"]


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_a_comment_that_says_why(name: str) -> None:
    assert not [package for package, (_, reason) in pins(name).items() if not reason]


def needed_by(roots: list[tuple[str, frozenset[str]]]) -> dict[str, list[Requirement]]:
    """Every package that these need, by the installed metadata -> its requirement."""
    found: dict[str, list[Requirement]] = {name: [] for name, _ in roots}
    queue = list(roots)
    while queue:
        name, extras = queue.pop()
        for line in metadata.requires(name) or []:
            item = Requirement(line)
            wanted = item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            child = canonicalize_name(item.name)
            if wanted:
                if child not in found or item.extras:
                    queue.append((child, frozenset(item.extras)))
                found.setdefault(child, []).append(item)
    return found


def test_the_lock_holds_what_the_project_needs_and_nothing_else() -> None:
    """Roots: what pyproject.toml declares, and what SGLang imports on a CPU."""
    lock = pins("cpu.txt")
    roots = [("setuptools", frozenset[str]())]
    roots += [(canonicalize_name(item.name), frozenset(item.extras)) for item in declared(*LOCKED_EXTRAS)]
    roots += [(name, frozenset()) for name, (_, reason) in lock.items() if reason.startswith("SGLang: ")]
    assert set(needed_by(roots)) == set(lock)


def test_the_installed_environment_is_the_locked_one() -> None:
    for name, (version, _) in pins("cpu.txt").items():
        assert metadata.version(name).partition("+")[0] == version, name


def test_the_lock_has_no_local_versions_and_none_of_the_packages_that_break_a_cpu_host() -> None:
    lock = pins("cpu.txt")
    assert not [name for name, (version, _) in lock.items() if "+" in version]
    assert not KEPT_OUT & set(lock)


NAME_SGLANG = [
    "examples/setup_env.sh", "requirements/cpu.txt", "requirements/server-gpu.in", "requirements/server-gpu.txt",
    "tropd_mcore/serving/interpreter.py",
]  # fmt: skip


@pytest.mark.parametrize("path", NAME_SGLANG)
def test_the_sglang_version_is_the_same_everywhere(path: str) -> None:
    assert set(re.findall(r"sglang==([0-9.]*[0-9])", (ROOT / path).read_text())) == {"0.5.23"}


def test_the_router_fits_its_range_and_changes_no_package_of_another_environment() -> None:
    router = pins("router.txt")
    (item,) = declared("router")[len(PROJECT["dependencies"]) :]
    assert item.specifier.contains(router[canonicalize_name(item.name)][0])
    assert f"smg=={router['smg'][0]}" == ROUTER
    for name in ("cpu.txt", "server-gpu.txt"):
        other = pins(name)
        assert {package: other[package][0] for package in router.keys() & other.keys()} == {
            package: router[package][0] for package in router.keys() & other.keys()
        }, name
    assert not KEPT_OUT & set(router) and "torch" not in router


def test_no_dependency_of_the_trainer_would_replace_a_vendors_torch() -> None:
    roots = [(canonicalize_name(item.name), frozenset(item.extras)) for item in declared("train")]
    for item in [*needed_by(roots)["torch"], *declared()]:
        if item.name == "torch":
            assert item.specifier.contains(VENDOR, prereleases=True), item


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize(("installed", "replaced"), [(VENDOR, False), ("2.8.0", False), ("2.7.1", True)])
def test_pip_installs_the_wheel_beside_a_vendors_torch_and_nothing_else(
    wheel: Path, installed: str, replaced: bool, tmp_path: Path
) -> None:
    """A venv with only the metadata of a torch. A newer torch is available and replaces one that is too old."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = tmp_path / "env" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    about = site / f"torch-{installed}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n")
    (about / "INSTALLER").write_text("pip\n")
    (about / "RECORD").write_text("")
    newer = tmp_path / "torch-2.99.0-py3-none-any.whl"
    with zipfile.ZipFile(newer, "w") as archive:
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"torch-2.99.0.dist-info/{name}", text)
    told = pip("install", "--dry-run", "--no-index", "--find-links", tmp_path, wheel, python=python)
    (line,) = [line for line in told.splitlines() if line.startswith("Would install")]
    assert line == "Would install torch-2.99.0 tropd-mcore-0.1.0" if replaced else "Would install tropd-mcore-0.1.0"


def test_the_wheel_carries_the_package_recipes_and_scripts_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    carried = {name.removeprefix("tropd_mcore/shipped/") for name in names if name.startswith("tropd_mcore/shipped/")}
    assert carried == {path.as_posix() for path in shipped.files_of(ROOT)}
    assert {"configs/quickstart-cpu.yaml", "examples/tropd_pretrain.sh", "conversion/verify.py"} <= carried
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tropd_mcore").rglob("*.py")}
    assert package <= names
    assert {name.partition("/")[0] for name in names} == {"tropd_mcore", "tropd_mcore-0.1.0.dist-info"}


ARGUMENTS = {
    "train": ["c.yaml"], "config": ["c.yaml"], "metrics": [], "doctor": [], "prefixes": ["c.yaml"], "recipes": [],
    "prompts": ["p.jsonl", "--prompt-field", "q", "--out", "o.jsonl"],
    "eval": ["c.yaml", "--prompts", "p.jsonl"], "report": ["run"], "conformance": ["--quick"],
    "convert": ["verify", "--hf", "a", "--other-hf", "b"], "study": ["s.yaml"],
    "selftest": [],
}  # fmt: skip
NEED_NOTHING = ("recipes",)
PROGRAM = """
import sys
from tests.library_alone import alone
alone()
from tropd_mcore.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_the_packages_of_the_trainer_says_so_in_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {dir: run}\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *ARGUMENTS[command]],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if command in NEED_NOTHING:
        assert done.returncode == 0 and done.stdout and not done.stderr
        return
    said = [line for line in done.stderr.splitlines() if " I tropd " not in line]  # the line that names the command
    assert done.returncode == 2, done.stderr
    assert len(said) == 1 and said[0].startswith(f"error: tropd {command} needs the Python package "), done.stderr
    assert "`pip install 'tropd-mcore[train]'` (of a checkout: '.[train]')" in said[0]
