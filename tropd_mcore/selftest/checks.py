"""The checks of `tropd selftest`, in order. Each runs in processes of its own, with a time limit and a log.

This module does not print or write the report. Invariants: a check passes only on numbers that its processes wrote, and
a check whose processes end well without those numbers fails. A failed check does not stop those that do not need it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tropd_mcore.progress import progress
from tropd_mcore.selftest import material
from tropd_mcore.selftest.collectives import RESULT

log = logging.getLogger(__name__)

Status = Literal["ok", "FAIL", "skip"]
TAIL_LINES = 40
STOP_S = 20.0
"""From SIGTERM to SIGKILL: a job stops its server in that time."""


@dataclass(frozen=True)
class Place:
    """Where and on what the checks run."""

    folder: Path
    platform: Literal["cpu", "cuda"]
    devices: int
    """GPUs that torch sees; on a CPU machine 2, the ranks that share the cores"""
    overrides: tuple[str, ...] = ()
    """key=value of the job's configuration"""
    python: str = sys.executable

    @property
    def tensor(self) -> int:
        """Tensor-parallel ranks of the job."""
        return min(self.devices, 2)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True)
class Outcome:
    """The result of one check."""

    name: str
    status: Status
    detail: str
    seconds: float = 0.0
    figures: dict[str, float | str] = field(default_factory=dict)
    log_tail: str = ""
    """Last lines of the log of a failed check"""


class Failed(Exception):
    """A check failed, for the reason given."""


@dataclass(frozen=True)
class Check:
    """One check: what it proves, how long it may take, and the names of the checks that it needs."""

    name: str
    title: str
    limit_s: float
    run: Callable[[Place, Check, Path], tuple[str, dict[str, float | str]]]
    """(place, check, log) -> (line, figures). Raises Failed"""
    needs: tuple[str, ...] = ()


def run_all(place: Place, checks: Sequence[Check] | None = None) -> Iterator[Outcome]:
    """Run the checks and yield each outcome when it is there."""
    passed: set[str] = set()
    for check in CHECKS if checks is None else checks:
        missing = [name for name in check.needs if name not in passed]
        if missing:
            yield Outcome(check.name, "skip", f"not run, because {', '.join(missing)} did not pass")
            continue
        started, written = time.monotonic(), place.folder / f"{check.name}.log"
        try:
            with progress(log, check.title):
                detail, figures = check.run(place, check, written)
        except Failed as failed:
            yield Outcome(check.name, "FAIL", str(failed), time.monotonic() - started, log_tail=tail(written))
            continue
        passed.add(check.name)
        yield Outcome(check.name, "ok", detail, time.monotonic() - started, figures)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log; "" if there is none."""
    try:
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def execute(command: Sequence[str], written: Path, limit_s: float) -> None:
    """Run a command in its own process group with its output in `written`. Raises Failed, and leaves no process."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with written.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"did not end in {limit_s:.0f} s: {_last_line(written)}") from None
        finally:
            _end(process)
    if code:
        raise Failed(f"exit code {code}: {_last_line(written)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command to end if it still runs, then kill what is left of its process group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(written: Path) -> str:
    """The line of a log that says what went wrong: the last error, else the last line."""
    lines = [line.strip() for line in tail(written).splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error:|\w*(Error|Sum|Exception)\b)", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Failed(f"{what}: {path.name} cannot be read ({error})") from error


# The checks ----------------------------------------------------------------------------------------------------------


def _machine(place: Place, check: Check, written: Path) -> tuple[str, dict[str, float | str]]:
    execute([place.python, "-m", "tropd_mcore.cli.main", "doctor"], written, check.limit_s)
    warned = [line for line in written.read_text(encoding="utf-8").splitlines() if line.startswith("warn")]
    return f"tropd doctor: no FAIL, {len(warned)} warn", {}


OBJECTIVES = ("tropd", "opd", "gkd")
RANKS = ("1", "2")
BACKENDS = {"cpu": ("eager",), "cuda": ("eager", "triton")}
"""Without `compile`, whose kernels take minutes to build; `tropd conformance` has it."""


def _loss(place: Place, check: Check, written: Path) -> tuple[str, dict[str, float | str]]:
    answers = written.with_suffix(".json")
    command = [place.python, "-m", "tropd_mcore.cli.main", "conformance", "--device", place.platform,
               "--json", str(answers)]  # fmt: skip
    for name in OBJECTIVES:
        command += ["--objective", name]
    for ranks in RANKS:
        command += ["--tp", ranks]
    for backend in BACKENDS[place.platform]:
        command += ["--backend", backend]
    execute(command, written, check.limit_s)
    cells = _json(answers, "the loss")["cells"]
    counts = {status: sum(cell["status"] == status for cell in cells) for status in ("ok", "miss", "not run")}
    if counts["miss"] or not counts["ok"]:
        raise Failed(f"{counts['miss']} of {len(cells)} comparisons with float64 miss their tolerance")
    left = f", {counts['not run']} not run here" if counts["not run"] else ""
    return f"{counts['ok']} comparisons of values and gradients with float64{left}", {"cells": counts["ok"]}


def _collectives(place: Place, check: Check, written: Path) -> tuple[str, dict[str, float | str]]:
    command = [place.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(place.devices),
               "-m", "tropd_mcore.selftest.collectives", place.platform]  # fmt: skip
    try:
        execute(command, written, check.limit_s)
    except Failed as failed:
        errors = [result["error"] for result in _results(written) if "error" in result]
        raise Failed(errors[0] if errors else str(failed)) from failed
    found = next((result for result in _results(written) if "ranks" in result), None)
    if found is None:
        raise Failed("the ranks ended without a result")
    if found["ranks"] != place.devices:
        raise Failed(f"{found['ranks']} ranks took part, not {place.devices}")
    speed = found["gigabytes_per_second"]
    return (
        f"{found['backend']} between {found['ranks']} ranks: sums are right, 64 MiB all-reduced at {speed:.1f} GB/s",
        {"ranks": found["ranks"], "GB/s": round(speed, 2)},
    )


def _results(written: Path) -> list[dict[str, Any]]:
    """The results that ranks printed, whole lines only."""
    lines = written.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [line.partition(RESULT)[2] for line in lines if RESULT in line]
    return [json.loads(text) for text in found if text.startswith("{") and text.endswith("}")]


def _models(place: Place, check: Check, written: Path) -> tuple[str, dict[str, float | str]]:
    program = f"from pathlib import Path; from tropd_mcore.selftest.material import write_models; " \
              f"write_models(Path({str(place.folder)!r}))"  # fmt: skip
    execute([place.python, "-c", program], written, check.limit_s)
    material.write_job(place.folder, place.platform, place.tensor)
    return "two Qwen3 folders with random weights", {}


def _job(place: Place, check: Check, written: Path) -> tuple[str, dict[str, float | str]]:
    """The job has the gates on, so it ends well only if they pass; here the numbers are read that they judged."""
    config = place.folder / "selftest.yaml"
    execute(material.job_command(place.python, config, place.overrides), written, check.limit_s)
    lines = _metrics(place.run_dir)
    losses = [line["loss/total"] for line in lines]
    norms = [line["optimizer/grad_norm"] for line in lines]
    if len(lines) != material.STEPS or not all(map(_is_number, [*losses, *norms])) or min(norms) <= 0:
        raise Failed(f"expected {material.STEPS} steps with finite losses and gradients, found {losses} and {norms}")
    seconds = lines[-1]["time/step"]
    return (
        f"{len(lines)} steps on {place.tensor} ranks, loss {losses[-1]:.3f}, gradient norm {norms[-1]:.3g}, the last "
        f"step in {seconds:.1f} s",
        {"loss": losses[-1], "gradient norm": norms[-1], "seconds per step": round(seconds, 2)},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise Failed(f"the job's metrics.jsonl cannot be read ({error})") from error


def _reading(place: Place, _check: Check, _written: Path) -> tuple[str, dict[str, float | str]]:
    compared = _json(place.run_dir / "model_checks.json", "the models")
    if set(compared) != {"student.path", "teacher.path"}:
        raise Failed(f"compared with transformers: {', '.join(compared) or 'nothing'}; expected student and teacher")
    worst = max(compared.values(), key=lambda found: float(found["largest"]))
    return (
        f"Megatron and transformers differ by {worst['mean']:.1e} nats (mean), {worst['largest']:.1e} (maximum) over "
        f"{worst['tokens']} tokens",
        {"mean nats": worst["mean"], "largest nats": worst["largest"]},
    )


def _server(place: Place, _check: Check, _written: Path) -> tuple[str, dict[str, float | str]]:
    ready = re.search(r"rollout\.server: ready on \S+ after ([\d.]+) s", _text(place))
    if ready is None:
        raise Failed("the job's log does not say when the rollout server was ready")
    return f"started in {ready[1]} s", {"seconds": float(ready[1])}


def _weights(place: Place, _check: Check, _written: Path) -> tuple[str, dict[str, float | str]]:
    """The second step samples from published weights that the first step trained. The engines are compared there."""
    last = _metrics(place.run_dir)[-1]
    difference, mean = last.get("engine/difference_p99"), last.get("engine/difference_mean")
    if not _is_number(difference) or not _is_number(mean):
        raise Failed("sampler and trainer were not compared after the first update")
    if _weights_of(place.folder / "student") == _weights_of(place.run_dir / "export"):
        raise Failed("the exported student has the bytes of the first one, so nothing was trained")
    # the job's server shares the trainer's GPUs, and NCCL takes no two ranks on one GPU
    nccl = "; a broadcast by NCCL was not run, it needs a server on other GPUs" if place.platform == "cuda" else ""
    return (
        f"updated weights arrived: sampler and trainer differ by {mean:.1e} nats (mean), {difference:.1e} (99th "
        f"percentile); published in {last['time/publish']:.2f} s{nccl}",
        {"mean nats": mean, "p99 nats": difference, "publish seconds": round(last["time/publish"], 3)},
    )


def _weights_of(folder: Path) -> bytes:
    try:
        return (folder / "model.safetensors").read_bytes()
    except OSError as error:
        raise Failed(f"model.safetensors of the folder {folder.name} cannot be read ({error})") from error


def _text(place: Place) -> str:
    return (place.folder / "job.log").read_text(encoding="utf-8", errors="replace")


CHECKS = (
    Check("machine", "tropd doctor", 120.0, _machine),
    Check("loss", "the loss against a float64 oracle", 240.0, _loss),
    Check("collectives", "sums between all devices", 120.0, _collectives),
    Check("models", "writing two tiny models", 120.0, _models),
    Check("job", "a job: server, publication, sampling, gates, steps", 600.0, _job, ("models",)),
    Check("reading", "Megatron against transformers", 10.0, _reading, ("job",)),
    Check("server", "start of the rollout server", 10.0, _server, ("job",)),
    Check("weights", "weights published to the server", 10.0, _weights, ("job",)),
)
"""Limits are longer than a slow machine needs; they only end a hang."""
