"""Code that the ranks of the model-check tests run: build a model, break it, compare it. Not a test module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.dist.checkpoint_ranks import Setup, build_student, digests, train
from tests.dist.conversion_ranks import open_layout
from tests.dist.layouts import Case, layout_of
from tests.glue.stubs import make_config
from tropd_mcore.mcore.checkpoint import TrainState
from tropd_mcore.mcore.loss_settings import LossSettings
from tropd_mcore.mcore.model import Model, build_model
from tropd_mcore.mcore.optimizer import build_optimizer
from tropd_mcore.mcore.parallel import destroy
from tropd_mcore.mcore.probe import probe_log_probs
from tropd_mcore.mcore.weights_io import load_hf, named_parameters
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.inputs import Inputs, ModelInput
from tropd_mcore.train.model_check import check_model
from tropd_mcore.weights.architecture import read_architecture
from tropd_mcore.weights.digest import folder_digest
from tropd_mcore.weights.independent import probe_ids


@dataclass(frozen=True)
class Fault:
    """A fault of the Megatron model of a valid folder."""

    architecture: tuple[tuple[str, Any], ...] = ()
    """Fields that are built with other values."""
    parameter: str = ""
    """The first parameter whose name ends like this is scaled by 1.05 on the rank that has it."""
    replica: int | None = None
    """Only on this data rank."""


def differences(folder: Path, root: Path, cases: dict[str, Case], fault: Fault) -> dict[str, str]:
    """{case: result of `check_model`}: "passed", or its error."""
    return {name: _said(folder, root / name, case, fault) for name, case in cases.items()}


def _said(folder: Path, root: Path, case: Case, fault: Fault) -> str:
    with layout_of(case) as (layout, platform):
        arch = replace(read_architecture(folder), **dict(fault.architecture))
        trainable = case.virtual_pipeline is not None  # only a student is interleaved
        model = build_model(
            arch, case.parallel, layout, platform, dtype=case.dtype, trainable=trainable,
            optimizer=case.optimizer if trainable else None,
        )  # fmt: skip
        _load(model, folder, layout)
        if fault.parameter and fault.replica in (None, layout.dp_rank):
            _scale(model, fault.parameter)
        context = _site(folder, root, layout, platform, case)
        try:
            check_model(context, "teacher.path", model, _inputs(folder))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "passed"


def trained(folder: Path, setup: Setup, is_compared: bool) -> dict[str, str]:
    """Digests of a student's training state after two steps, with or without a check before its optimizer is built."""
    job = open_layout(setup.parallel)
    student = build_student(folder, job, setup)
    if is_compared:
        probe_log_probs(student, probe_ids(folder), LossSettings.from_config(make_config()))
    state = TrainState(student, *build_optimizer(student, setup.optimizer, setup.steps))
    train(state, 0, 2)
    found = digests(state)
    destroy(job.layout)
    return found


def _load(model: Model, folder: Path, layout: Any) -> None:
    """Load the weights of the folder into the model, whatever is wrong with its other fields."""
    load_hf(replace(model, arch=read_architecture(folder)), folder, layout)


@torch.no_grad()
def _scale(model: Model, suffix: str) -> None:
    for name, parameter in named_parameters(model).items():
        if name.endswith(suffix):
            parameter.mul_(1.05)
            return


def _site(folder: Path, root: Path, layout: Any, platform: Any, case: Case) -> Any:
    config = make_config(root, teacher={"path": folder, "dtype": case.dtype}, loss={"form": case.form})
    return SimpleNamespace(config=config, layout=layout, platform=platform, run_dir=RunDir(root))


def _inputs(folder: Path) -> Inputs:
    files = dict(folder_digest(folder).files)
    return Inputs(data={}, models={"teacher.path": ModelInput(path=str(folder), files=files)}, launch={"ranks": "n"})
