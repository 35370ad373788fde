"""Faults of servers that the run starts: killed, suspended, slow, one of them or all at once, and their router."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.fleet import (
    Play,
    Server,
    after,
    at,
    row,
    running,
    sample_problems,
    servers_of,
    slow_from,
    together,
)
from tests.faults.launch import Launch
from tests.faults.scene import Scene
from tests.faults.verdict import Seen

CHAIN = "fleet-own"
ROUTED = "fleet-router"
USED_UP = "fleet-used-up"
SAMPLING = ("before generate", 1), ("after answer", 1), ("after answer", 8)
PUBLISHING = ("before publish", 1), ("before update weights", 2), ("before label weights", 2)
BETWEEN = ("before forward and backward", 1), ("after optimizer", 1)
Act = Callable[[list[Server]], None]


def kill(*places: int) -> Act:
    """SIGKILL these servers."""

    def act(servers: list[Server]) -> None:
        for place in places:
            servers[place].kill()

    return act


def stop(place: int) -> Act:
    """SIGSTOP this server."""
    return lambda servers: servers[place].stop()


def routed(scene: Scene) -> Launch:
    """The launch of a run whose samples go through a router."""
    return running(scene, "rollout.router={}", "rollout.servers=[{},{}]")


def kill_router(edge: str, nth: int, steps: int = 1) -> Play:
    """SIGKILL the router while rank 0 is at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = routed(scene)
        together(scene, launch, 2)
        router, done = launch.server(scene.run_dir, "router"), scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        scene.strike(launch)
        router.kill()
        launch.go()
        seen = after(scene, launch, done + steps, 2)
        if not seen.hung and launch.server(scene.run_dir, "router").pid == router.pid:
            seen.weak.append("the router was not restarted")
        return seen

    return play


def use_up(scene: Scene) -> Seen:
    """Kill all servers twice where each may be restarted once."""
    launch = running(scene, "rollout.server.max_restarts=1")
    together(scene, launch)
    for last in (False, True):
        done = scene.steps()
        launch.arm("after answer", nth=3)
        launch.go()
        launch.reach()
        scene.strike(launch)
        kill(0, 1, 2)(servers_of(scene, launch))
        launch.go()
        if last:
            break
        seen = scene.goes_on(launch, lambda done=done: scene.steps() > done)  # type: ignore[misc]
        if seen.lost or seen.hung:
            return seen
        together(scene, launch)
    done = scene.steps()
    seen = scene.end(launch)
    if scene.steps() != done:
        seen.lost.append("a step was made without servers")
    seen.lost += sample_problems(scene)
    return seen


GOES_ON = "the step goes on with the others; a line names the server's section; it is restarted and takes part again"
RESTARTED = r"rollout\.servers\.{}\b.*\(started again\)"
FAULTS = [
    *(
        row(f"killed-{when}-{number}", f"SIGKILL one of three servers {edge} {nth}", GOES_ON,
            at(edge, nth, kill(number % 3), steps=steps), RESTARTED.format(number % 3), chain=CHAIN)
        for when, edges, steps in (("sampling", SAMPLING, 1), ("update", PUBLISHING, 1), ("between", BETWEEN, 2))
        for number, (edge, nth) in enumerate(edges)
    ),
    *(
        row(f"stopped-{when}-{number}", f"SIGSTOP one of three servers {edge} {nth}", GOES_ON,
            at(edge, nth, stop(number % 3)), RESTARTED.format(number % 3), chain=CHAIN)
        for when, edges in (("sampling", SAMPLING[:2]), ("update", PUBLISHING[1:]))
        for number, (edge, nth) in enumerate(edges)
    ),
    *(
        row(f"slow-{number}", f"one of three servers works a tenth of the time, from {edge} {nth} on",
            "the run goes on; its open samples go on at the others from their tokens, counted in the log",
            slow_from(edge, nth, place), r"rollout\.servers: [1-9]\d* samples went on at another server", chain=CHAIN)
        for number, (edge, nth, place) in enumerate((("before generate", 1, 0), ("after answer", 2, 2)))
    ),
    *(
        row(f"all-killed-{number}", f"SIGKILL all three servers {edge} {nth}",
            "the step goes on after their restart; a line names each section",
            at(edge, nth, kill(0, 1, 2), steps=steps), r"rollout\.servers\.\d\b.*\(started again\)", chain=CHAIN)
        for number, (edge, nth, steps) in enumerate(
            (("after answer", 5, 1), ("before update weights", 1, 1), ("before forward and backward", 1, 2))
        )
    ),
    row("all-killed-for-ever", "SIGKILL all three servers once more than max_restarts=1 allows",
        "one line that names a section and the key; exit code 2; nothing left; the same command goes on",
        use_up, r"^error: rollout\.servers\.\d\b.*max_restarts=1 are used up", code=(2,), chain=USED_UP),
    *(
        row(f"router-killed-{number}", f"SIGKILL the router {edge} {nth}",
            "a line names the router; it is restarted with its servers; the step is complete",
            kill_router(edge, nth, steps), r"rollout\.router: .*restart \d+ of", chain=ROUTED)
        for number, (edge, nth, steps) in enumerate(
            (("before generate", 1, 1), ("after answer", 2, 1), ("before forward and backward", 1, 2))
        )
    ),
]  # fmt: skip
