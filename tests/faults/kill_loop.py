"""One run that is killed repeatedly, and then compared bit for bit with an undisturbed run.

    python -m tests.faults kill-loop --kills 30 --out tests/faults/results/kill_loop.json

The run has two ranks and its own rollout server. The seed determines the moment of every kill: shortly after a rank has
passed a random edge of a phase (`phases`), while all processes run. Victim and signal are random too. Then the same
command is run again. At the end, an uninterrupted replay of the rollouts must give the same metrics and weights.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import results
from tests.faults.launch import Launch, TooLateError, send
from tests.faults.rows_signals import to_all
from tests.faults.scene import Scene, end_with_the_suite, scene
from tests.faults.stage import set_stage

VICTIMS = (
    ("rank 0", signal.SIGKILL),
    ("rank 1", signal.SIGKILL),
    ("both ranks", signal.SIGKILL),
    ("rank 0", signal.SIGTERM),
    ("rank 1", signal.SIGTERM),
    ("launcher", signal.SIGKILL),
    ("launcher", signal.SIGTERM),
    ("launcher", signal.SIGINT),
    ("all processes", signal.SIGINT),
    ("server", signal.SIGKILL),
)
LIVE_EDGES = (
    "before start",
    "after load model",
    "before sample",
    "before update weights",
    "after update weights",
    "before generate",
    "after generate",
    "before store rollouts",
    "after store rollouts",
    "before score",
    "after score",
    "before forward and backward",
    "after forward and backward",
    "before optimizer",
    "after optimizer",
    "before metrics",
    "after metrics",
    "before checkpoint",
    "before checkpoint info",
    "after checkpoint info",
    "before prune",
)
ONLY_RANK_ZERO = ("update weights", "generate", "checkpoint info", "prune")
END_LIMIT_S = 60.0
LATEST_S = 0.15
"""Longest time between the edge and the kill."""


@dataclass
class Kill:
    """One kill and its outcome."""

    number: int
    victim: str
    signal: str
    edge: str
    points: dict[str, str]
    """The edge that each rank had passed last when the signal was sent."""
    steps_done: int
    exit_code: int | None = None
    seconds: float = 0.0
    """Seconds until all processes had ended, or until the run had continued."""
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Run the loop. Returns 0 if no step was lost, no process left and no result different."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults kill-loop", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help="steps of the run (default: 1.5 per kill and 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--work", type=Path, help="folder of models and runs, kept (default: a temporary one)")
    options = parser.parse_args(arguments)
    options.steps = options.steps or options.kills * 3 // 2 + 10
    with tempfile.TemporaryDirectory(prefix="tropd-kill-loop-") as spare:
        root: Path = (options.work or Path(spare)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        stage = set_stage(root)
        end_with_the_suite(stage)
        with scene(stage, "kill-loop") as made:
            kills, problems = kill_loop(made, options)
            problems += [] if problems else made.replay_problems()
        result = summary(kills, problems, options, time.monotonic() - begun)
        if options.out is not None:
            results.write_json(options.out, result)
        say(f"{len(kills)} kills in {result['seconds']} s; problems: {problems or 'none, equal bit for bit'}")
    return 1 if problems else 0


def kill_loop(made: Scene, options: argparse.Namespace) -> tuple[list[Kill], list[str]]:
    """Kill the run as often as requested, then let it finish. Returns the kills and the problems."""
    draw = random.Random(options.seed)
    made.config = made.stage.live_config
    made.overrides = [f"run.steps={options.steps}", "run.checkpoint_every=2", "rollout.server.max_restarts=100"]
    edges = [LIVE_EDGES[number % len(LIVE_EDGES)] for number in range(options.kills)]
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(options.kills)]
    draw.shuffle(edges)
    draw.shuffle(victims)
    kills: list[Kill] = []
    for number, (edge, (victim, signum)) in enumerate(zip(edges, victims, strict=True), start=1):
        try:
            kill = one_kill(made, draw, number, edge, victim, signum)
        except TooLateError as error:
            return kills, [*_problems(kills), f"kill {number} ({edge}, {victim}): {error}"]
        kills.append(kill)
        say(f"kill {number}: {victim} {signum.name} {edge}, step {kill.steps_done}: "
            f"{kill.exit_code}, {kill.seconds:.1f} s {kill.problems or ''}")  # fmt: skip
    problems = _problems(kills)
    problems += made.finish(limit_s=600.0)
    return kills, problems


def _problems(kills: list[Kill]) -> list[str]:
    return [f"kill {kill.number}: {text}" for kill in kills for text in kill.problems]


def one_kill(made: Scene, draw: random.Random, number: int, edge: str, victim: str, signum: signal.Signals) -> Kill:
    """Wait for the moment, send the signal, and check that all processes end, or continue if they should."""
    launch = made.job()
    watcher = 0 if edge.partition(" ")[2] in ONLY_RANK_ZERO else draw.randrange(2)
    nth = 1 if edge.endswith(("start", "load model")) else draw.randint(1, 2)
    if victim == "server" and edge.endswith(("start", "load model")):
        edge = "before generate"  # there is no server yet
        watcher = 0
    launch.arm(edge, rank=watcher, then="go on", nth=nth)
    launch.reach(watcher)
    time.sleep(draw.uniform(0.0, LATEST_S))
    launch.look()
    steps = made.steps()
    points = {f"rank {rank}": launch.point(rank) for rank in range(2)}
    kill = Kill(number, victim, signum.name, edge, points, steps)
    made.strike(launch)
    _send(made, launch, victim, signum)
    if victim == "server":
        seen = made.goes_on(launch, lambda: made.steps() > steps + 1 or launch.process.poll() is not None)
        kill.problems = seen.lost
    else:
        seen = made.end(launch, END_LIMIT_S)
        kill.problems = [*(f"left running: {text}" for text in seen.left_running), *(["hung"] if seen.hung else [])]
    kill.exit_code, kill.seconds = seen.code, round(seen.seconds, 2)
    return kill


def _send(made: Scene, launch: Launch, victim: str, signum: signal.Signals) -> None:
    if victim == "launcher":
        launch.process.send_signal(signum)
    elif victim == "all processes":
        to_all(launch, signum)
    elif victim == "server":
        send(launch.server(made.run_dir), signum)
    else:
        for rank in (0, 1) if victim == "both ranks" else (int(victim[-1]),):
            send(launch.rank(rank), signum)


def summary(kills: list[Kill], problems: list[str], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The kill's result as JSON."""
    at = Counter(point for kill in kills for point in kill.points.values())
    return {
        "command": f"python -m tests.faults kill-loop --kills {options.kills} --steps {options.steps} "
        f"--seed {options.seed}",
        **results.circumstances(),
        "seconds": round(seconds),
        "kills": len(kills),
        "steps": options.steps,
        "equal_bit_for_bit": not problems,
        "compared": "every metric of every line but time/*, throughput/*, gates/*; SHA-256 of the exported weights",
        "problems": problems,
        "victims": dict(Counter(f"{kill.victim} {kill.signal}" for kill in kills)),
        "edges_drawn": dict(sorted(Counter(kill.edge for kill in kills).items())),
        "points_hit": dict(sorted(at.items())),
        "longest_end_s": max((kill.seconds for kill in kills if kill.victim != "server"), default=0.0),
        "each": [asdict(kill) for kill in kills],
    }


def say(text: str) -> None:
    """Print one line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
