"""Another user of the machine gets nothing from a started server except its health status."""

from __future__ import annotations

import json
import multiprocessing
import os
import pwd
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from tests.http_server import serving
from tests.sglang.conftest import cpu_server
from tests.sglang.streams import plan, stream
from tropd_mcore.rollout.publisher import WeightPublisher
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.weight_payload import SHARED_MEMORY

POSTS: dict[str, Any] = {
    "/weights_checker": {"action": "reset_tensors"},
    "/update_weights_from_disk": {"model_path": "/nowhere"},
    "/update_weight_version": {"new_version": "mine"},
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/begin_weight_update": {},
    "/pause_generation": {"mode": "abort"},
    "/abort_request": {"abort_all": True},
    "/flush_cache": {},
    "/v1/completions": {"model": "x", "prompt": "a"},
}
GETS = ("/server_info", "/get_server_info", "/model_info", "/v1/models", "/openapi.json")


@pytest.fixture(scope="module")
def guarded(
    qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SupervisedServer, list[str]]]:
    """A server that was started where the environment names a proxy which answers 502, and what the proxy was asked."""
    asked: list[str] = []

    async def refuse(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.rel_url}")
        return web.Response(status=502)

    def proxy() -> web.Application:
        made = web.Application()
        made.router.add_route("*", "/{path:.*}", refuse)
        return made

    with serving(proxy) as url, pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
            patch.setenv(name, url)
        patch.setenv("no_proxy", "intern.example")
        with SupervisedServer(cpu_server(qwen3_folder, tmp_path_factory.mktemp("guarded"))) as server:
            WeightPublisher(server.client, plan(qwen3_folder)).publish(stream(qwen3_folder), "v1")
            yield server, asked


def family(server: SupervisedServer) -> list[psutil.Process]:
    leader = psutil.Process(json.loads(server.spec.record_path.read_text())["pid"])
    return [leader, *leader.children(recursive=True)]


def sockets_of(process: psutil.Process) -> list[Path]:
    """Unix sockets that have a name in the file system."""
    names = (str(found.laddr) for found in process.net_connections(kind="unix"))
    return [Path(name) for name in names if name.startswith("/")]


def key_of(server: SupervisedServer) -> str:
    return family(server)[0].environ()["TROPD_SERVER_KEY"]


def test_proxies_from_the_environment_get_no_request(guarded: tuple[SupervisedServer, list[str]]) -> None:
    server, asked = guarded
    assert server.client.info().weight_version == "v1" and asked == []


def test_every_listener_of_a_server_is_on_the_loopback_interface_or_a_private_socket(
    guarded: tuple[SupervisedServer, list[str]],
) -> None:
    server, _ = guarded
    elsewhere, sockets, http = [], [], []
    for process in family(server):
        for found in process.net_connections(kind="inet"):
            if found.status == psutil.CONN_LISTEN or found.type == socket.SOCK_DGRAM:
                http.append(found.laddr.port)
                elsewhere += [found] if found.laddr.ip not in ("127.0.0.1", "::1") else []
        sockets += sockets_of(process)
    assert elsewhere == []
    assert int(server.client.url.rpartition(":")[2]) in http, "what is looked for can be seen"
    assert sockets and [path for path in sockets if path.exists() and path.stat().st_mode & 0o077] == []
    assert [path for path in sockets if path.parent.stat().st_mode & 0o077] == []


def test_the_key_is_in_no_file_and_on_no_command_line(guarded: tuple[SupervisedServer, list[str]]) -> None:
    server, _ = guarded
    key = key_of(server)
    assert len(key) >= 43
    assert [
        path for path in server.spec.run_dir.rglob("*") if path.is_file() and key.encode() in path.read_bytes()
    ] == []
    assert "'api_key': '<key>'" in server.spec.log_path.read_text(), "SGLang logs its arguments"
    leader, *children = family(server)
    assert [one for one in (leader, *children) if key in " ".join(one.cmdline())] == []
    assert [one for one in children if key in str(one.environ())] == []


def _as_nobody(check: Callable[..., None], *arguments: object) -> None:
    """Run `check` in a process of the user nobody. It raises the errors of the check."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    nobody = pwd.getpwnam("nobody")
    process = multiprocessing.get_context("fork").Process(target=_become, args=(nobody, check, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, "see the traceback above"


def _become(nobody: pwd.struct_passwd, check: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    check(*arguments)


def _status(url: str, body: object = None, key: str = "") -> int:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    if key:
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(asked, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def _every_door(url: str) -> None:
    for key in ("", "x" * 43):
        found = {path: _status(url + path, body, key) for path, body in POSTS.items()}
        found |= {path: _status(url + path, None, key) for path in GETS}
        assert set(found.values()) <= {401, 403}, found
    assert _status(f"{url}/health") == 200


def _every_file(paths: list[str]) -> None:
    for path in paths:
        opened = True
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(path)
            else:
                Path(path).read_bytes()
        except PermissionError:
            opened = False
        assert not opened, path


def test_another_user_is_refused_at_every_endpoint(guarded: tuple[SupervisedServer, list[str]]) -> None:
    server, _ = guarded
    assert _status(f"{server.client.url}/model_info", None, key_of(server)) == 200, "the key opens them"
    before = server.client.weights_checksum()
    _as_nobody(_every_door, server.client.url)
    assert server.client.weights_checksum() == before and server.client.info().weight_version == "v1"


def test_another_user_reads_no_socket_no_buffer_no_log_and_no_environment(
    guarded: tuple[SupervisedServer, list[str]],
) -> None:
    server, _ = guarded
    members = family(server)
    sockets = {path for one in members for path in sockets_of(one)}
    mapped = {each.path for one in (*members, psutil.Process()) for each in one.memory_maps()}
    buffers = {path for path in mapped if path.startswith(f"{SHARED_MEMORY}/") and Path(path).exists()}
    environments = {f"/proc/{one.pid}/environ" for one in members}
    files = {str(server.spec.log_path), str(server.spec.record_path)}
    assert sockets and buffers, "what is looked for can be seen"
    _as_nobody(_every_file, sorted({str(path) for path in sockets if path.exists()} | buffers | environments | files))
