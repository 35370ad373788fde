"""False alarms of the sampler gate: over runs that were made, and over noise as two bfloat16 engines make it.

    python -m benchmarks.gate_alarms RUN_DIR...                     what the gate says of every step of these runs
    python -m benchmarks.gate_alarms --simulate 20000 --tokens 20 200 2000

A run that was honest should give no stop. Of runs from before `engine/difference_p99` only mean and maximum are judged.
Not for the bounds themselves (docs/numerics.md). Invariant: the judge is the product's own `SamplerGate`.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import GateError
from tropd_mcore.files import read_step_lines
from tropd_mcore.train.gates import Difference, SamplerBounds, SamplerGate, compare

UNCERTAIN = 0.1
"""Share of the tokens on which the engines differ visibly; a model is sure of the others."""
SCALE, FREEDOM = 0.051, 3
"""Their difference, nats: Student's t, whose tail is heavier than what was measured."""
SURE_SCALE = 0.002
"""Standard deviation on the other tokens, nats."""
STEP_SPREAD = 0.4
"""Standard deviation of the logarithm of a factor that all tokens of a step share."""


@dataclass
class Alarms:
    """What the gate said of the steps of one run or simulation."""

    steps: int = 0
    off: int = 0
    """Steps whose mean, percentile or share was above its bound"""
    warnings: int = 0
    """Steps whose maximum was"""
    stops: int = 0
    """Times that the run would have been stopped; the count goes on after each"""
    refused: bool = False
    """Whether the first step would have been"""


def judge(config: Config, differences: Iterable[tuple[int, Difference]]) -> Alarms:
    """Run the gate over (step, difference) in order."""
    found, gate = Alarms(), SamplerGate(config)
    for step, difference in differences:
        found.steps += 1
        found.off += bool(difference.off(gate.bounds))
        found.warnings += difference.largest > gate.bounds.largest
        try:
            gate.judge(step, difference)
        except GateError:
            found.refused |= not gate.passed
            found.stops += gate.passed
            gate = SamplerGate(config)
            gate.passed = True
    return found


def recorded(run_dir: Path) -> Iterator[tuple[int, Difference]]:
    """(step, difference) of the steps of a run that had sampled tokens."""
    for line in read_step_lines(run_dir / "metrics.jsonl"):
        if line.get("engine/difference_mean") is not None:
            yield (
                int(line["step"]),
                Difference(
                    tokens=int(line["tokens/student"]),
                    mean=line["engine/difference_mean"],
                    p99=_number(line, "engine/difference_p99"),
                    largest=line["engine/difference_max"],
                    share_above=_number(line, "gates/sampler_share", 0.0),
                ),
            )


def _number(line: dict[str, Any], name: str, unknown: float = math.nan) -> float:
    value = line.get(name)
    return unknown if value is None else float(value)


def simulated(steps: int, tokens: int, bounds: SamplerBounds, *, seed: int) -> Iterator[tuple[int, Difference]]:
    """(step, difference) of noise with the mean and percentile of docs/numerics.md and a heavier tail."""
    random = np.random.default_rng(seed)
    for step in range(steps):
        noise = np.abs(random.normal(0.0, SURE_SCALE, tokens))
        uncertain = random.random(tokens) < UNCERTAIN
        noise[uncertain] = SCALE * np.abs(random.standard_t(FREEDOM, int(uncertain.sum())))
        noise *= math.exp(random.normal(0.0, STEP_SPREAD))
        columns = {
            "on": np.ones(tokens, bool),
            "epoch": np.zeros(tokens, np.int64),
            "old_logp": noise,
            "behav_logp": np.zeros(tokens),
        }
        found = compare([columns], bounds)
        assert found is not None
        yield step, found


def bfloat16_config() -> Config:
    """Default gates between two engines in bfloat16."""
    return Config.model_validate(
        {
            "run": {"dir": "nowhere"},
            "student": {"path": "student"},
            "teacher": {"path": "teacher"},
            "data": {"prompts": "prompts.jsonl"},
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns 1 where an honest run would have been stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_alarms", description="False alarms of the gate.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories")
    parser.add_argument("--simulate", type=int, metavar="STEPS", help="steps of simulated bfloat16 noise")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 200, 2000], help="sampled tokens of a step")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    rows: list[tuple[str, Alarms]] = []
    for run_dir in options.runs:
        config, _ = load(run_dir / "config.resolved.yaml", [])
        name = f"{run_dir} (replay)" if config.run.replay is not None else str(run_dir)
        rows.append((name, judge(config, recorded(run_dir))))
    for tokens in options.tokens if options.simulate else []:
        config = bfloat16_config()
        noise = simulated(options.simulate, tokens, SamplerBounds.of(config), seed=options.seed)
        rows.append((f"simulated bfloat16, {tokens} tokens per step", judge(config, noise)))
    width = max((len(name) for name, _ in rows), default=0)
    print(f"{'run':<{width}}  {'steps':>7} {'off':>6} {'warned':>7} {'stops':>6}  first step")
    for name, found in rows:
        first = "refused" if found.refused else "passed"
        print(f"{name:<{width}}  {found.steps:>7} {found.off:>6} {found.warnings:>7} {found.stops:>6}  {first}")
    total = [sum(getattr(found, key) for _, found in rows) for key in ("steps", "off", "warnings", "stops")]
    print(f"{'all':<{width}}  {total[0]:>7} {total[1]:>6} {total[2]:>7} {total[3]:>6}")
    return int(any(found.stops or found.refused for _, found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
