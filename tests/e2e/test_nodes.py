"""Two nodes on loopback, one rank each, of which one is lost without a goodbye or stands still."""

from __future__ import annotations

import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e import jobs
from tests.faults.launch import Launch, send
from tests.faults.rows_messages import _free_port
from tests.faults.scene import Scene, scene
from tests.faults.stage import Reference, Stage, set_stage
from tropd_mcore.train.exits import LOST

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

NODE_LIMIT_S = 6.0
"""run.node_timeout_s of these runs; 60 by default."""
SLACK_S = 20.0
"""Longest time above the limit until the other node has ended, on a busy machine."""
Start = Callable[[Scene, int, str], Launch]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = set_stage(tmp_path_factory.mktemp("nodes"))
    made.reference()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def run(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(stage, request.node.name) as made:
        made.overrides = [f"run.node_timeout_s={NODE_LIMIT_S:g}"]
        yield made


def tropd_train(run: Scene, rank: int, port: str) -> Launch:
    """`tropd train` as node `rank` of two."""
    extra = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return run.start(run.command(), extra=extra)


def torchrun(run: Scene, rank: int, port: str, *rendezvous: str) -> Launch:
    """torchrun as node `rank` of two."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1"]
    return run.start([*agent, *rendezvous, "-m", "tropd_mcore.train", *run.command()[4:]])


def static(run: Scene, rank: int, port: str) -> Launch:
    return torchrun(run, rank, port, "--master-addr=127.0.0.1", f"--master-port={port}")


def c10d(run: Scene, rank: int, port: str) -> Launch:
    return torchrun(run, rank, port, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")


def both(run: Scene, start: Start = tropd_train) -> list[Launch]:
    """Start both nodes of the run, the first one first: it has the store in which torchrun's agents meet."""
    port = _free_port()
    first = start(run, 0, port)
    if start is c10d:
        _wait_for_a_listener(int(port))
    return [first, start(run, 1, port)]


def _wait_for_a_listener(port: int) -> None:
    deadline = time.monotonic() + SLACK_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, f"nothing listens at port {port}"
            time.sleep(0.1)
        else:
            return


def vanish(node: Launch, number: signal.Signals) -> None:
    """Send SIGKILL or SIGSTOP to all processes of a node, its launcher first."""
    node.look()
    for process in node.members():
        send(process, number)


def causes(node: Launch) -> list[str]:
    return [line.text for line in node.lines if re.match(r"error|Traceback", line.text)]


def finish(run: Scene) -> None:
    """Start the same commands again. The run has to end like one without the fault."""
    nodes = both(run)
    assert [(node.ended(), node.process.poll()) for node in nodes] == [(True, 0)] * 2, nodes[0].tail()
    assert run.stage.reference().differences(Reference.of(run.run_dir)) == []


def wait_for_the_end(node: Launch, limit_s: float) -> float:
    """Seconds until a node and all its processes have ended."""
    begun = node.seconds
    assert node.ended(limit_s + SLACK_S), node.tail()
    time.sleep(0.2)  # the reader may lag by one line
    return node.seconds - begun


def test_a_killed_node_is_named_in_one_line_by_the_other_one_and_the_same_commands_resume(run: Scene) -> None:
    first, second = both(run)
    second.halt("before score", rank=1)
    vanish(second, signal.SIGKILL)
    seconds = wait_for_the_end(first, NODE_LIMIT_S)
    print(f"second node killed: {seconds:.1f} s")
    (line,) = causes(first)
    assert re.match(r"error: no sign of life for 6 s from node 1 \(\S+, rank 1\): .*run\.node_timeout_s", line)
    assert first.process.poll() == LOST
    assert seconds > NODE_LIMIT_S - 4.0
    finish(run)


def test_a_killed_first_node_is_named_in_one_line_and_leaves_nothing_half_written(run: Scene) -> None:
    first, second = both(run)
    first.halt("before checkpoint info", rank=0)
    vanish(first, signal.SIGKILL)
    print(f"first node killed: {wait_for_the_end(second, NODE_LIMIT_S):.1f} s")
    (line,) = causes(second)
    assert re.match(r"error: node 1 was stopped because of another one: the launcher of node 0 \(\S+, rank 0\)", line)
    assert second.process.poll() == LOST
    finish(run)
    left = [path for path in run.run_dir.rglob("*") if ".partial" in path.name or path.name.endswith(".fresh")]
    assert left == []


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_stands_still_ends_the_job_only_after_the_limit(run: Scene, lost: int) -> None:
    nodes = both(run)
    nodes[lost].halt("before score", rank=lost)
    vanish(nodes[lost], signal.SIGSTOP)
    time.sleep(NODE_LIMIT_S / 2)
    vanish(nodes[lost], signal.SIGCONT)
    nodes[lost].arm("before forward and backward", rank=lost)
    nodes[lost].go(lost)
    nodes[lost].reach(lost)
    vanish(nodes[lost], signal.SIGSTOP)
    print(f"node {lost}: {wait_for_the_end(nodes[1 - lost], NODE_LIMIT_S):.1f} s")
    (line,) = causes(nodes[1 - lost])
    assert f"no sign of life for 6 s from node {lost} (" in line
    assert nodes[1 - lost].process.poll() == LOST
    vanish(nodes[lost], signal.SIGCONT)  # it wakes up again and has to end, too
    assert nodes[lost].ended(NODE_LIMIT_S + SLACK_S)
    assert nodes[lost].process.poll() == LOST


@pytest.mark.parametrize("start", [static, c10d])
def test_under_torchrun_the_ranks_name_the_lost_node(run: Scene, start: Start) -> None:
    run.overrides = [f"run.rank_timeout_s={NODE_LIMIT_S:g}"]
    first, second = both(run, start)
    second.halt("before score", rank=1)
    vanish(second, signal.SIGKILL)
    print(f"torchrun: {wait_for_the_end(first, NODE_LIMIT_S):.1f} s")
    (line,) = [text for text in causes(first) if text.startswith("error")]
    assert re.match(r"error: rank 1 \(\S+, pid \d+\) has given no sign of life for 6 s", line)
    assert first.process.poll() not in (0, None)
