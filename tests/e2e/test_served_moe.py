"""A dense student learns from a mixture of experts behind a real server, which Megatron could not build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.e2e import jobs
from tests.tiny_models import write_moe_teacher
from tropd_mcore.weights.hf_folder import HfReader

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

STEPS = 3
LOUD = 8.0
"""Factor on the output layer's weights, so that a random model is sure of its words."""


def name_all_tokens(folder: Path) -> None:
    """Change the random model so that it samples tokens with a text, and hardly ever the end of an answer.

    Else some responses are empty, which training refuses.
    """
    path = folder / "model.safetensors"
    weights = load_file(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = weights["lm_head.weight"] * LOUD
    head[len(tokenizer) :] = 0
    head[tokenizer.all_special_ids] = 0
    save_file({**weights, "lm_head.weight": head}, path, metadata={"format": "pt"})


def test_a_dense_student_learns_from_a_served_mixture_of_experts(
    example: Path, settings: list[str], tmp_path: Path
) -> None:
    """Responses, scores and held-out measurements come from its server, and the identity gate knows its weights.

    On the teacher's own held-out responses, forward KL falls from step 0 to the last step.
    """
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}  # multiples of 32, which fast kernels of SGLang need
    teacher = write_moe_teacher(tmp_path / "teacher", example / "student", seed=5, **sizes)
    name_all_tokens(teacher)
    responses, run_dir = tmp_path / "responses.jsonl", tmp_path / "run"
    served = [
        *settings,
        f"teacher.path={teacher}",
        "teacher.kind=sglang",
        "teacher.server.max_total_tokens=8192",
        f"data.teacher_responses={responses}",
        f"run.steps={STEPS}",
        f"run.dir={run_dir}",
        "optimizer.learning_rate=1e-3",
    ]
    made = subprocess.run(
        [sys.executable, "-m", "tropd_mcore.cli.main", "prefixes", str(jobs.CONFIG), *served, "--max-new-tokens", "24"],
        cwd=jobs.REPOSITORY,
        env=jobs.environment(),
        capture_output=True,
        text=True,
        timeout=jobs.LIMIT_S,
    )
    assert made.returncode == 0, made.stderr[-4000:]
    assert "gates.teacher_identity: teacher.server" in made.stderr + made.stdout

    output = jobs.run(run_dir, *served)
    (line,) = [line for line in output.splitlines() if "fingerprint from teacher.path: " in line]
    apart = float(line.rpartition("fingerprint from teacher.path: ")[2].split()[0])
    assert apart < 1e-4, line
    lines = jobs.metrics(run_dir)
    assert [entry["step"] for entry in lines] == list(range(STEPS))
    assert all(entry["teacher/masked_samples"] == 0 for entry in lines)
    first, last = lines[0]["held_out/forward_kl"], lines[-1]["held_out/forward_kl"]
    assert 0.0 < last < first, (first, last)
    with HfReader(run_dir / "export") as exported, HfReader(example / "student") as before:
        exported.check()
        assert exported.arch.family == "qwen3"
        assert any(not exported.tensor(name).equal(before.tensor(name)) for name in before.names())
