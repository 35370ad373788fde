"""A stand-in for the package `sglang`, and the real `ServerProcess` that starts it, for tests of processes and logs."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.serving.process import ServerProcess, ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer

LIMIT_S = 30.0
"""Longest wait for an expected event, in seconds. It only ends a hang."""

STAND_IN = """
import json, os, signal, socket, subprocess, sys, time

does = json.loads(os.environ["STAND_IN"])
if does.get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "60"]).pid if does.get("child") else None
keys = [each.partition("=")[2] for each in sys.argv if each.startswith("--api-key=")]
argv = [each for each in sys.argv[1:] if not each.startswith("--api-key=")]
told = {"argv": argv, "keys": keys, "environment": dict(os.environ), "child": child}
with open(does["notes"] + ".part", "w") as stream:
    json.dump(told, stream)
os.rename(does["notes"] + ".part", does["notes"])
print(does.get("says", "started"), flush=True)
if "exit" in does:
    sys.exit(does["exit"])
if does.get("silent"):
    time.sleep(60)
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
listener.settimeout(60)
for number in range(10**6):
    status = 503 if number < does.get("unready", 0) else 200
    connection, _ = listener.accept()
    path = connection.recv(65536).split(b" ")[1].decode()
    print("answers", status, flush=True)
    body = json.dumps(does["pages"][path]).encode() if path in does.get("pages", {}) else b""
    head = b"HTTP/1.1 %d X\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n" % (status, len(body))
    connection.sendall(head + b"Connection: close\\r\\n\\r\\n" + body)
    connection.close()
"""
"""`sglang.launch_server`: answers every request with 200, the first `unready` ones with 503, and with its page in
`pages`.

It ends by itself after a minute, so that no process stays behind if the product fails to stop it.
"""


class ServerSite:
    """A model folder, a run folder and the stand-in, and the processes that were started there."""

    def __init__(self, folder: Path, *, make: bool = True) -> None:
        self.model, self.run_dir, self.packages = folder / "model", folder / "run", folder / "packages"
        self.notes = folder / "notes.json"
        self.made: list[ServerProcess | SupervisedServer] = []
        if not make:
            return
        for package in ("sglang", "sgl_kernel", "torchvision"):  # the last two keep placeholders away
            (self.packages / package).mkdir(parents=True)
            (self.packages / package / "__init__.py").touch()
        (self.packages / "sglang" / "launch_server.py").write_text(STAND_IN)
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")

    def spec(
        self,
        does: dict[str, Any] | None = None,
        *,
        config: dict[str, Any] | None = None,
        extra_env: dict[str, str] | None = None,
        **fields: Any,
    ) -> ServerSpec:
        """The specification of a server that `does` this. `config` and `fields` are changes."""
        paths = [str(self.packages), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "STAND_IN": json.dumps({"notes": str(self.notes), **(does or {})}),
        }
        spec = ServerSpec(
            key="rollout.server",
            model_key="student.path",
            model_path=self.model,
            config=ServerConfig(**{"start_timeout_s": LIMIT_S, "max_retries": 0} | (config or {})),
            device="cuda",
            run_dir=self.run_dir,
            name="rollout",
            extra_env=environment | (extra_env or {}),
        )
        return dataclasses.replace(spec, **fields)

    def process(self, does: dict[str, Any] | None = None, **given: Any) -> ServerProcess:
        process = ServerProcess(self.spec(does, **given))
        self.made.append(process)
        return process

    def started(self, does: dict[str, Any] | None = None, **given: Any) -> ServerProcess:
        """A process whose stand-in has reported its arguments."""
        process = self.process(does, **given)
        process.start()
        wait_for(lambda: self.notes.is_file() or not process.alive())
        assert self.notes.is_file(), process.describe_end()
        return process

    def told(self) -> dict[str, Any]:
        wait_for(self.notes.is_file)
        return json.loads(self.notes.read_text())

    @property
    def log(self) -> Path:
        return self.run_dir / "rollout.log"

    @property
    def record(self) -> Path:
        return self.run_dir / "rollout.server.json"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
