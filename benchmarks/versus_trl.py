"""Whole training runs of this project beside those of TRL's DistillationTrainer, on a CPU.

    python -m venv build/trl && build/trl/bin/python -m pip install torch 'trl==1.16.*'
    python -m examples.make_models models/arithmetic
    python -m benchmarks.versus_trl --trl-python build/trl/bin/python
    python -m benchmarks.versus_trl --docs       # writes the tables of docs/performance.md from the result

TRL runs in its own environment and is told what to do by a driver of ours. Both trainers get the same weights, prompts
in the same order, batch, loss, optimizer and sampling. Their runs take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, machine
from benchmarks.versus.limits import QUESTIONS, Place, ask, same_loss
from benchmarks.versus.process_tree import measure
from benchmarks.versus.settings import DIVERGENCES, SYSTEMS, Settings, our_config
from benchmarks.versus.tables import read, write_docs
from benchmarks.versus.timings import Clock, first_at_target, read_lines, seconds_per_step

RESULT = ROOT / "benchmarks" / "results" / "versus_trl.json"
PAGE = ROOT / "docs" / "performance.md"
OLDEST, BELOW = (1, 16), (1, 17)
"""Range of TRL's versions that the driver was tested with."""
OURS = (sys.executable, "-m", "tropd_mcore.cli.main")
EVALUATED_SAMPLES = 4
"""Responses per held-out prompt in an evaluation."""
SMALL_THREADS, LARGE_THREADS = 1, 2
LARGE_STEPS = 4


class Refused(Exception):
    """What the command line names cannot be used."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    trl_python: str
    models: Path
    student: str
    work: Path
    out: Path
    repeats: int
    steps: int
    target: float
    export_every: int
    parts: tuple[str, ...]
    limit_s: float


def trl_versions(python: str) -> dict[str, str]:
    """Return the versions in an environment. Raises Refused if TRL is missing there or outside the tested range."""
    install = f"install it with: {python} -m pip install torch 'trl=={OLDEST[0]}.{OLDEST[1]}.*'"
    tested = f"tested with TRL >= {OLDEST[0]}.{OLDEST[1]}, < {BELOW[0]}.{BELOW[1]}"
    code = (
        "import importlib.metadata as m, json, platform\n"
        "names = {d.metadata['Name'].lower() for d in m.distributions() if d.metadata['Name']}\n"
        "wanted = ('trl', 'torch', 'transformers', 'accelerate')\n"
        "print(json.dumps({'python': platform.python_version()} | {n: m.version(n) for n in wanted if n in names}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        raise Refused(f"--trl-python {python}: expected a Python, found: {error.strerror}; {install}") from None
    if done.returncode != 0:
        raise Refused(f"--trl-python {python}: expected a Python, it ended with exit code {done.returncode}; {install}")
    found: dict[str, str] = json.loads(done.stdout)
    if "trl" not in found:
        raise Refused(f"--trl-python {python}: this environment has no trl ({tested}); {install}")
    numbers = tuple(int(part) for part in found["trl"].split(".")[:2])
    if not OLDEST <= numbers < BELOW:
        raise Refused(f"--trl-python {python}: this environment has trl {found['trl']} ({tested}); {install}")
    return found


def our_versions() -> dict[str, str]:
    """Return the versions of this environment."""
    return {name: version(name) for name in ("torch", "transformers", "megatron-core", "sglang")}


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a run: no GPU, `threads` threads per process, no network."""
    given = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT),
             "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    return os.environ | given


def settings_of(pair: str, loss: str, repeat: int, options: Options) -> Settings:
    """Return the settings of one run; a repetition has another seed."""
    folder = options.work / pair
    common = Settings(
        student=str(folder / "student"), teacher=str(folder / "teacher"), prompts=str(options.models / "train.jsonl"),
        loss=loss, steps=options.steps, seed=1000 + repeat, threads=SMALL_THREADS, export_every=options.export_every,
    )  # fmt: skip
    if pair == "small":
        return common
    return replace(
        common, steps=LARGE_STEPS, threads=LARGE_THREADS, prompts_per_step=4, max_new_tokens=64, export_every=None
    )


def run_once(system: str, settings: Settings, folder: Path, options: Options) -> dict[str, Any]:
    """Train once and return what it cost. Raises SystemExit with the end of the log if the run fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    if system == "ours":
        (folder / "config.yaml").write_text(json.dumps(our_config(settings, run), indent=1))
        command = [*OURS, "train", str(folder / "config.yaml")]
    else:
        settings.write(folder / "settings.json")
        driver = ["-m", "benchmarks.versus.trl_driver", str(folder / "settings.json"), str(run)]
        command = [options.trl_python, *driver]
    metrics = run / "metrics.jsonl"
    measured = measure(command, watched=metrics, log=folder / "log", environment=environment(settings.threads),
                       cwd=ROOT, limit_s=options.limit_s)  # fmt: skip
    if measured.exit_code != 0:
        how = f"exit code {measured.exit_code}" if measured.exit_code is not None else f"over {options.limit_s:.0f} s"
        end = "\n".join((folder / "log").read_text().splitlines()[-5:])
        raise SystemExit(f"error: {shlex.join(command)} failed ({how}):\n{end}")
    lines = read_lines(metrics)
    if len(lines) != settings.steps:
        raise SystemExit(
            f"error: {shlex.join(command)} ended after {len(lines)} of {settings.steps} steps, see {folder}/log"
        )
    clock = Clock(lines, measured)
    rss, pss = clock.peaks()
    evaluations = evaluate(run, settings, options) if settings.export_every else []
    return {
        "steps": len(lines),
        "start_up": asdict(clock.start_up),
        "seconds": seconds_per_step(lines),
        "cpu_s_per_step": clock.cpu_s_per_step(),
        "rss_bytes": rss,
        "pss_bytes": pss,
        "evaluations": evaluations,
        "to_target": to_target(clock, evaluations, options.target),
    }


def to_target(clock: Clock, evaluations: list[dict[str, int]], target: float) -> dict[str, float] | None:
    """Return the cost until the first evaluated step that reaches the target; None if none does."""
    step = first_at_target(evaluations, target)
    if step is None:
        return None
    cost, start = clock.until(step), clock.start_up
    return {
        "step": step,
        "cpu_s": cost.cpu_s,
        "wall_s": cost.wall_s,
        "cpu_with_start_up_s": cost.cpu_s + start.cpu_s,
        "wall_with_start_up_s": cost.wall_s + start.wall_s,
    }


def evaluate(run: Path, settings: Settings, options: Options) -> list[dict[str, int]]:
    """Return {step, right, count} of the written weights, in order, until the target is reached."""
    folders = sorted([*run.glob("checkpoints/step_*"), *run.glob("weights/step_*")], key=_step_of)
    return [
        {"step": _step_of(Path(found["folder"])), "right": found["right"], "count": found["count"]}
        for found in _evaluated(folders, options, settings.max_new_tokens, "--target", str(options.target))
    ]


def before(options: Options) -> dict[str, Any]:
    """Return the sampled accuracy of the student and the teacher before training."""
    folders = [options.work / "small" / role for role in ("student", "teacher")]
    found = _evaluated(folders, options, Settings.max_new_tokens)
    return {each["folder"]: {"right": each["right"], "count": each["count"]} for each in found}


def _evaluated(folders: list[Path], options: Options, length: int, *more: str) -> list[dict[str, Any]]:
    command = [
        sys.executable, "-m", "benchmarks.versus.evaluate", str(options.models / "heldout.jsonl"), *map(str, folders),
        "--samples", str(EVALUATED_SAMPLES), "--max-new-tokens", str(length), *more,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(SMALL_THREADS), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: the evaluation failed: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def plan(options: Options) -> Iterator[tuple[str, str, str, int]]:
    """Yield (pair, loss, system, repeat): ours, theirs, ours, theirs, so that a change of the machine affects both."""
    for pair in ("small", "large"):
        if pair in options.parts:
            for repeat in range(options.repeats):
                for loss in DIVERGENCES:
                    for system in SYSTEMS:
                        yield pair, loss, system, repeat


def benchmark(options: Options) -> None:
    """Run everything and write the result after each run, so that an interrupted benchmark leaves what it has."""
    from benchmarks.versus.pair import ROLES, SYNTHETIC, parameters, synthesize, trim  # imports transformers: slow

    found_versions = trl_versions(options.trl_python)
    options.work.mkdir(parents=True, exist_ok=True)
    folders = {"small": trim(options.models, options.work / "small", options.student)}
    if "large" in options.parts:
        folders["large"] = synthesize(options.models, options.work / "large")
    result: dict[str, Any] = {
        "command": _command(options),
        "machine": machine(),
        "versions": {"ours": our_versions(), "trl": found_versions},
        "settings": {name: _without_paths(settings_of(name, "reverse_kl", 0, options)) for name in folders},
        "models": {name: {role: parameters(folder / role) for role in ROLES} for name, folder in folders.items()},
        "synthetic": {role: asdict(shape) for role, shape in SYNTHETIC.items()},
        "target": options.target,
        "student": options.student,
        "before": before(options),
        "same_loss": [],
        "runs": [],
        "limits": [],
    }

    def keep() -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    keep()
    if "limits" in options.parts:
        work = options.work / "limits"
        shutil.rmtree(work, ignore_errors=True)
        place = Place(
            work=work, root=ROOT, models=options.models, student=options.student, ours=OURS,
            trl_python=options.trl_python, environment=environment(SMALL_THREADS),
        )  # fmt: skip
        for loss in DIVERGENCES:
            result["same_loss"].append(same_loss(settings_of("small", loss, 0, options), place))
            print(result["same_loss"][-1], flush=True)
            keep()
        for question in QUESTIONS:
            result["limits"].append(ask(question, settings_of("small", "reverse_kl", 0, options), place))
            print(json.dumps(result["limits"][-1], indent=1), flush=True)
            keep()
    for pair, loss, system, repeat in plan(options):
        settings, folder = settings_of(pair, loss, repeat, options), options.work / "runs" / f"{pair}-{loss}-{system}"
        run = run_once(system, settings, folder, options)
        result["runs"].append({"pair": pair, "loss": loss, "system": system, "repeat": repeat, **run})
        print(f"{pair} {loss} {system} {repeat}: {run['seconds']['step']:.3g} s per step, "
              f"{run['cpu_s_per_step']:.3g} CPU-seconds, target {run['to_target']}", flush=True)  # fmt: skip
        keep()
    print(options.out)


def _command(options: Options) -> str:
    """Return the command line that repeats this measurement; folders of this machine are left out."""
    chosen = {
        "student": options.student,
        "repeats": options.repeats,
        "steps": options.steps,
        "export-every": options.export_every,
        "target": options.target,
        "parts": ",".join(options.parts),
    }
    return shlex.join(
        ["python", "-m", "benchmarks.versus_trl", "--trl-python", "PYTHON"]
        + [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    )


def _without_paths(settings: Settings) -> dict[str, Any]:
    """Return the settings that all runs of a pair share and that do not depend on this machine's folders."""
    left_out = ("student", "teacher", "prompts", "loss", "seed")
    return {key: value for key, value in asdict(settings).items() if key not in left_out}


def main() -> int:
    """Measure, or write the tables of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="Python of an environment with TRL")
    parser.add_argument("--models", type=Path, default=ROOT / "models" / "arithmetic", help="the quickstart's pair")
    parser.add_argument("--student", default="student", help="folder of the student in --models: student or misled")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "versus_trl", help="folder for runs and models")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="steps of a run of the small pair")
    parser.add_argument("--target", type=float, default=0.8, help="share of sampled answers that are right")
    parser.add_argument("--export-every", type=int, default=2, help="steps between two evaluations")
    parser.add_argument("--parts", default="small,large,limits", help="what to run, separated by commas")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="longest time of one run, in seconds")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/performance.md, and end")
    given = parser.parse_args()
    if given.docs:
        write_docs(PAGE, read(given.out))
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the running trainer on the way
    try:
        benchmark(_options(given))
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    return 0


def _options(given: argparse.Namespace) -> Options:
    parts = tuple(given.parts.split(","))
    unknown = sorted(set(parts) - {"small", "large", "limits"})
    if given.trl_python is None:
        raise Refused("--trl-python is missing: expected the Python of an environment with TRL")
    if unknown:
        raise Refused(f"--parts: expected small, large or limits, found {', '.join(unknown)}")
    if not (given.models / "example.json").exists():
        raise Refused(f"--models {given.models}: expected the folder that `python -m examples.make_models` makes")
    if not (given.models / given.student / "config.json").exists():
        raise Refused(f"--student {given.student}: expected a model folder in {given.models}, found none of that name")
    if min(given.repeats, given.steps, given.export_every) < 1 or given.steps < 2:
        raise Refused("--repeats, --steps and --export-every: expected 1 or more, and 2 steps or more")
    return Options(
        trl_python=given.trl_python,
        models=given.models.resolve(),
        student=given.student,
        work=given.work.resolve(),
        out=given.out,
        repeats=given.repeats,
        steps=given.steps,
        target=given.target,
        export_every=given.export_every,
        parts=parts,
        limit_s=given.limit_s,
    )


if __name__ == "__main__":
    sys.exit(main())
