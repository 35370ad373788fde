"""The moments at which the suite acts on servers are still passed by a publication and a sampling of the product."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.e2e.jobs import REPOSITORY
from tests.faults.launch import STARTUP
from tests.faults.phases import PHASES

LIMIT_S = 60.0
"""Longest wait for an expected event. It only ends a hang."""
OF_SERVERS = ("publish", "update weights", "label weights", "generate", "answer")
PROGRAM = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("startup_of_the_suite", sys.argv[1])
startup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(startup)
passed = []
class Noted:
    at = staticmethod(passed.append)
sys.meta_path.insert(0, startup.Wrapping(json.loads(sys.argv[2]), Noted()))
from tests.glue.fake_server import fake_server
from tests.glue.test_wire import publish, request, sample
with fake_server() as server:
    publish(server, 1.0, "v1")
    sample(server, request(), 1, "v1")
print(json.dumps(passed))
"""


def test_a_publication_and_a_sampling_pass_every_moment_that_faults_of_servers_wait_for() -> None:
    """If the product samples through another function, faults would wait for a moment that never comes."""
    phases = {name: PHASES[name] for name in OF_SERVERS}
    command = [sys.executable, "-c", PROGRAM, str(STARTUP / "sitecustomize.py"), json.dumps(phases)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    passed = json.loads(found.stdout.splitlines()[-1])
    assert set(passed) == {f"{edge} {name}" for name in OF_SERVERS for edge in ("before", "after")}
    assert passed.index("after publish") < passed.index("before generate") < passed.index("before answer")


def points_in(folder: Path) -> Any:
    """The points of this process, as the suite's start-up file makes them in a job."""
    spec = importlib.util.spec_from_file_location("startup_of_the_suite", STARTUP / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    startup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(startup)
    return startup.Points(str(folder))


def want(folder: Path, edge: str, nth: int = 1) -> None:
    (folder / "wanted.x").write_text(json.dumps({"edge": edge, "then": "wait", "nth": nth}))


def test_of_several_threads_at_one_moment_one_waits_and_the_next_moment_needs_its_own_go(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Requests to several servers are sent at the same time, so several threads pass the same edge."""
    monkeypatch.delenv("RANK", raising=False)
    points, passed = points_in(tmp_path), threading.Semaphore(0)

    def pass_it() -> None:
        points.at("before update weights")
        passed.release()

    for nth in (1, 2):
        want(tmp_path, "before update weights", nth)
        threads = [threading.Thread(target=pass_it, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert all(passed.acquire(timeout=LIMIT_S) for _ in range(2))
        assert (tmp_path / "reached.x").exists() and not (tmp_path / "wanted.x").exists()
        assert not passed.acquire(timeout=0.2), "one of them waits"
        (tmp_path / "go.x").touch()
        assert passed.acquire(timeout=LIMIT_S)
        assert not (tmp_path / "go.x").exists()
        (tmp_path / "reached.x").unlink()
