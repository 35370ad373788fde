"""The moments at which the suite acts on servers are still passed by a publication and a sampling of the product."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.e2e.jobs import REPOSITORY
from tests.faults.launch import STARTUP
from tests.faults.phases import PHASES

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
