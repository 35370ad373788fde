"""A NaN loss stops its step on every rank. The error names the sample, and the optimizer makes no step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.glue.faults import on_ranks
from tests.glue.launch import Launch
from tests.glue.stubs import make_config, make_layout, make_rollouts, one_rank
from tropd_mcore.errors import TrainingError
from tropd_mcore.mcore.loss import LossResult
from tropd_mcore.types import MicroBatch

SAMPLE, TOKEN = 2, 4
"""(rollout, token) of a step at which the loss is NaN."""


@dataclass
class BrokenLaunch(Launch):
    """From update number `healthy_updates` on, the loss of one token is NaN."""

    healthy_updates: int = 0

    def _loss(self, *given: Any, **named: Any) -> Callable[[MicroBatch, int], LossResult]:
        healthy = super()._loss(*given, **named)

        def loss(micro_batch: MicroBatch, index: int) -> LossResult:
            result = healthy(micro_batch, index)
            rows_T = (micro_batch.sample_index_T == SAMPLE) & (micro_batch.token_index_T == TOKEN)
            if self.updates < self.healthy_updates or not rows_T.any():
                return result
            columns = {**result.columns, "loss": result.columns["loss"].masked_fill(rows_T, torch.nan)}
            return dataclasses.replace(
                result, loss_sum=torch.tensor(torch.nan), broken=torch.tensor(True), columns=columns
            )

        return loss


def outcome(launch: BrokenLaunch, last_step: int) -> tuple[str, BrokenLaunch]:
    """The error that stopped the launch."""
    try:
        launch.run(0, last_step)
    except TrainingError as error:
        return str(error), launch
    return "nothing", launch


def on_this_rank(run_dir: Path) -> tuple[str, int, list[int]]:
    """(error that stopped the launch, optimizer steps, samples of this rank)"""
    error, launch = outcome(BrokenLaunch(make_config(run_dir), make_layout()), 1)
    return error, launch.updates, sorted({sample for _, samples in launch.did("gradients") for sample in samples})


@pytest.mark.parametrize("healthy_updates", [0, 2])
def test_a_broken_loss_names_the_sample_and_makes_no_optimizer_step(tmp_path: Path, healthy_updates: int) -> None:
    with one_rank() as layout:
        launch = BrokenLaunch(make_config(tmp_path), layout, has_average=True, healthy_updates=healthy_updates)
        error, _ = outcome(launch, 4)
    sample_id = make_rollouts(healthy_updates)[SAMPLE].sample_id
    assert f"step {healthy_updates}: the loss of micro-batch" in error
    assert f"first at sample {sample_id}, token {TOKEN} " in error
    assert [step for _, step in launch.did("optimizer")] == list(range(healthy_updates))
    assert [step for _, step in launch.did("log")] == list(range(healthy_updates))
    assert len(launch.did("average")) == healthy_updates and launch.did("save") == []


def test_a_loss_that_is_broken_on_one_rank_stops_both_before_the_optimizer(tmp_path: Path) -> None:
    (first_error, *first), (second_error, *second) = on_ranks(on_this_rank, 2, tmp_path)
    assert [updates for updates, _ in (first, second)] == [0, 0]
    assert [SAMPLE in samples for _, samples in (first, second)].count(True) == 1
    assert first_error == second_error and make_rollouts(0)[SAMPLE].sample_id in first_error
