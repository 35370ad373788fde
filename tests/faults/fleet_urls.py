"""Faults of a fleet at urls: a server that somebody restarts, one that lies, a job that is killed in an update."""

from __future__ import annotations

import contextlib
import json

import psutil

from tests.e2e.jobs import metrics
from tests.faults.fleet import COMMON, STEPS_PER_FAULT, Play, row, sample_problems
from tests.faults.launch import Launch, TooLateError
from tests.faults.lies import _proxy
from tests.faults.rows_servers import after as honest_before
from tests.faults.scene import Scene
from tests.faults.stage import Outside
from tests.faults.verdict import Seen
from tests.liars import nothing_done
from tropd_mcore.rollout.member import REST_STEPS

CHAIN = "fleet-urls"
PROOF_UPDATES = 2
"""Updates of a server before the first step. They prove that an update sets every weight."""


def outsiders(scene: Scene) -> list[Outside]:
    """Two servers that no job owns, of different weights."""
    return [scene.stage.outside("student"), scene.stage.outside("other")]


def fleet_at(scene: Scene, urls: list[str], steps: int) -> None:
    """Make the scene's command a job of one rank that samples from the servers at these urls."""
    scene.config = scene.stage.live_config
    scene.overrides = [
        "parallel.tensor=1",
        f"run.steps={steps}",
        "rollout.max_new_tokens=64",
        "rollout.server.max_total_tokens=null",
        f"rollout.servers={json.dumps([{'url': url} for url in urls])}",
        *COMMON[:-1],
    ]


def running(scene: Scene) -> Launch:
    """The launch of the run with both servers, up to its first sampled step."""
    if "ready" not in scene.shared:
        scene.shared |= {"ready": True, "compare": True}
        fleet_at(scene, [server.url for server in outsiders(scene)], STEPS_PER_FAULT * scene.shared["faults"] + 10)
    return scene.job()


def a_step_of_both(scene: Scene, launch: Launch) -> None:
    """Let steps pass until both servers have answered in one, and halt the run before the next one."""
    launch.halt("before sample")
    for _ in range(REST_STEPS + 2):  # one that was just started takes part in a later step
        before = _answered(scene)
        launch.arm("before sample")
        launch.go()
        launch.reach()
        after = _answered(scene)
        if all(new > old for old, new in zip(before, after, strict=True)):
            return
    raise TooLateError(f"a server took no part in {REST_STEPS + 2} steps: {before}, then {after} answers")


def _answered(scene: Scene) -> list[int]:
    return [server.log.read_text(errors="replace").count("POST /generate") for server in outsiders(scene)]


def restarted(edge: str, nth: int) -> Play:
    """Somebody kills the second server and starts it again on its port, while rank 0 is at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        a_step_of_both(scene, launch)
        done = scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        outsiders(scene)[1].restart()
        scene.strike(launch)
        launch.go()
        seen = scene.goes_on(launch, lambda: scene.steps() > done)
        seen.left_running = []
        both_again(scene, launch, seen)
        return seen

    return play


def both_again(scene: Scene, launch: Launch, seen: Seen) -> None:
    """Let the run go on to its end; note in `seen` if a server takes no part any more, and what samples show."""
    try:
        a_step_of_both(scene, launch)
    except TooLateError as error:
        seen.lost.append(f"not every server takes part again: {error}"[:400])
    launch.go()
    seen.lost += sample_problems(scene)


def restarted_before_its_label(scene: Scene) -> Seen:
    """Somebody restarts the first server after its weights were checked, so that its old weights get the label.

    The first server, because the threads that label the servers begin with it.
    """
    launch = running(scene)
    a_step_of_both(scene, launch)
    done = scene.steps()
    launch.arm("before label weights", nth=1)
    launch.go()
    launch.reach()
    outsiders(scene)[0].restart()
    scene.strike(launch)
    launch.go()
    seen = scene.end(launch)
    if scene.steps() != done:
        seen.lost.append("the run trained on samples of old weights")
    seen.lost += sample_problems(scene)
    return seen


def job_killed(edge: str, nth: int) -> Play:
    """SIGKILL the whole job while rank 0 is at `edge`, and start the same command again."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        a_step_of_both(scene, launch)
        done = scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        launch.look()
        for process in launch.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        ended = launch.ended(60.0)
        again = running(scene)
        scene.struck = 0.0
        seen = scene.goes_on(again, lambda: scene.steps() > done)
        seen.left_running = [] if ended else launch.left()
        both_again(scene, again, seen)
        return seen

    return play


def lies_from(update: int) -> Play:
    """The second server is behind a proxy that swallows its updates from this one on and passes its label on."""

    def play(scene: Scene) -> Seen:
        first, second = outsiders(scene)
        proxy = _proxy(scene, second.url)
        fleet_at(scene, [first.url, proxy.url], 6)
        honest_before(update, "/update_weights_from_tensor", nothing_done)(proxy)
        launch = scene.job()
        scene.struck = 0.0
        seen = scene.end(launch)
        honest = max(0, update - PROOF_UPDATES + 1) if update >= PROOF_UPDATES else 0
        if len(metrics(scene.run_dir)) != honest:
            seen.lost.append(f"{len(metrics(scene.run_dir))} steps were trained; expected {honest}")
        if len(list((scene.run_dir / "rollouts").glob("step_*.npz"))) != honest:
            seen.lost.append("samples of a server that has other weights are stored")
        seen.lost += sample_problems(scene)
        return seen

    return play


OLD = "its samples are refused, the step goes on with the other one; it gets the weights and takes part again"
FAULTS = [
    *(
        row(f"url-restarted-{number}", f"somebody restarts a server at a url with old weights, {edge} {nth}", OLD,
            restarted(edge, nth), r"rollout\.servers\.1\b.*\(asked again at the next step\)", chain=CHAIN, shared=True)
        for number, (edge, nth) in enumerate((("before generate", 1), ("after answer", 1), ("after answer", 6),
                                              ("before update weights", 1)))
    ),
    *(
        row(f"job-killed-{number}", f"SIGKILL the job {edge} {nth}; its servers at urls stay paused, in an open update",
            "the same command resumes the servers, and every step is complete",
            job_killed(edge, nth), line, chain=CHAIN, shared=True)
        for number, (edge, nth, line) in enumerate((
            ("before update weights", 1, "closing the weight-update session"),
            ("before update weights", 2, "closing the weight-update session"),
            ("before label weights", 1, ""),
            ("after label weights", 2, ""),
        ))
    ),
    row("url-restarted-label", "somebody restarts a server at a url between the proof of its weights and its label",
        "exit code 2 and one line that names its section; no step is trained on its samples",
        restarted_before_its_label, r"^error: .*rollout\.servers\.0\b", code=(2,), chain=CHAIN, shared=True),
    *(
        row(f"lies-{number}",
            f"a server loads no update from number {update + 1} on, but reports success and takes the label",
            "GateError: exit code 2 and one line that names its section; nothing is trained on it",
            lies_from(update), r"^error: .*rollout\.servers\.1: ", code=(2,), shared=True)
        for number, update in enumerate((0, 1, 2, 4))
    ),
]  # fmt: skip
