"""What `tropd doctor` says of GPUs, on machines that a fake nvidia-smi and a fake torch describe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tropd_mcore.cli import checks_of_gpus
from tropd_mcore.cli.checks_of_gpus import (
    Gpu,
    TorchBuild,
    driver,
    gpus_of_driver,
    imported,
    interfaces,
    server_libraries,
)
from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.schema import Config

GIB = 2**30
CUDA_13 = TorchBuild("2.11.0+cu130", "13.0", sees_gpus=True)
CPU_BUILD = TorchBuild("2.13.0+cpu", None, sees_gpus=False)


def gpu(index: int = 0, *, driver: str = "580.159.03", used: int = 0) -> Gpu:
    return Gpu(index, "NVIDIA H200", driver, 140 * GIB, used * GIB)


def levels(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program nvidia-smi, first on PATH; the test writes what it does."""
    path = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return path


def write(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_gpus_are_read_from_nvidia_smi(smi: Path) -> None:
    write(smi, "echo '0, NVIDIA H200, 580.159.03, 143771, 4'; echo '1, NVIDIA H200, 580.159.03, 143771, 143000'")
    found = gpus_of_driver()
    assert [(one.index, one.driver) for one in found if isinstance(one, Gpu)] == [(0, "580.159.03"), (1, "580.159.03")]
    assert isinstance(found[1], Gpu) and found[1].used == 143000 * 2**20


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Failed to initialize NVML: version mismatch'; exit 18", "NVML: version mismatch"),
        ("echo 'no devices were found' >&2; exit 6", "no devices were found"),
        ("exit 9", "exit code 9"),
        ("echo '0, NVIDIA, [N/A]'", "printed no GPU"),
        ("", "printed no GPU"),
    ],
)  # fmt: skip
def test_an_nvidia_smi_that_fails_or_lies_is_a_warning_with_its_words(smi: Path, script: str, said: str) -> None:
    write(smi, script)
    (finding,) = driver(CUDA_13, gpus_of_driver(), {})
    assert finding.level == "warn" and said in finding.detail and "\n" not in finding.detail


def test_a_hanging_nvidia_smi_does_not_hang_doctor(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(smi, "exec sleep 600")
    monkeypatch.setattr(checks_of_gpus, "ASK_S", 0.2)
    assert "timed out" in str(gpus_of_driver())


def test_without_nvidia_smi_nothing_is_said_of_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(driver(CPU_BUILD, gpus_of_driver(), {})) == []


def test_the_free_memory_of_each_gpu_is_named_and_one_in_use_is_a_warning() -> None:
    found = list(driver(CUDA_13, [gpu(0), gpu(1, used=60)], {}))
    assert levels(iter(found)) == {"driver": "ok", "GPU 0": "ok", "GPU 1": "warn"}
    assert "80.0 of 140.0 GiB free" in found[-1].detail


@pytest.mark.parametrize(
    ("build", "driver_version", "environ", "level", "said"),
    [
        (CUDA_13, "535.183.01", {}, "FAIL", "needs driver 580 or newer"),
        (TorchBuild("2.9.0+cu128", "12.8", sees_gpus=True), "535.183.01", {}, "ok", "CUDA 12.8"),
        (CPU_BUILD, "580.1", {}, "warn", "CPU build and will not use them"),
        (TorchBuild("2.11.0", "13.0", sees_gpus=False), "580.1", {}, "FAIL", "sees no GPU"),
        (TorchBuild("2.11.0", "13.0", sees_gpus=False), "580.1", {"CUDA_VISIBLE_DEVICES": ""}, "ok", "hidden"),
        (TorchBuild("2.11.0", "13.0", sees_gpus=False), "580.1", {"CUDA_VISIBLE_DEVICES": "7"}, "FAIL", "='7'"),
    ],
)
def test_torch_and_driver_are_compared(
    build: TorchBuild, driver_version: str, environ: dict[str, str], level: str, said: str
) -> None:
    first = next(driver(build, [gpu(driver=driver_version)], environ))
    assert (first.name, first.level) == ("driver", level) and said in first.detail


def test_an_import_is_proved_in_another_process_and_gives_its_version() -> None:
    assert imported("x", sys.executable, "numpy", "remedy").detail.startswith("numpy ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("import os; os._exit(139)", "exit code 139"),
    ],
)
def test_a_package_that_breaks_at_its_import_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    (tmp_path / "broken_package.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = imported("Transformer Engine", sys.executable, "broken_package", "see docs")
    assert finding.level == "FAIL" and said in finding.detail and finding.detail.endswith("see docs")


def test_an_import_that_hangs_ends_and_an_interpreter_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_package.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(checks_of_gpus, "IMPORT_S", 0.5)
    assert "did not end in" in imported("x", sys.executable, "slow_package", "r").detail
    assert "No such file" in imported("x", str(tmp_path / "nowhere"), "numpy", "r").detail


def test_the_server_is_imported_only_for_a_job_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def note(name: str, _python: str, module: str, _remedy: str) -> Finding:
        asked.append((name, module))
        return Finding("ok", name, module)

    monkeypatch.setattr(checks_of_gpus, "imported", note)
    paths = {"student": {"path": "a"}, "teacher": {"path": "b"}, "run": {"dir": "c"}, "data": {"prompts": "p"}}
    cuda = Config.model_validate({**paths, "objective": {"kind": "opd"}, "platform": {"kind": "cuda"}})
    list(server_libraries(cuda.model_copy(update={"platform": cuda.platform.model_copy(update={"kind": "cpu"})}), {}))
    assert asked == []
    list(server_libraries(cuda, {}))
    assert [name for name, _ in asked] == ["rollout.server"] * 2 and asked[0][1] == "sgl_kernel"


TWO = {"eth0": "192.0.2.2", "ib0": "198.51.100.2"}


@pytest.mark.parametrize(
    ("nodes", "addresses", "environ", "level", "said"),
    [
        (1, TWO, {}, "ok", "eth0 192.0.2.2, ib0 198.51.100.2"),
        (4, TWO, {}, "warn", "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"),
        (4, TWO, {"NCCL_SOCKET_IFNAME": "ib"}, "warn", "set GLOO_SOCKET_IFNAME to"),
        (4, TWO, {"NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "ib0"}, "ok", "ib0"),
        (4, TWO, {"NCCL_SOCKET_IFNAME": "^eth,lo", "GLOO_SOCKET_IFNAME": "ib0"}, "ok", "ib0"),
        (4, {"eth0": "192.0.2.2"}, {}, "ok", "eth0"),
        (4, {}, {}, "FAIL", "none but the loopback"),
        (1, TWO, {"GLOO_SOCKET_IFNAME": "ib1"}, "FAIL", "GLOO_SOCKET_IFNAME=ib1: this machine has no such interface"),
        (1, TWO, {"GLOO_SOCKET_IFNAME": "ib"}, "FAIL", "GLOO_SOCKET_IFNAME=ib:"),
        (1, TWO, {"NCCL_SOCKET_IFNAME": "=ib"}, "FAIL", "NCCL_SOCKET_IFNAME==ib:"),
        (1, TWO, {"NCCL_SOCKET_IFNAME": "^eth,ib,lo"}, "FAIL", "NCCL_SOCKET_IFNAME=^eth,ib,lo:"),
    ],
)
def test_machines_with_several_interfaces_are_told_to_name_one(
    nodes: int, addresses: dict[str, str], environ: dict[str, str], level: str, said: str
) -> None:
    (finding,) = interfaces(nodes, environ, lambda: addresses)
    assert finding.level == level and said in finding.detail


def test_a_missing_cuda_toolkit_is_told_by_the_place_in_which_sglang_looks_for_it(tmp_path: Path) -> None:
    def text(**environ: str) -> str | None:
        found = checks_of_gpus._toolkit_problem({"PATH": "", **environ}, usual=tmp_path / "usual")
        return None if found is None else found.detail.split(",")[0]

    assert text() == f"{tmp_path / 'usual'} has no bin/nvcc"
    assert text(CUDA_HOME=str(tmp_path / "home")) == f"{tmp_path / 'home'} has no bin/nvcc"
    assert text(CUDA_PATH=str(tmp_path / "path")) == f"{tmp_path / 'path'} has no bin/nvcc"
    for place in ("usual", "home"):
        nvcc = tmp_path / place / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    assert text() is None and text(CUDA_HOME=str(tmp_path / "home")) is None
    assert text(PATH=str(tmp_path / "home" / "bin")) is None
