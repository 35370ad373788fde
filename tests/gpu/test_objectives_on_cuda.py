"""Whole jobs of every objective on a GPU have the metrics that they have on a CPU.

The rollouts are replayed, both are float32 (without TF32), and the CPU platform runs in a process that sees no GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.e2e import jobs, replayed
from tests.e2e.replayed import Stage
from tropd_mcore.conformance.ranks import Pool
from tropd_mcore.mcore.platform import PlatformKind

HAS_ENGINE = importlib.util.find_spec("transformer_engine") is not None
LIMIT_S = 500.0
pytestmark = [
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_ENGINE), reason="needs a GPU, and Transformer Engine for PyTorch"
    ),
    pytest.mark.timeout(2 * LIMIT_S),
]
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
TOLERANCE = 1e-3
"""Relative, and absolute where a number is near zero: two steps in float32, in another order."""


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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return replayed.set_stage(tmp_path_factory.mktemp("stage"))


def overrides(stage: Stage, name: str, kind: PlatformKind) -> list[str]:
    places = {"STUDENT": stage.model("student"), "REFERENCE": stage.model("reference")}
    objective = f"objective={{{OBJECTIVES[name]}}}"
    wanted = [objective, "parallel.tensor=1", *OTHERS.get(name, [])]
    return replayed.overrides(stage, f"{name}-{kind}", wanted, places)


@pytest.fixture(scope="module")
def failed(stage: Stage) -> dict[str, dict[str, str]]:
    """{kind: {name: traceback}} of all jobs on both platforms."""
    found = {}
    environments: dict[PlatformKind, dict[str, str]] = {
        "cpu": {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"},
        "cuda": {"NVIDIA_TF32_OVERRIDE": "0"},
    }
    for kind, environment in environments.items():
        wanted = {name: overrides(stage, name, kind) for name in OBJECTIVES}
        with contextlib.closing(Pool(environment)) as pool:
            found[str(kind)] = pool.run(run_all, 1, stage.config, wanted, kind, timeout_s=LIMIT_S)[0]
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_job_on_a_gpu_has_the_metrics_of_the_one_on_a_cpu(
    stage: Stage, failed: dict[str, dict[str, str]], name: str
) -> None:
    for kind in ("cuda", "cpu"):
        assert name not in failed[kind], f"{kind}: {failed[kind][name]}"
    found, expected = (jobs.curve(stage.run(f"{name}-{kind}")) for kind in ("cuda", "cpu"))
    assert len(found) == len(expected) == replayed.STEPS
    far = []
    for line, reference in zip(found, expected, strict=True):
        assert line.keys() == reference.keys()
        for metric, value in reference.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not math.isclose(line[metric], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                    far.append((line["step"], metric, line[metric], value))
            else:
                assert line[metric] == value, metric
    assert not far
