"""Faults: signals from a user, a terminal or a scheduler that ask a run or another command to end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable

import psutil

from tests.faults.launch import Launch, send, tropd
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

Play = Callable[[Scene], Seen]
CHAIN = "signals"
LIVE_CHAIN = "own-server"
INTERRUPTED = r"interrupted.*(same command|resumes|starts again)"
STOPPED = r"stopped by (SIGTERM|SIGHUP).*same command"
IN_STEP, SCORING, SAVING = "before forward and backward", "before score", "before checkpoint info"
AIM_S = 10.0
"""Seconds in which Ctrl-C should be over on an idle machine."""


def to_terminal(launch: Launch, number: signal.Signals) -> None:
    """A signal as a terminal sends it: to the process group that it started."""
    os.killpg(launch.process.pid, number)


def to_all(launch: Launch, number: signal.Signals) -> None:
    """A signal as a scheduler sends it: to every process of the job. Servers have their own session."""
    for process in launch.members():
        if "sglang" not in _name(process):
            send(process, number)


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "sglang"


def send_at(edge: str, number: signal.Signals, to: Callable[[Launch, signal.Signals], None], times: int = 1) -> Play:
    """A signal while rank 0 is at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = scene.job()
        launch.halt(edge)
        launch.look()
        scene.strike(launch)
        for _ in range(times):
            to(launch, number)
        launch.go()
        return _in_time(scene.end(launch))

    return play


def _in_time(seen: Seen) -> Seen:
    if seen.seconds > 3 * AIM_S:
        seen.weak.append(f"over after {seen.seconds:.0f} s")
    if len(seen.output.splitlines()) > 8:
        seen.weak.append(f"{len(seen.output.splitlines())} lines")
    return seen


def to_launcher(launch: Launch, number: signal.Signals) -> None:
    """A signal only to the launcher."""
    launch.process.send_signal(number)


def early(number: signal.Signals) -> Play:
    """A signal to the launcher while the ranks import."""

    def play(scene: Scene) -> Seen:
        launch = scene.job()
        launch.wait(lambda: len(launch.members()) >= 3, "ranks")
        scene.strike(launch)
        launch.process.send_signal(number)
        return _in_time(scene.end(launch))

    return play


def making_models(scene: Scene) -> Seen:
    """SIGTERM while the models of the quickstart are created."""
    out = scene.folder / "models"
    launch = scene.start([sys.executable, "-m", "examples.make_models", str(out), "--tiny"])
    launch.wait(lambda: any(scene.folder.glob(".models*")) or out.exists(), "the first file")
    scene.strike(launch)
    launch.process.terminate()
    seen = scene.end(launch)
    left = [path.name for path in scene.folder.iterdir() if "models" in path.name]
    seen.lost += [f"left on disk: {name}" for name in left]
    return seen


def subcommand(name: str, number: signal.Signals, *arguments: str) -> Play:
    """A signal to a command while its server starts."""

    def play(scene: Scene) -> Seen:
        config = scene.stage.live_config
        values = {"OUT": str(scene.folder / "out.jsonl"), "PROMPTS": str(scene.stage.prompts),
                  "MODEL": str(scene.stage.model("student"))}  # fmt: skip
        filled = [values.get(text, text) for text in arguments]
        launch = scene.start(tropd(name, config, *filled, f"run.dir={scene.run_dir}"))
        launch.wait(lambda: any((scene.run_dir / "logs").glob("*.server.json")), "its server")
        launch.wait(lambda: len(launch.members()) >= 2, "the process of its server")
        scene.strike(launch)
        os.kill(launch.process.pid, number)
        seen = _in_time(scene.end(launch))
        seen.left_running += [f"server record {path.name}" for path in (scene.run_dir / "logs").glob("*.server.json")]
        return seen

    return play


def _row(name: str, done: str, play: Play, code: int, line: str, **more: object) -> Fault:
    return Fault(
        id=f"signal-{name}",
        group="signal",
        done=done,
        wanted=f"one line, exit code {code}, everything gone, the same command goes on, equal bit for bit",
        play=play,
        code=(code,),
        line=line,
        limit_s=60.0,
        **{"chain": CHAIN, **more},  # type: ignore[arg-type]
    )


FAULTS = [
    _row("int", "Ctrl-C in a step", send_at(IN_STEP, signal.SIGINT, to_terminal), 130, INTERRUPTED),
    _row("int-twice", "Ctrl-C twice in a checkpoint", send_at("before checkpoint info", signal.SIGINT, to_terminal, 2),
         130, INTERRUPTED),
    _row("int-early", "Ctrl-C while the ranks start", early(signal.SIGINT), 130, INTERRUPTED),
    _row("int-all", "SIGINT to every process of the job", send_at("before score", signal.SIGINT, to_all), 130,
         INTERRUPTED),
    _row("term", "SIGTERM to the launcher in a step (Slurm)",
         send_at(IN_STEP, signal.SIGTERM, to_launcher), 0, STOPPED, representative=True),
    _row("term-all", "SIGTERM to every process of the job (scancel)", send_at(SCORING, signal.SIGTERM, to_all), 0,
         STOPPED),
    _row("term-checkpoint", "SIGTERM in a checkpoint", send_at(SAVING, signal.SIGTERM, to_launcher), 0,
         STOPPED),
    _row("term-early", "SIGTERM while the ranks start", early(signal.SIGTERM), 0, "stopped by SIGTERM"),
    _row("hup", "SIGHUP (the terminal closes)", send_at("before optimizer", signal.SIGHUP, to_terminal), 0, STOPPED),
    Fault(
        id="signal-term-make-models",
        group="signal",
        done="SIGTERM while the models of the quickstart are made",
        wanted="one line, and no half-made folder",
        play=making_models,
        code=(0, 130, 143, -15),
        limit_s=30.0,
    ),
    _row("int-prefixes", "Ctrl-C in `tropd prefixes` while its server starts",
         subcommand("prefixes", signal.SIGINT, "--out", "OUT", "--max-new-tokens", "8"), 130, "interrupted", chain=""),
    _row("term-eval", "SIGTERM in `tropd eval` while its server starts",
         subcommand("eval", signal.SIGTERM, "--prompts", "PROMPTS", "--model", "MODEL"), 143, "SIGTERM|stopped",
         chain=""),
]  # fmt: skip
