"""Faults of a fleet on two nodes, which stand on this machine: the servers of the second node are gone."""

from __future__ import annotations

from tests.faults.fleet import COMMON, STEPS_PER_FAULT, Play, Server, after, row, servers_of, together
from tests.faults.launch import Launch
from tests.faults.rows_messages import _free_port
from tests.faults.scene import Scene
from tests.faults.verdict import Seen

CHAIN = "fleet-nodes"


def both_nodes(scene: Scene) -> Launch:
    """The first node of the run; the second one is started with it. Each has a rank and a server."""
    if "ready" not in scene.shared:
        scene.shared |= {"ready": True, "compare": True}
        scene.config = scene.stage.live_config
        scene.overrides = [
            f"run.steps={STEPS_PER_FAULT * scene.shared['faults'] + 10}",
            "rollout.max_new_tokens=64",
            "rollout.servers=[{},{node: 1}]",
            *COMMON,
        ]
        port = _free_port()
        nodes = [
            scene.start(
                scene.command(),
                extra={"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            )
            for rank in range(2)
        ]
        scene.shared["second"] = nodes[1]
        scene.current = nodes[0]
    return scene.job()


def killed(edge: str, nth: int, steps: int = 1) -> Play:
    """SIGKILL the server of the second node while rank 0 is at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = both_nodes(scene)
        second: Launch = scene.shared["second"]
        together(scene, launch, 2)
        server, done = servers_of(scene, launch, 2)[1], scene.steps()
        launch.arm(edge, nth=nth)
        launch.go()
        launch.reach()
        scene.strike(launch)
        server.kill()
        launch.go()
        seen = after(scene, launch, done + steps, 2)
        fresh = Server(scene, launch, 1)
        if fresh.main.pid not in second.pids() | {process.pid for process in second.members()}:
            seen.lost.append("the server of node 1 was not started by the rank of node 1")
        return seen

    return play


FAULTS = [
    row(f"node-{number}", f"SIGKILL the only server of the second node {edge} {nth}",
        "the step goes on with the server of the first node; the rank of its node starts it again; it takes part again",
        killed(edge, nth, steps), r"rollout\.servers\.1\b.*\(started again\)", chain=CHAIN)
    for number, (edge, nth, steps) in enumerate(
        (("after answer", 2, 1), ("before update weights", 1, 1), ("before forward and backward", 1, 2))
    )
]  # fmt: skip
