"""A router's process: one that ends, never listens or is something else gives one line, and nothing of it stays.

The environment of the router is real and bare. The package `smg` in it is a stand-in.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tropd_mcore.config.schema import RouterConfig, ServerConfig
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.interpreter import ask_router
from tropd_mcore.serving.router import Router, RouterSpec

KEY = "key-of-the-fleet"


def line_of(act: Callable[[], object]) -> str:
    with pytest.raises(ServerError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


STAND_IN = """
import os, socket, sys, time
def parse_router_args(arguments):
    class Arguments: pass
    found = Arguments()
    found.port = int(arguments[arguments.index("--port") + 1])
    return found
def launch_router(arguments):
    mode = os.environ["STAND_IN"]
    print("key", len(arguments.api_key), "TROPD_ROUTER_KEY" in os.environ, flush=True)
    if mode == "ends":
        raise SystemExit("Error starting router: the port is cursed")
    if mode == "silent":
        time.sleep(600)
    listener = socket.create_server(("127.0.0.1", arguments.port))
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Type: text/html\\r\\nContent-Length: 6\\r\\n\\r\\n<html>")
        connection.close()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment whose package smg is a stand-in."""
    venv.create(tmp_path / "second", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "second").glob("lib/python*/site-packages")
    (site / "smg").mkdir()
    (site / "smg" / "__init__.py").write_text("")
    (site / "smg" / "launch_router.py").write_text(STAND_IN)
    (site / "smg-1.13.0.dist-info").mkdir()
    (site / "smg-1.13.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: smg\nVersion: 1.13.0\n")
    return tmp_path / "second" / "bin" / "python"


def started(python: Path, folder: Path, **values: object) -> Router:
    config = RouterConfig(python=python, **values)  # type: ignore[arg-type]
    return Router(RouterSpec(config, ServerConfig(max_retries=1), folder / "logs", KEY))


def test_a_router_that_ends_at_once_is_one_line_with_its_last_words(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "ends")
    router = started(python, tmp_path)
    assert ask_router(python, key="rollout.router") == "1.13.0"
    line = line_of(router.__enter__)
    assert "the router ended with exit code 1; last line: 'Error starting router: the port is cursed'" in line
    assert str(router.spec.log_path) in line
    assert f"key {len(KEY)} False" in router.spec.log_path.read_text(), "children do not inherit the key"
    assert not router.spec.record_path.exists()


def test_a_router_that_never_listens_is_stopped_after_the_limit(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "silent")
    router = started(python, tmp_path, start_timeout_s=0.5)
    router.start()
    pid = router.pid
    assert pid is not None and psutil.pid_exists(pid)
    assert "rollout.router: not ready after rollout.router.start_timeout_s=0.5 s" in line_of(router.wait_ready)
    assert not psutil.pid_exists(pid) and router.pid is None


def test_a_started_program_that_is_no_router_is_one_line_and_is_stopped(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "html")
    router = started(python, tmp_path)
    assert "answered text/html" in line_of(router.__enter__)
    assert router.pid is None


def test_an_interpreter_without_the_router_is_one_line_with_the_way_to_install_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    bare = tmp_path / "bare" / "bin" / "python"
    assert line_of(started(bare, tmp_path).start) == (
        f"rollout.router.python={bare}: has no package smg; run `{bare} -m pip install smg==1.13.0`, "
        "or name another one"
    )
    assert "not found; expected a Python interpreter with the package smg" in line_of(
        started(tmp_path / "nothing", tmp_path).start
    )


def test_our_own_interpreter_without_the_router_is_one_line_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tropd_mcore.serving import interpreter

    def missing(name: str) -> str:
        raise interpreter.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(interpreter.importlib.metadata, "version", missing)
    line = line_of(lambda: ask_router(None, key="rollout.router"))
    assert line.startswith("rollout.router: starting a router needs the package smg, which is not installed; run `pip")
    assert "set rollout.router.python to an interpreter that has it, or remove rollout.router" in line


def test_a_router_is_never_started_without_a_key() -> None:
    from tropd_mcore.serving import router_launch

    done = subprocess.run([sys.executable, "-P", router_launch.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("TROPD_ROUTER_KEY is unset")
