"""The report of a selftest: one Markdown file with what was found, on what, and the logs of what failed.

Invariant: nothing in it is secret. Of the environment it has only the variables of `VARIABLES`, and the home and work
folders are written as ~ and $WORK.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tropd_mcore.selftest.checks import Outcome, Place

PACKAGES = (
    "tropd-mcore", "torch", "triton", "megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn",
    "apex", "sglang", "sglang-kernel", "flashinfer-python", "transformers", "tokenizers", "numpy", "pydantic",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDNN_HOME", "LD_LIBRARY_PATH", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def markdown(outcomes: Sequence[Outcome], place: Place, seconds: float, environ: Mapping[str, str]) -> str:
    """Return the report."""
    failed = [outcome for outcome in outcomes if outcome.status == "FAIL"]
    lines = [
        "# tropd selftest",
        "",
        f"{'FAILED: ' + ', '.join(one.name for one in failed) if failed else 'All checks passed'}, in {seconds:.0f} s, "
        f"on {place.platform} with {place.devices} {'GPUs' if place.platform == 'cuda' else 'ranks'}.",
        "",
        "| check | result | seconds | found |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.status} | {one.seconds:.1f} | {_cell(one.detail)} |" for one in outcomes),
        "",
        "## Machine",
        "",
        *(f"- {text}" for text in machine(environ)),
        "",
    ]
    for title, name in (("What tropd doctor says", "machine.log"), ("Configuration of the job", "selftest.yaml")):
        lines += _block(title, place.folder / name)
    if place.overrides:
        lines += ["Overrides: " + " ".join(place.overrides), ""]
    for outcome in failed:
        lines += [f"## End of the log of {outcome.name}", "", "```", outcome.log_tail, "```", ""]
        if outcome.name == "job":
            for written in sorted((place.run_dir / "logs").glob("*.log")):
                lines += _block(f"End of {written.name}", written)
    return _without_paths("\n".join(lines), place.folder, environ)


def machine(environ: Mapping[str, str]) -> list[str]:
    """Return lines about hardware, system, packages and the environment variables that change numbers."""
    found = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    named = {name: environ[name] for name in VARIABLES if name in environ}
    return [
        f"{platform.platform()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores",
        *_gpus(),
        "packages: " + ", ".join(f"{name} {version}" for name, version in found.items()),
        "environment: " + (", ".join(f"{name}={value}" for name, value in named.items()) or "none of the known names"),
    ]


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ["no answer of nvidia-smi"]
    return [f"GPU: {line.strip()}" for line in answer.splitlines() if line.strip()]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _block(title: str, path: Path, lines: int = 60) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
    return [f"## {title}", "", "```", *text, "```", ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _without_paths(text: str, folder: Path, environ: Mapping[str, str]) -> str:
    text = text.replace(str(folder), "$WORK")
    home = environ.get("HOME", "")
    return text.replace(home, "~") if len(home) > 1 else text
