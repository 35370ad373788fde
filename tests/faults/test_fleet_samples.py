"""What the suite says about the samples that a fleet has stored: whole steps pass, every kind of damage is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.fleet import PROMPTS, UNDISTURBED_STEPS, sample_problems
from tests.faults.registry import fleet_faults
from tests.faults.stage import SAMPLES, Stage
from tests.faults.verdict import FLEET
from tests.glue.stubs import make_rollout
from tropd_mcore.records.replay import save_rollouts
from tropd_mcore.types import Rollout

Damage = Callable[[list[Rollout]], list[Rollout]]


def ids_of(step: int) -> list[str]:
    return [f"{step:06d}/p{number}/0" for number in range(PROMPTS * SAMPLES)]


def whole(step: int) -> list[Rollout]:
    return [make_rollout(name, name.split("/")[1], 3, version=f"launch/step-{step:06d}") for name in ids_of(step)]


def problems(folder: Path, damage: Damage) -> list[str]:
    """Of two steps on disk, the second of which is damaged."""
    stored = folder / "rollouts"
    stored.mkdir()
    for step in range(2):
        rollouts = whole(step)
        save_rollouts(stored / f"step_{step:06d}.npz", damage(rollouts) if step else rollouts)
    made = SimpleNamespace(stage=Stage(folder), run_dir=folder)
    made.stage.samples = {step: ids_of(step) for step in range(UNDISTURBED_STEPS)}
    return sample_problems(made)  # type: ignore[arg-type]


def of_version(rollouts: list[Rollout], version: str, count: int) -> list[Rollout]:
    changed = [dataclasses.replace(each, policy_version=version) for each in rollouts[:count]]
    return [*changed, *rollouts[count:]]


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a sample is missing": (lambda found: found[1:], "step 1 has the samples"),
    "two samples changed places": (lambda found: [found[1], found[0], *found[2:]], "step 1 has the samples"),
    "one sample of the step before": (lambda found: of_version(found, "launch/step-000000", 1), "of the weights"),
    "all samples of the step before": (lambda found: of_version(found, "launch/step-000000", 99), "of the weights"),
    "samples of two launches": (lambda found: of_version(found, "other/step-000001", 3), "of the weights"),
}


def test_whole_steps_of_a_fleet_have_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, lambda found: found) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_samples_of_a_step_of_a_fleet_are_named(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    (found,) = problems(tmp_path, damage)
    assert message in found


def test_every_fleet_fault_has_its_group_a_limit_and_an_id_that_begins_with_it() -> None:
    found: list[Any] = fleet_faults()
    assert len(found) >= 30
    assert all(each.group == FLEET and each.id.startswith("fleet-") and each.limit_s > 0 for each in found)
