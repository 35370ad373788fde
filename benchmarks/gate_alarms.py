"""Counts false alarms of the sampler gate, on finished runs or on simulated noise of two bfloat16 engines.

    python -m benchmarks.gate_alarms RUN_DIR...                     judge every step of these runs
    python -m benchmarks.gate_alarms --simulate 20000 --tokens 20 200 2000                 20000 steps of one run
    python -m benchmarks.gate_alarms --simulate 200 --tokens 2000 1000000 --first-steps    200 launches

An honest run should give no stop. For older runs without `engine/difference_p99`, only mean and maximum are judged. The
bounds themselves are explained in docs/numerics.md. Invariant: the steps are judged by the trainer's own `SamplerGate`.
"""

from __future__ import annotations

import argparse
import json
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
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.train.gates import Difference, SamplerBounds, SamplerGate, compare, engines_are_exact

UNCERTAIN = 0.1
"""Share of tokens on which the engines differ visibly. On the other tokens the model is sure."""
SCALE, FREEDOM = 0.051, 3
"""Difference on these tokens, nats: Student's t, with a heavier tail than was measured."""
SURE_SCALE = 0.002
"""Standard deviation of the difference on the other tokens, nats."""
STEP_SPREAD = 0.4
"""Standard deviation of the logarithm of the factor that all tokens of a step share."""


@dataclass
class Alarms:
    """Counts of the gate's verdicts on the steps of one run or simulation."""

    steps: int = 0
    off: int = 0
    """Steps with a mean, percentile or share above its bound"""
    warnings: int = 0
    """Steps with a maximum above its bound"""
    stops: int = 0
    """How often the run would have been stopped; counting continues after each stop"""
    refused: int = 0
    """How often the first step of a launch would have been refused"""


def judge(
    config: Config,
    bounds: SamplerBounds,
    differences: Iterable[tuple[int, Difference]],
    *,
    first_steps: bool = False,
) -> Alarms:
    """Run the gate over (step, difference) in order. With `first_steps`, each is the first step of a launch."""
    found, gate = Alarms(), SamplerGate(config, bounds)
    for step, difference in differences:
        found.steps += 1
        found.off += bool(difference.off(bounds))
        found.warnings += difference.largest > bounds.largest
        try:
            gate.judge(step, difference)
        except GateError:
            found.refused += not gate.passed
            found.stops += gate.passed
            gate = SamplerGate(config, bounds)
            gate.passed = True
        if first_steps:
            gate = SamplerGate(config, bounds)
    return found


def bounds_of(config: Config, run_dir: Path) -> SamplerBounds:
    """Return the bounds of a finished run, for its recorded platform or else the platform of its configuration."""
    device = str(config.platform.kind).replace("auto", "cpu")
    record = RunDir(run_dir).inputs
    if record.is_file():
        device = json.loads(record.read_text(encoding="utf-8")).get("launch", {}).get("platform", device)
    return SamplerBounds.of(config, exact=engines_are_exact(config, device))


def recorded(run_dir: Path) -> Iterator[tuple[int, Difference]]:
    """Yield (step, difference) for the steps of a run that had sampled tokens."""
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
    """Yield (step, difference) of noise with the mean and percentile of docs/numerics.md and a heavier tail."""
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
            "rollout_logp": np.zeros(tokens),
        }
        found = compare([columns], bounds)
        assert found is not None
        yield step, found


def bfloat16_config() -> Config:
    """Return a configuration with default gates and both engines in bfloat16."""
    return Config.model_validate(
        {
            "run": {"dir": "nowhere"},
            "student": {"path": "student"},
            "teacher": {"path": "teacher"},
            "data": {"prompts": "prompts.jsonl"},
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command line. Returns 1 if a run would have been stopped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_alarms", description="False alarms of the gate.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories")
    parser.add_argument("--simulate", type=int, metavar="STEPS", help="steps of simulated bfloat16 noise")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 200, 2000], help="sampled tokens per step")
    parser.add_argument("--first-steps", action="store_true", help="treat each simulated step as the first of a launch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    options = parser.parse_args(arguments)
    rows: list[tuple[str, Alarms]] = []
    for run_dir in options.runs:
        config, _ = load(run_dir / "config.resolved.yaml", [])
        name = f"{run_dir} (replay)" if config.run.replay is not None else str(run_dir)
        rows.append((name, judge(config, bounds_of(config, run_dir), recorded(run_dir))))
    for tokens in options.tokens if options.simulate else []:
        config = bfloat16_config()
        bounds = SamplerBounds.of(config, exact=False)
        noise = simulated(options.simulate, tokens, bounds, seed=options.seed)
        name = f"simulated bfloat16, {tokens} tokens per {'first step' if options.first_steps else 'step'}"
        rows.append((name, judge(config, bounds, noise, first_steps=options.first_steps)))
    if not rows:
        parser.error("name a run directory, or --simulate")
    width = max(len(name) for name, _ in rows)
    print(f"{'run':<{width}}  {'steps':>7} {'off':>6} {'warned':>7} {'stops':>6} {'refused':>8}")
    keys = ("steps", "off", "warnings", "stops", "refused")
    counts = [(name, [getattr(found, key) for key in keys]) for name, found in rows]
    for name, row in [*counts, ("all", [sum(column) for column in zip(*(row for _, row in counts), strict=True)])]:
        print(f"{name:<{width}}  {row[0]:>7} {row[1]:>6} {row[2]:>7} {row[3]:>6} {row[4]:>8}")
    return int(any(found.stops or found.refused for _, found in rows))


if __name__ == "__main__":
    logging.getLogger("tropd_mcore.train.gates").setLevel(logging.ERROR)  # its alarms are counted, not logged
    raise SystemExit(main())
