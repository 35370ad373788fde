"""Reads what a run wrote and what was measured from outside, and computes seconds per part and to the target.

Pure: lines and samples in, numbers out. Invariant: the time and the CPU-seconds in which weights are written for the
evaluation are in no number, for neither trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.versus.process_tree import Measured
from tropd_mcore.files import read_step_lines

PARTS = ("rollout", "teacher", "forward_backward", "optimizer", "rest")
PART_OF = {
    "rollout": "rollout",
    "publish": "rollout",
    "teacher": "teacher",
    "student": "forward_backward",
    "context": "forward_backward",
    "forward_backward": "forward_backward",
    "optimizer": "optimizer",
}
"""Phase of a metrics line -> part of the table. Every other second of a step is `rest`."""
NOT_TRAINING = ("checkpoint", "server")
"""Phases that are in no part: writing weights, and the start of the rollout server."""

Line = Mapping[str, float]


def read_lines(path: Path) -> Sequence[Line]:
    """Return the lines of metrics.jsonl, [] without one. Raises ValueError if a line lacks the step or its seconds."""
    lines = read_step_lines(path)
    for number, line in enumerate(lines):
        if line["step"] != number or "time/step" not in line:
            raise ValueError(f"{path}: line {number + 1}: expected step {number} with time/step, found {sorted(line)}")
    return lines


def seconds(line: Line) -> dict[str, float]:
    """Return the seconds of each part of one step, and of the whole step."""
    phases = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
    whole = phases.pop("step") - sum(phases.get(name, 0.0) for name in NOT_TRAINING)
    parts = dict.fromkeys(PARTS, 0.0)
    for name, value in phases.items():
        if name in PART_OF:
            parts[PART_OF[name]] += value
    parts["rest"] = whole - sum(parts.values())
    return {**parts, "step": whole}


def seconds_per_step(lines: Sequence[Line]) -> dict[str, float]:
    """Return the mean of each part over the steps after the first, which warms up. The parts add up to the step."""
    if len(lines) < 2:
        raise ValueError(f"expected 2 steps or more, because the first one warms up; found {len(lines)}")
    each = [seconds(line) for line in lines[1:]]
    return {part: fmean(one[part] for one in each) for part in each[0]}


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU-seconds."""

    wall_s: float
    cpu_s: float


class Clock:
    """Costs of one run, counted from the start of its first step or from its launch, without the written weights."""

    def __init__(self, lines: Sequence[Line], measured: Measured) -> None:
        if len(measured.marks) != len(lines):
            raise ValueError(f"expected a mark for each of {len(lines)} steps, found {len(measured.marks)}")
        self.lines, self.measured = lines, measured
        begun = measured.marks[0].wall_s - seconds(lines[0])["step"]
        self.start_up = Cost(begun, measured.cpu_at(begun))

    def until(self, step: int) -> Cost:
        """Return the cost of the first `step` steps, without the start-up."""
        marks = self.measured.marks
        wall = sum(seconds(line)["step"] for line in self.lines[:step])
        cpu = marks[step - 1].cpu_s - self.start_up.cpu_s
        for mark, line in zip(marks, self.lines[1:step], strict=False):
            written = line.get("time/checkpoint", 0.0)
            cpu -= self.measured.cpu_at(mark.wall_s + written) - self.measured.cpu_at(mark.wall_s)
        return Cost(wall, cpu)

    def cpu_s_per_step(self) -> float:
        """Return the CPU-seconds per step, without the first step."""
        steps = len(self.lines)
        return (self.until(steps).cpu_s - self.until(1).cpu_s) / (steps - 1)

    def peaks(self) -> tuple[int, int]:
        """Return the largest resident and proportional bytes of all processes until the end of the last step."""
        last = self.measured.marks[-1].wall_s
        before = [sample for sample in self.measured.timeline if sample.wall_s <= last]
        return max(each.rss_bytes for each in before), max(each.pss_bytes for each in before)


def first_at_target(evaluations: Sequence[Mapping[str, int]], target: float) -> int | None:
    """Return the first evaluated number of steps with at least the share `target` right; None if there is none."""
    return next((each["step"] for each in evaluations if each["right"] >= target * each["count"]), None)
