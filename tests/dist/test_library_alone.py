"""TrOPD in an environment with only torch: on two ranks, the trainer's loss and gradient bit for bit.

`TORCH_ONLY_PYTHON=/path/to/python` runs it in such an environment. Otherwise the other modules are hidden in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import library_alone
from tests.dist import reference
from tests.dist.layouts import Case, Constants, build, layout_of, train_step
from tests.dist.test_layouts import CONSTANTS, LENGTHS
from tests.ranks import run_on_ranks
from tropd_mcore.mcore import loss as trainers
from tropd_mcore.types import Rollout


def _record(
    student_folder: Path, teacher_folder: Path, rollouts: list[Rollout], case: Case, constants: Constants, folder: Path
) -> int:
    """One step of the trainer. The inputs and outputs of each loss call are written to a file per rank."""
    calls: list[dict[str, Any]] = []
    distill_loss = trainers.distill_loss

    def noted(student: Any, target_ids_T: Any, teacher: Any, objective: Any, *, vp: Any, **given: Any) -> Any:
        call = {
            "hidden": student.hidden_TD.detach().clone(),
            "weight": student.weight_WD.detach().clone(),
            "reduce": student.reduce_hidden_grad,
            "target_ids_T": target_ids_T,
            "teacher": dict(vars(teacher)),
            "constants": {name: value for name, value in objective.values.items() if name != "policy"},
            "vp": {name: value for name, value in vars(vp).items() if name != "group"},
            "weight_grad": student.weight_grad,
            "given": {name: number for name, number in given.items() if number is not None},
        }
        student.hidden_TD.register_hook(lambda gradient: call.update(gradient=gradient.clone()))
        out = distill_loss(student, target_ids_T, teacher, objective, vp=vp, **given)
        calls.append(call)
        call["value"] = out.value
        return out

    trainers.distill_loss = noted
    try:
        with layout_of(case) as (layout, platform):
            student = build(student_folder, case, layout, platform, trainable=True)
            teacher = build(teacher_folder, case, layout, platform, trainable=False)
            train_step(student, teacher, rollouts, case, constants)
    finally:
        trainers.distill_loss = distill_loss
    torch.save(calls, folder / f"rank-{dist.get_rank()}.pt")
    return len(calls)


def test_the_library_with_torch_alone_gives_the_bits_of_the_trainer(tmp_path: Path) -> None:
    student = reference.write_model(next(iter(reference.STUDENTS.values())), tmp_path / "student", seed=3)
    teacher = reference.write_model(reference.TEACHER, tmp_path / "teacher", seed=11)
    record = tmp_path / "record"
    record.mkdir()
    calls = run_on_ranks(
        _record, 2, student, teacher, reference.make_rollouts(LENGTHS), Case(tensor=2), CONSTANTS, record
    )
    assert calls[0] == calls[1] > 1
    python = os.environ.get("TORCH_ONLY_PYTHON", sys.executable)
    program = Path(library_alone.__file__).resolve()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": ""}
    found = subprocess.run(
        [python, str(program), str(record)], capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path
    )
    print(found.stdout)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count(f"{calls[0]} of {calls[0]} calls are the trainer's, bit for bit") == 2
