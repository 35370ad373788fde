"""The wheel away from any checkout: its recipes and scripts copied into a new folder, and every command run there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import jobs
from tests.wheels import build, pip
from tropd_mcore.cli.main import COMMANDS

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]


def test_the_wheel_runs_the_quickstart_and_every_command_outside_the_checkout(example: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "elsewhere"
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", site, build(tmp_path))
    folder.mkdir()
    called: set[str] = set()

    def run(*command: str, **extra: str) -> str:
        """Run a command in the folder. The environment has the installed package and not the checkout."""
        done = subprocess.run(
            command, cwd=folder, env=jobs.environment(PYTHONPATH=str(site), **extra), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=jobs.LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
        return done.stdout

    def tropd(command: str, *arguments: str) -> str:
        called.add(command)
        return run(sys.executable, str(site / "bin" / "tropd"), command, *arguments)

    where = run(sys.executable, "-c", "import tropd_mcore, tropd_mcore.cli.main; print(tropd_mcore.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    listed = tropd("recipes")
    assert "configs/quickstart-cpu.yaml" in listed and "examples/tropd_pretrain.sh" in listed
    tropd("recipes", "--all")
    assert "exist already" in tropd("recipes", "--all")

    shutil.copytree(example, folder / "models" / "arithmetic-tiny")  # files that the script would need minutes to make
    printed = run(
        "bash", "examples/quickstart.sh", "run.steps=4", "run.checkpoint_every=2", "rollout.prompts_per_step=8",
        QUICKSTART_SIZE="tiny",
    )  # fmt: skip
    assert "Everything is in" in printed
    called |= {"prefixes", "eval", "train", "report"}  # the steps of that script
    run_dir = folder / "runs" / "quickstart-tiny"
    assert (run_dir / "report.html").is_file() and (run_dir / "export" / "model.safetensors").is_file()

    config = "configs/quickstart-cpu.yaml"
    student = "models/arithmetic-tiny/student"
    assert "steps: 60" in tropd("config", config)
    assert "trust" in tropd("metrics")
    (folder / "set.jsonl").write_text('{"question": "What is 2 plus 3?"}\n')
    assert "1 prompts" in tropd("prompts", "set.jsonl", "--prompt-field", "question", "--out", "set-prompts.jsonl")
    assert "missing  main" in tropd("study", "configs/study/arithmetic.yaml", "--list")
    assert "ok" in tropd("doctor")
    assert "selftest: passed" in tropd("selftest")
    assert "0 missed" in tropd("conformance", "--quick", "--objective", "opd")
    tropd("convert", "hf-to-mcore", "--hf", student, "--out", "checkpoint")
    run(sys.executable, "conversion/mcore_to_hf.py", "--mcore", "checkpoint", "--out", "back")
    assert "equal" in tropd("convert", "verify", "--hf", student, "--other-hf", "back")
    assert called == set(COMMANDS)
