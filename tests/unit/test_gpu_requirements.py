"""The locks of the GPU environments: against pyproject.toml and the CPU lock, and against the package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_packaging import ROOT, declared, pins

UV = "uv==0.13.9"
OWN_CHOICE = {"torch", "triton", "setuptools"}
"""What the trainer's GPU lock may pin otherwise than the CPU lock."""
TRAINER, SOURCE, SERVER = "trainer-gpu.txt", "trainer-gpu-source.txt", "server-gpu.txt"


def inputs(name: str) -> list[Requirement]:
    """The lines of a file that a lock is made from."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_the_trainers_gpu_lock_has_everything_that_training_needs_inside_its_range() -> None:
    lock = {**pins(TRAINER), **pins(SOURCE)}
    for item in declared("train", "eval", "data", "gpu"):
        assert item.specifier.contains(lock[canonicalize_name(item.name)][0]), item


def test_the_trainers_gpu_lock_and_the_cpu_lock_agree_except_for_torch_and_what_follows_from_it() -> None:
    gpu, cpu = pins(TRAINER), pins("cpu.txt")
    assert {name for name in gpu.keys() & cpu.keys() if gpu[name][0] != cpu[name][0]} == OWN_CHOICE


@pytest.mark.parametrize("name", [TRAINER, SERVER])
def test_a_gpu_lock_has_what_its_input_asks_for(name: str) -> None:
    lock = pins(name)
    for item in inputs(name.replace(".txt", ".in")):
        assert item.specifier.contains(lock[canonicalize_name(item.name)][0]), item


def test_what_is_built_from_source_fits_what_is_installed_before() -> None:
    trainer, source = pins(TRAINER), pins(SOURCE)
    engine = trainer["transformer-engine"][0]
    assert source["transformer-engine-torch"][0] == trainer["transformer-engine-cu13"][0] == engine == "2.12.0"
    assert source["flash-attn"][0] == "2.8.3", "the newest that Transformer Engine 2.12 accepts"
    cuda = trainer["nvidia-cuda-nvrtc"][0].split(".")[:2]  # the CUDA version of torch
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime"):
        assert trainer[name][0].split(".")[:2] == cuda, name


def test_the_trainers_gpu_lock_is_of_the_set_that_ran_on_a_gpu() -> None:
    ran = (ROOT / "docs" / "gpu.md").read_text()
    lock = pins(TRAINER)
    for shown, name in (("torch", "torch"), ("Transformer Engine", "transformer-engine"), ("Triton", "triton"),
                        ("megatron-core", "megatron-core"), ("NCCL", "nvidia-nccl-cu13")):  # fmt: skip
        assert re.search(rf"{shown} {re.escape(lock[name][0])}(\+cu130)?[ ,.]", ran), (shown, lock[name][0])


def test_each_gpu_environment_lacks_the_engine_of_the_other() -> None:
    assert not {"sglang", "sglang-kernel", "torchvision", "torchaudio", "apex"} & set(pins(TRAINER))
    assert not {"megatron-core", "transformer-engine", "tropd-mcore"} & set(pins(SERVER))


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment that names the resolver, which is in a folder of its own. It asks the index that pip asks."""
    folder = tmp_path_factory.mktemp("uv")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", UV], check=True, timeout=300)
    index = os.environ.get("PIP_INDEX_URL") or pip("config", "get", "global.index-url").stdout.strip()
    named = {"UV_DEFAULT_INDEX": index} if index else {}
    return {**os.environ, "UV": str(folder / "bin" / "uv"), "UV_PYTHON_DOWNLOADS": "never", **named}


@pytest.mark.slow
def test_the_package_index_still_resolves_both_gpu_locks_as_they_are(uv: dict[str, str], tmp_path: Path) -> None:
    """Metadata alone is read. A pinned version that was withdrawn, or that no longer fits, changes the lock."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    command = ["bash", "requirements/lock.sh"]
    told = subprocess.run(command, cwd=tmp_path, env=uv, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    for name in (TRAINER, SERVER):
        assert (tmp_path / "requirements" / name).read_text() == (ROOT / "requirements" / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [TRAINER, SERVER])
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_each_gpu_lock_is_complete_on_both_pythons(uv: dict[str, str], name: str, python: str, tmp_path: Path) -> None:
    command = [uv["UV"], "pip", "compile", "--quiet", "--only-binary", ":all:", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_34"]
    command.append(str(ROOT / "requirements" / name))
    told = subprocess.run(command, cwd=tmp_path, env=uv, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    found = dict(line.split("==") for line in told.stdout.split())
    assert found == {package: version for package, (version, _) in pins(name).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pins(SOURCE)))
def test_what_is_built_from_source_exists_and_has_no_wheel(name: str, tmp_path: Path) -> None:
    version = pins(SOURCE)[name][0]
    found = pip("index", "versions", name)
    assert version in re.split(r"[ ,\n]+", found.stdout), found
    binary = pip("download", "--no-deps", "--only-binary", ":all:", "-d", str(tmp_path), f"{name}=={version}")
    assert binary.returncode and "No matching distribution found" in binary.stderr, "it has a wheel now"
