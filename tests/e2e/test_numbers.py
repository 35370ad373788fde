"""Whole jobs of every objective have the numbers of one CPU run, on a CPU and on a GPU.

They replay rollouts, in float32, on one rank of the platform that is there. `tests/golden/objectives.json` holds the
numbers; `python -m tests.e2e.test_numbers` on a CPU writes it anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.e2e import jobs, replayed
from tests.e2e.replayed import Stage
from tropd_mcore.conformance.ranks import Pool
from tropd_mcore.mcore.platform import PlatformKind, meant

LIMIT_S = 900.0
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(LIMIT_S),
    pytest.mark.skipif(
        torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is None,
        reason="a GPU needs Transformer Engine for PyTorch",
    ),
]
GOLDEN = Path(__file__).parent.parent / "golden" / "objectives.json"
SEVERAL = "policy_gradient: {ratio: ppo_clip, mini_batches: 2, epochs: 2}"
SDPO = "kind: sdpo, topk: 9, student_topk: 12, average_rate: 0.5, template: '{prompt} ({solution}) so'"
OBJECTIVES = {
    "tropd": "kind: tropd, outlier: {topk: 9}, guidance: {enabled: false}",
    "opd": "kind: opd, topk: 9",
    "opd-updates": f"kind: opd, topk: 9, {SEVERAL}",
    "aopd": "kind: aopd, topk: 9",
    "tropd_aopd": "kind: tropd_aopd, outlier: {topk: 9}, guidance: {enabled: false}",
    "rethinking": "kind: rethinking, topk: 9, student_topk: 7, support: intersection",
    "eopd": "kind: eopd, topk: 9",
    "jsd": "kind: jsd, topk: 9",
    "gkd": "kind: gkd, topk: 9",
    "gkd-whole": "kind: gkd, topk: 9, full_vocabulary: true",
    "lsm": "kind: lsm, topk: 9",
    "reopold": "kind: reopold, topk: 9",
    "entropy_opd": "kind: entropy_opd, topk: 9, fraction: 0.3",
    "exopd": "kind: exopd, topk: 9, reference: REFERENCE",
    "topd": "kind: topd, topk: 9",
    "vopd": "kind: vopd, topk: 9, student_topk: 7",
    "iw_opd": "kind: iw_opd, topk: 9",
    "power_opd": "kind: power_opd, topk: 9",
    "sdpo": SDPO,
    "kdrl": "kind: kdrl, topk: 9",
    "rlad": "kind: rlad, topk: 9",
}
OTHERS = {
    "sdpo": ["teacher.path=STUDENT", "batch.tokens_per_micro_batch=160"],
    "opd": ["loss.ignore_tokens=[a, ' apple']", "rollout.truncate={start: 3, increment: 2, every: 1}"],
    "aopd": ["loss.form=logits"],
    "eopd": ["loss.weight_gradient=folded"],
    "vopd": ["gates.longest_sequence=true"],
    "topd": ["loss.weight_gradient=recompute"],
    "jsd": ["student.recompute=full"],
}
METRICS = ("loss/total", "loss/objective", "optimizer/grad_norm", "optimizer/token_count",
           "entropy/student", "trust/fraction")  # fmt: skip
TOLERANCE = 1e-3
"""Relative, and absolute where a number is near zero: two steps in float32, in another order."""
ENVIRONMENTS: dict[PlatformKind, dict[str, str]] = {
    "cpu": {"TORCHDYNAMO_DISABLE": "1"},
    "cuda": {"NVIDIA_TF32_OVERRIDE": "0"},  # products of float32 numbers, not of rounded ones
}


def run_all(config: Path, wanted: dict[str, list[str]], kind: PlatformKind) -> dict[str, str]:
    """On the rank: one job after the other; {name: traceback} of those that failed."""
    failed = {}
    if dist.is_initialized():
        dist.destroy_process_group()  # the one of `Pool`, which has gloo alone
    for name, overrides in wanted.items():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            replayed.run_jobs(config, [[*overrides, f"platform.kind={kind}"]])
        except Exception:  # whatever it is belongs to the one test of this job
            failed[name] = traceback.format_exc()
        finally:
            dist.destroy_process_group()
    return failed


def run_on_the_platform_at_hand(stage: Stage) -> dict[str, str]:
    """All jobs; {name: traceback} of those that failed."""
    places = {"STUDENT": stage.model("student"), "REFERENCE": stage.model("reference")}
    wanted = {}
    for name, objective in OBJECTIVES.items():
        changes = [f"objective={{{objective}}}", "parallel.tensor=1", *OTHERS.get(name, [])]
        wanted[name] = replayed.overrides(stage, name, changes, places)
    kind = meant("auto")
    with contextlib.closing(Pool(ENVIRONMENTS[kind])) as pool:
        failed: dict[str, str] = pool.run(run_all, 1, stage.config, wanted, kind, timeout_s=LIMIT_S)[0]
    return failed


def numbers(run: Path) -> list[dict[str, float]]:
    """The metrics that are compared, of each step."""
    return [{name: line[name] for name in METRICS if name in line} for line in jobs.metrics(run)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return replayed.set_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def failed(stage: Stage) -> dict[str, str]:
    return run_on_the_platform_at_hand(stage)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_job_has_the_numbers_of_the_golden_one(stage: Stage, failed: dict[str, str], name: str) -> None:
    assert name not in failed, failed[name]
    found, expected = numbers(stage.run(name)), json.loads(GOLDEN.read_text())[name]
    assert len(found) == len(expected) == replayed.STEPS
    for step, (line, golden) in enumerate(zip(found, expected, strict=True)):
        assert line.keys() == golden.keys()
        for metric, value in golden.items():
            assert math.isclose(line[metric], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (
                f"step {step}: {metric} is {line[metric]}, expected {value}"
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        at = replayed.set_stage(Path(folder))
        assert meant("auto") == "cpu", "the golden numbers are those of a CPU"
        assert not (problems := run_on_the_platform_at_hand(at)), problems
        lines = (f'"{name}": {json.dumps(numbers(at.run(name)))}' for name in OBJECTIVES)
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
