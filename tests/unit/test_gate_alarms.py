"""The counter of false alarms judges like the product, on records and on noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gate_alarms import bfloat16_config, bounds_of, judge, main, recorded, simulated
from tests.glue.stubs import make_config
from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import resolved_yaml
from tropd_mcore.train.gates import SamplerBounds

BOUNDS = SamplerBounds.of(bfloat16_config(), exact=False)
RECIPE = "run: {dir: run}\nstudent: {path: s}\nteacher: {path: t}\ndata: {prompts: p.jsonl}\n"
RECIPE += "objective: {kind: opd}\n"


def run_dir(tmp_path: Path, differences: list[tuple[float, float, float]], *, with_percentile: bool = True) -> Path:
    """A run in bfloat16 whose steps had these (mean, percentile, maximum)."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    (tmp_path / "config.resolved.yaml").write_text(resolved_yaml(*load(recipe, [])))
    lines = []
    for step, (mean, p99, largest) in enumerate(differences):
        line = {"step": step, "tokens/student": 900.0, "engine/difference_mean": mean, "engine/difference_max": largest}
        if with_percentile:
            line |= {"engine/difference_p99": p99, "gates/sampler_share": 0.0}
        lines.append(line)
    lines.append({"step": len(lines), "tokens/student": 0.0, "engine/difference_mean": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


FINE, OFF, HIGH, FAR = (0.01, 0.1, 0.5), (0.01, 0.3, 0.5), (0.01, 0.1, 2.5), (0.01, 0.6, 0.9)


def test_steps_above_a_bound_maxima_and_stops_of_a_run_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_dir(tmp_path, [FINE, OFF, OFF, FINE, HIGH, OFF, OFF, OFF, FINE])
    assert main([str(found)]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(found)))
    assert row.split()[1:] == ["9", "5", "1", "1", "0"]
    assert main([str(run_dir(tmp_path, [FINE, OFF, OFF, FINE]))]) == 0
    assert main([str(run_dir(tmp_path, [FAR, FINE]))]) == 1
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "2", "1", "0", "0", "1"]


def test_a_run_without_percentiles_is_judged_by_mean_and_maximum(tmp_path: Path) -> None:
    found = run_dir(tmp_path, [FINE, OFF, OFF, OFF, HIGH, (0.06, 0.1, 0.5)], with_percentile=False)
    alarms = judge(bfloat16_config(), BOUNDS, recorded(found))
    assert (alarms.steps, alarms.off, alarms.warnings, alarms.stops) == (6, 1, 1, 0)


@pytest.mark.parametrize("tokens", [5, 60, 700])
def test_noise_between_two_bfloat16_engines_does_not_stop_a_run(tokens: int) -> None:
    alarms = judge(bfloat16_config(), BOUNDS, simulated(2000, tokens, BOUNDS, seed=3))
    assert alarms.steps == 2000 and alarms.stops == 0 and not alarms.refused


@pytest.mark.parametrize(("launches", "tokens"), [(200, 2000), (5, 300_000)])
def test_noise_between_two_bfloat16_engines_does_not_refuse_a_first_step_of_any_size(
    launches: int, tokens: int
) -> None:
    noise = simulated(launches, tokens, BOUNDS, seed=3)
    alarms = judge(bfloat16_config(), BOUNDS, noise, first_steps=True)
    assert (alarms.steps, alarms.refused, alarms.stops) == (launches, 0, 0)
    assert alarms.warnings > 0, "the maximum is above its bound"


def test_the_bounds_of_a_finished_run_depend_on_its_recorded_platform(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert bounds_of(config, tmp_path).exact
    (tmp_path / "inputs.json").write_text('{"launch": {"platform": "cuda"}}')
    assert not bounds_of(config, tmp_path).exact
