"""A teacher with a server on each of two nodes. Two ranks on this machine stand for the nodes."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.glue.stubs import make_config, make_layout
from tests.ranks import run_on_ranks
from tests.sglang.conftest import VOCABULARY, Oracle
from tropd_mcore.errors import ConfigError
from tropd_mcore.mcore.collective import on_rank_zero
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.serving.fleet import ServerFleet
from tropd_mcore.serving.wire import ScoringRequest, TokenScores
from tropd_mcore.train.servers import Nodes, start_teacher_servers

LIMIT_S = 300.0
TOLERANCE = 2e-4


def requests() -> list[ScoringRequest]:
    """Enough samples for both servers."""
    made = np.random.default_rng(0)
    ids = [made.integers(3, VOCABULARY, 24 + 3 * index).astype(np.int32) for index in range(8)]
    return [ScoringRequest(each, first=5, topk=4, vocab_size=VOCABULARY) for each in ids]


def context_of(folder: Path, place: Path, servers: list[dict[str, Any]]) -> Any:
    server = {"max_total_tokens": 4096, "hang_timeout_s": 10.0, "start_timeout_s": 240.0}
    teacher = {"kind": "sglang", "path": folder, "server": server, "servers": servers}
    return SimpleNamespace(
        config=make_config(place, teacher=teacher),
        layout=make_layout(),
        platform=SimpleNamespace(name="cpu"),
        run_dir=RunDir(place),
        nodes=Nodes((0, 1)),
    )


def pid_of(context: Any, name: str) -> int:
    return int(json.loads((context.run_dir.logs / f"{name}.server.json").read_text())["pid"])


def until_both(fleet: ServerFleet) -> None:
    """Wait until both servers can be asked."""
    deadline = time.monotonic() + LIMIT_S
    while len(fleet.ready()) < 2:
        assert time.monotonic() < deadline, "the lost server did not come back"
        time.sleep(0.5)


def scored(folder: Path, place: Path) -> list[Any]:
    """Scores of all requests: by both servers, while that of rank 1 is killed, and by both again."""
    context = context_of(folder, place, [{}, {"node": 1}])
    with ExitStack() as cleanup:
        fleet = start_teacher_servers(context, cleanup, 64)

        def work() -> list[Any]:
            assert fleet is not None
            fleet.wait_ready()
            found: list[Any] = [fleet.score(requests())]
            before = pid_of(context, "teacher-1")
            os.killpg(before, signal.SIGKILL)
            found.append(fleet.score(requests()))
            until_both(fleet)
            assert pid_of(context, "teacher-1") != before
            alone = [ServerFleet([server]).score(requests()) for server in fleet.each]
            return [*found, *alone]

        # rank 1 waits here in a collective call, so only its own watch can start its server again
        return list(on_rank_zero(work, context.layout.groups.control))


def test_scores_come_from_the_servers_of_both_nodes_also_after_one_was_killed(
    other_folder: Path, tmp_path: Path, log_softmax: Oracle
) -> None:
    found, _ = run_on_ranks(scored, 2, other_folder, tmp_path, timeout_s=3 * LIMIT_S)
    assert len(found) == 4
    for answers in found:
        for request, answer in zip(requests(), answers, strict=True):
            assert isinstance(answer, TokenScores), answer
            logp = log_softmax(other_folder, request.token_ids.tolist())
            places = np.arange(request.first, len(request.token_ids))
            expected = logp[places - 1, request.token_ids[places]]
            np.testing.assert_allclose(answer.logp_N, expected, atol=TOLERANCE)


def refused(folder: Path, place: Path) -> str:
    with ExitStack() as cleanup, pytest.raises(ConfigError) as error:
        start_teacher_servers(context_of(folder, place, [{}, {"node": 2}]), cleanup, 64)
    return str(error.value)


def test_a_node_that_the_launch_lacks_is_named(other_folder: Path, tmp_path: Path) -> None:
    for text in run_on_ranks(refused, 2, other_folder, tmp_path):
        assert (
            "teacher.servers.1.node = 2: the last node of this launch is 1; lower it, or launch on more (NNODES)"
            in text
        )
