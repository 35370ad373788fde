"""A job that samples from several rollout servers: its command, its servers as they run, and what it must have done.

The `fleet_*` modules have the faults. Invariants: a fault begins when every server takes part. After it, every step has
all of its samples, in the order of an undisturbed run and of one weight version, and every server takes part again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import psutil

from tests.faults.launch import Launch, TooLateError
from tests.faults.scene import Scene, scene
from tests.faults.stage import SAMPLES, Stage
from tests.faults.verdict import FLEET, Fault, Seen
from tests.slow_engine import slowed
from tropd_mcore.rollout.member import REST_STEPS

Play = Callable[[Scene], Seen]
SERVERS = 3
PROMPTS = 6
"""Prompts of a step: several samples for each server."""
HANG_S = 6.0
"""rollout.server.hang_timeout_s of these runs; 60 by default."""
STEPS_PER_FAULT = 6
UNDISTURBED_STEPS = 120
"""Steps of the run that says which samples each step has. No run with faults is longer."""
COMMON = (
    f"rollout.prompts_per_step={PROMPTS}",
    f"rollout.server.hang_timeout_s={HANG_S:g}",
    "rollout.server.max_restarts=30",
)
WORKS_S, RESTS_S = 0.03, 0.27
"""A slow engine works a tenth of the time."""
LOOK_S = 1.0
"""Seconds between two looks whether all servers are up."""
UP_S = 120.0
"""Longest wait until all servers are up, before another step may pass."""
READY_S = 300.0
"""Longest wait for the next step. It only ends a hang."""


def running(scene: Scene, *more: str) -> Launch:
    """The launch of the run with its own servers, up to its first sampled step."""
    if "ready" not in scene.shared:
        scene.shared |= {"ready": True, "compare": True}
        scene.config = scene.stage.live_config
        scene.overrides = [
            "parallel.tensor=1",
            f"run.steps={STEPS_PER_FAULT * scene.shared['faults'] + 10}",
            "rollout.max_new_tokens=64",
            f"rollout.servers=[{','.join(['{}'] * SERVERS)}]",
            *COMMON,
            *more,
        ]
    return scene.job()


class Server:
    """One server that the run started, as it runs now."""

    def __init__(self, scene: Scene, launch: Launch, place: int) -> None:
        name = f"rollout-{place}"
        self.main = launch.server(scene.run_dir, name)
        self._port = json.loads((scene.run_dir / "logs" / f"{name}.server.json").read_text())["port"]

    def family(self) -> list[psutil.Process]:
        """All of its processes."""
        return [self.main, *self.main.children(recursive=True)]

    def engine(self) -> psutil.Process:
        """The process that computes."""
        return next(process for process in self.family() if "scheduler" in process.name())

    def kill(self) -> None:
        """SIGKILL its process group."""
        os.killpg(self.main.pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP its process group."""
        os.killpg(self.main.pid, signal.SIGSTOP)

    def is_up(self) -> bool:
        """Whether its engine gives results."""
        try:
            key = self.main.environ().get("TROPD_SERVER_KEY", "")
        except psutil.Error:
            return False
        return _answers(f"http://127.0.0.1:{self._port}/health", key)


def _answers(url: str, key: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def servers_of(scene: Scene, launch: Launch, count: int = SERVERS) -> list[Server]:
    """The servers as they run now."""
    return [Server(scene, launch, place) for place in range(count)]


def _all_up(scene: Scene, launch: Launch, count: int) -> bool:
    with contextlib.suppress(psutil.Error, OSError, ValueError, KeyError):
        if all(server.is_up() for server in servers_of(scene, launch, count)):
            return True
    time.sleep(LOOK_S)
    return False


def together(scene: Scene, launch: Launch, count: int = SERVERS) -> None:
    """Halt the run before a step in which every server will take part, and let one such step pass.

    A server that seemed slow is left out of some steps before that, and one that hangs meanwhile is noticed after them.
    """
    launch.halt("before sample")
    for _ in range(REST_STEPS + 4):
        up, before = _wait_for_all(scene, launch, count), answered(scene, count)
        launch.arm("before sample")
        launch.go()
        launch.reach()
        after_it = answered(scene, count)
        idle = [place for place in range(count) if after_it[place] <= before[place]]
        if up and not idle:
            return
    raise TooLateError(f"rollout.servers {idle} took no part in {REST_STEPS + 4} steps")


def _wait_for_all(scene: Scene, launch: Launch, count: int) -> bool:
    """Wait until all servers are up, at most UP_S. Returns whether they are."""
    deadline = time.monotonic() + UP_S
    while not _all_up(scene, launch, count):
        if launch.process.poll() is not None:
            raise TooLateError(f"all servers up: the command ended before with {launch.process.returncode}")
        if time.monotonic() > deadline:
            return False
    return True


def answered(scene: Scene, count: int) -> list[int]:
    """For each server, the sampling requests in its log."""
    logs = [scene.run_dir / "logs" / f"rollout-{place}.log" for place in range(count)]
    return [log.read_text(errors="replace").count("POST /generate") for log in logs]


def at(
    edge: str,
    nth: int,
    act: Callable[[list[Server]], None],
    *,
    steps: int = 1,
    start: Callable[[Scene], Launch] = running,
    count: int = SERVERS,
) -> Play:
    """Do something to the servers when rank 0 is at `edge` for the `nth` time in a step of all of them.

    The fault is over after so many steps: one if the step samples later, else two.
    """

    def play(scene: Scene) -> Seen:
        launch = start(scene)
        together(scene, launch, count)
        servers, done = servers_of(scene, launch, count), scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        scene.strike(launch)
        act(servers)
        launch.go()
        return after(scene, launch, done + steps, count)

    return play


def after(scene: Scene, launch: Launch, done: int, count: int = SERVERS) -> Seen:
    """Wait until `done` steps are done, then until every server takes part again."""
    seen = scene.goes_on(launch, lambda: scene.steps() >= done, READY_S)
    seen.left_running = []  # it must still run
    if not seen.hung and launch.process.poll() is None:
        try:
            together(scene, launch, count)
        except TooLateError as error:
            seen.lost.append(f"not every server takes part again: {error}"[:400])
        launch.go()
    seen.lost += sample_problems(scene)
    return seen


def slow_from(edge: str, nth: int, place: int) -> Play:
    """One server is slow from `edge` to the end of the step."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        together(scene, launch)
        server, done = servers_of(scene, launch)[place], scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        scene.strike(launch)
        with slowed(server.engine(), works_s=WORKS_S, rests_s=RESTS_S):
            launch.go()
            seen = scene.goes_on(launch, lambda: scene.steps() > done)
        seen.left_running = []
        together(scene, launch)
        launch.go()
        seen.lost += sample_problems(scene)
        return seen

    return play


def sample_problems(scene: Scene, since: int = 0) -> list[str]:
    """The steps on disk whose samples are not those of an undisturbed run, or not of one weight version of the step."""
    from tropd_mcore.records.replay import load_rollouts

    expected, found = undisturbed(scene.stage), []
    for path in sorted((scene.run_dir / "rollouts").glob("step_*.npz")):
        step = int(path.stem.removeprefix("step_"))
        rollouts = load_rollouts(path)
        ids = [rollout.sample_id for rollout in rollouts]
        if ids != expected[step]:
            found.append(f"step {step} has the samples {ids}; expected {expected[step]}"[:300])
        versions = {rollout.policy_version for rollout in rollouts}
        if len(versions) != 1 or not next(iter(versions)).endswith(f"/step-{step:06d}"):
            found.append(f"step {step} has samples of the weights {sorted(versions)}")
    return found


def undisturbed(stage: Stage) -> dict[int, list[str]]:
    """{step: its sample ids in order} of a run of the same prompts with one server and no fault. Made once."""
    from tropd_mcore.records.replay import load_rollouts

    with stage.once:
        if stage.samples is None:
            with scene(stage, "fleet-undisturbed") as made:
                made.config = stage.live_config
                made.overrides = ["parallel.tensor=1", f"run.steps={UNDISTURBED_STEPS}", "run.export_at_end=false",
                                  "run.checkpoint_every=1000", "rollout.max_new_tokens=4",
                                  "objective.guidance.enabled=false", *COMMON]  # fmt: skip
                launch = made.job()
                if not launch.ended(READY_S * 2) or launch.process.poll() != 0:
                    raise TooLateError(f"the run without a fault ended with {launch.process.poll()}: {launch.tail()}")
                stored = sorted((made.run_dir / "rollouts").glob("step_*.npz"))
                stage.samples = {
                    step: [rollout.sample_id for rollout in load_rollouts(path)] for step, path in enumerate(stored)
                }
        samples = stage.samples
    assert len(samples) == UNDISTURBED_STEPS and {len(ids) for ids in samples.values()} == {PROMPTS * SAMPLES}
    return samples


def row(
    name: str, done: str, wanted: str, play: Play, line: str, *, code: tuple[int | None, ...] = (None,),
    chain: str = "", shared: bool = False, limit_s: float = 240.0,
) -> Fault:  # fmt: skip
    """A row of the fleet."""

    def played(scene: Scene) -> Seen:
        undisturbed(scene.stage)  # made before the run starts, because it takes longer than a fault
        return play(scene)

    return Fault(
        id=f"fleet-{name}",
        group=FLEET,
        done=done,
        wanted=wanted,
        play=played,
        code=code,  # type: ignore[arg-type]
        line=line,
        limit_s=limit_s,
        chain=chain,
        shared=shared,
    )
