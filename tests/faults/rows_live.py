"""Faults of a run with its own rollout server: killed and suspended processes, other users, other commands.

All are played in one run of two ranks, one after the other. At its end, a replay of its rollouts has to give the same
metrics and weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from tests.faults.launch import Launch, TooLateError, send, tropd
from tests.faults.rows_kills import kill_launcher
from tests.faults.rows_signals import INTERRUPTED, STOPPED, to_terminal
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen
from tests.http_server import serving

Play = Callable[[Scene], Seen]
CHAIN = "own-server"
STEPS_PER_FAULT = 4
"""Steps planned per fault. A fault needs fewer, but the run continues between the faults."""
HANG_S = 10.0
"""rollout.server.hang_timeout_s of this run; 60 by default."""
CHECKER = """
import json, sys, urllib.error, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for path, body in json.loads(sys.argv[2]):
    request = urllib.request.Request(sys.argv[1] + path, json.dumps(body).encode() if body is not None else None,
                                     {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=20) as answer:
            print(path, answer.status, answer.read(100), flush=True)
    except urllib.error.HTTPError as error:
        print(path, error.code, flush=True)
"""
ATTACKS = [
    ("/weights_checker", {"action": "reset_tensors"}),
    ("/update_weight_version", {"new_version": "mine", "abort_all_requests": True}),
    ("/update_weights_from_disk", {"model_path": "/nope"}),
    ("/pause_generation", {"mode": "abort"}),
    ("/flush_cache", {}),
    ("/generate", {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}),
    ("/server_info", None),
    ("/abort_request", {"abort_all": True}),
]
"""Requests that must be refused without the key."""
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def running(scene: Scene) -> Launch:
    """The launch of the run, up to its first sampled step."""
    if "ready" not in scene.shared:
        scene.shared |= {"ready": True, "compare": True}
        scene.config = scene.stage.live_config
        scene.overrides = [
            f"run.steps={STEPS_PER_FAULT * scene.shared['faults']}",
            "rollout.max_new_tokens=64",
            f"rollout.server.hang_timeout_s={HANG_S:g}",
            "rollout.server.max_restarts=8",
            "run.rank_timeout_s=40",
        ]
        scene.environment = proxies(scene)
    return scene.job()


def proxies(scene: Scene) -> dict[str, str]:
    """Environment variables of a proxy that counts its requests and refuses all of them."""
    from aiohttp import web

    asked: list[str] = []
    scene.shared["proxied"] = asked

    async def refuse(request: web.Request) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        return web.Response(status=503, text="the proxy serves nobody")

    def app() -> web.Application:
        made = web.Application()
        made.router.add_route("*", "/{path:.*}", refuse)
        return made

    url = scene.cleanup.enter_context(serving(app))
    return dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), url)


def on(scene: Scene, seen: Seen) -> Seen:
    """The observations of a fault after which the run continues."""
    seen.left_running = []  # it must still run
    return seen


def step_after(scene: Scene, launch: Launch, done: int) -> Seen:
    """Wait until a step finishes that was unfinished when the fault happened."""
    return on(scene, scene.goes_on(launch, lambda: scene.steps() > done))


def proxy(scene: Scene) -> Seen:
    """Proxies in the environment of the launch. They must get no request for a loopback address."""
    launch = running(scene)
    scene.struck = 0.0
    seen = on(scene, scene.goes_on(launch, lambda: scene.steps() >= 1))
    if scene.shared["proxied"]:
        seen.lost.append(f"the proxy was asked: {scene.shared['proxied'][:3]}")
    return seen


def other_user(scene: Scene) -> Seen:
    """Another user of the machine sends every request that changes or reveals something."""
    launch = running(scene)
    launch.halt("before generate")
    server, done = launch.server(scene.run_dir), scene.steps()
    port = json.loads((scene.run_dir / "logs" / "rollout.server.json").read_text())["port"]
    scene.strike(launch)
    answers = as_another_user(["-I", "-c", CHECKER, f"http://127.0.0.1:{port}", json.dumps(ATTACKS)])
    launch.go()
    seen = step_after(scene, launch, done)
    lines = answers.stdout.splitlines()
    open_paths = [line for line in lines if line.split()[1] not in ("401", "403")]
    if len(lines) != len(ATTACKS) or open_paths:
        seen.lost.append(f"answered without the key: {open_paths or answers.stderr[-200:]}")
    seen.lost += key_in_sight(scene, server)
    seen.output += "\n".join(["", *lines])
    return seen


def as_another_user(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python as `nobody`, or as this user, who has no key either, if that is not possible."""
    for interpreter in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            if (
                os.geteuid() == 0
                and subprocess.run([interpreter, "-I", "-c", ""], user="nobody", cwd="/").returncode == 0
            ):
                return subprocess.run(
                    [interpreter, *arguments], user="nobody", cwd="/", capture_output=True, text=True, timeout=120
                )
    return subprocess.run([sys.executable, *arguments], cwd="/", capture_output=True, text=True, timeout=120)


def key_in_sight(scene: Scene, server: psutil.Process) -> list[str]:
    """Places where others could read the server's key: command lines, files of the run directory."""
    keys = set()
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            keys |= {process.environ().get("TROPD_SERVER_KEY", "")} - {""}
    if not keys:
        return ["the key is not in the server's environment, so it could not be looked for elsewhere"]
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(key in " ".join(process.cmdline()) for key in keys):
                found.append(f"the key is in the command line of {process.name()}")
    for path in scene.run_dir.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20 and any(key.encode() in path.read_bytes() for key in keys):
            found.append(f"the key is in {path.name}")
    return found


def listeners(scene: Scene) -> Seen:
    """The addresses on which the processes of a job on one machine listen."""
    launch = running(scene)
    launch.halt("before generate")
    done = scene.steps()
    scene.strike(launch)
    launch.look()
    outside = set()
    for process in launch.members():
        with contextlib.suppress(psutil.Error):
            for socket in process.net_connections(kind="inet"):
                if socket.status == psutil.CONN_LISTEN and socket.laddr.ip not in LOOPBACK:
                    outside.add(f"{' '.join(process.cmdline())[-60:]} listens on {socket.laddr.ip}")
    launch.go()
    seen = step_after(scene, launch, done)
    seen.lost += sorted(outside)
    return seen


def second_command(scene: Scene) -> Seen:
    """`tropd eval` on the run directory while the job runs. Each has its own server."""
    launch = running(scene)
    launch.halt("before generate")
    server, done = launch.server(scene.run_dir), scene.steps()
    scene.strike(launch)
    words = tropd("eval", scene.config, "--prompts", scene.stage.prompts, "--model", scene.stage.model("student"),
                  "--samples", "0", "--limit", "2", f"run.dir={scene.run_dir}")  # fmt: skip
    other = scene.start(words)
    other.ended()
    launch.go()
    code, text = other.process.returncode, other.text()
    seen = step_after(scene, launch, done)
    if not server.is_running():
        seen.lost.append("the server of the job was stopped by the other command")
    if code not in (0, 2):
        seen.lost.append(f"the other command ended with {code}: {text[-300:]}")
    seen.output += f"\n{text}"
    return seen


def server_gets(number: signal.Signals, edge: str) -> Play:
    """A signal to the server while rank 0 asks it for something."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        launch.halt(edge)
        server, done = launch.server(scene.run_dir), scene.steps()
        family = [server, *server.children(recursive=True)]
        scene.strike(launch)
        for process in family if number == signal.SIGSTOP else [server]:
            send(process, number)
        launch.go()
        seen = step_after(scene, launch, done)
        if not seen.hung and launch.server(scene.run_dir).pid == server.pid:
            seen.weak.append("the server was not restarted")
        return seen

    return play


def in_flight(number: signal.Signals) -> Play:
    """A signal to the server while it samples."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        launch.halt("before generate")
        server, done = launch.server(scene.run_dir), scene.steps()
        family = [server, *server.children(recursive=True)]
        scene.strike(launch)
        launch.go()
        time.sleep(0.3)
        for process in family if number == signal.SIGSTOP else [server]:
            send(process, number)
        return step_after(scene, launch, done)

    return play


def interrupt(scene: Scene) -> Seen:
    """Ctrl-C while samples are in flight."""
    launch = running(scene)
    launch.halt("before generate")
    launch.look()
    scene.strike(launch)
    launch.go()
    time.sleep(0.2)
    to_terminal(launch, signal.SIGINT)
    return scene.end(launch)


def terminate(edge: str) -> Play:
    """SIGTERM to the launcher at `edge`."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        launch.halt(edge)
        launch.look()
        scene.strike(launch)
        launch.process.terminate()
        launch.go()
        return scene.end(launch)

    return play


def kill_rank(edge: str, *, managers: bool = False) -> Play:
    """SIGKILL rank 0, and with `managers` also the processes that would clean up its shared memory."""

    def play(scene: Scene) -> Seen:
        launch = running(scene)
        launch.halt(edge)
        launch.look()
        rank = launch.rank(0)
        victims = [rank]
        if managers:
            victims = [child for child in launch.members() if "shm_manager" in _name(child)] + victims
        scene.strike(launch)
        for victim in victims:
            send(victim, signal.SIGSTOP)
        for victim in victims:
            send(victim, signal.SIGKILL)
        return scene.end(launch)

    return play


def kill_server_at_start(scene: Scene) -> Seen:
    """SIGKILL the server while it starts."""
    launch = running(scene)
    launch.wait((scene.run_dir / "logs" / "rollout.server.json").exists, "the server's record")
    launch.wait(lambda: _lives(scene, launch), "the server's process")
    scene.strike(launch)
    send(launch.server(scene.run_dir), signal.SIGKILL)
    return scene.end(launch)


def _lives(scene: Scene, launch: Launch) -> bool:
    with contextlib.suppress(psutil.Error, OSError, ValueError, TooLateError):
        return launch.server(scene.run_dir).is_running()
    return False


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.name()} {' '.join(process.cmdline())}"
    return ""


def _row(
    name: str, group: str, done: str, wanted: str, play: Play, code: tuple[int | None, ...], line: str,
    *, limit_s: float = 240.0, representative: bool = False,
) -> Fault:  # fmt: skip
    return Fault(
        id=f"live-{name}",
        group=group,
        done=done,
        wanted=wanted,
        play=play,
        code=code,  # type: ignore[arg-type]
        line=line,
        limit_s=limit_s,
        chain=CHAIN,
        representative=representative,
    )


GOES_ON = (None,)
RESTARTED = "a line with the cause, a restart, the step is repeated, the run goes on"
RESUMES = "everything is gone, the same command goes on"
FAULTS = [
    _row("proxies", "security", "http_proxy and its kin name a proxy that serves nobody",
         "loopback is asked directly, by job and server; the run trains", proxy, GOES_ON, ""),
    _row("other-user", "security", "another user asks the started server to reset weights, pause, sample, tell",
         "401 for everything; the key is in no command line and no file; the run goes on", other_user, GOES_ON,
         "weights_checker 401",
         representative=True),
    _row("listeners", "security", "listening sockets of all processes of a job on one machine",
         "loopback only", listeners, GOES_ON, "", representative=True),
    _row("second-command", "security", "`tropd eval` on the run.dir of the running job",
         "the job's server lives on; the other command says what it did", second_command, GOES_ON, ""),
    _row("server-killed", "kill", "SIGKILL the server while it samples", RESTARTED, in_flight(signal.SIGKILL), GOES_ON,
         "restart"),
    _row("server-killed-update", "kill", "SIGKILL the server before an update of its weights", RESTARTED,
         server_gets(signal.SIGKILL, "before update weights"), GOES_ON, "restart"),
    _row("server-stopped", "stop", "SIGSTOP the server before it samples", RESTARTED,
         server_gets(signal.SIGSTOP, "before generate"), GOES_ON, "restart", representative=True),
    _row("server-stopped-in-flight", "stop", "SIGSTOP the server while samples are in flight", RESTARTED,
         in_flight(signal.SIGSTOP), GOES_ON, "restart|stopped"),
    _row("server-stopped-update", "stop", "SIGSTOP the server before an update of its weights", RESTARTED,
         server_gets(signal.SIGSTOP, "before update weights"), GOES_ON, "restart"),
    _row("interrupt", "signal", "Ctrl-C while samples are in flight", f"one line, exit code 130; {RESUMES}", interrupt,
         (130,), INTERRUPTED, limit_s=60.0, representative=True),
    _row("server-killed-start", "kill", "SIGKILL the server while it starts", f"exit code 2 with one line; {RESUMES}",
         kill_server_at_start, (2,), "rollout.server.*signal 9"),
    _row("terminate", "signal", "SIGTERM to the launcher before samples are asked for",
         f"one line, exit code 0; {RESUMES}", terminate("before generate"), (0,), STOPPED, limit_s=60.0),
    _row("rank-killed-stored", "kill", "SIGKILL rank 0 after the rollouts are stored", RESUMES,
         kill_rank("after store rollouts"), (1, 2, 137), "rank|signal"),
    _row("rank-killed-update", "kill", "SIGKILL rank 0 in a publication of weights", RESUMES,
         kill_rank("before update weights"), (1, 2, 137), "rank|signal"),
    _row("shared-memory", "kill", "SIGKILL rank 0 and its shared-memory manager in a publication (a cgroup's end)",
         f"{RESUMES}; what is left in /dev/shm goes with the next launch",
         kill_rank("before update weights", managers=True), (1, 2, 137), "rank|signal"),
    _row("launcher-killed", "kill", "SIGKILL the launcher while samples are to come", RESUMES,
         kill_launcher("before generate", running), (-9,), "", limit_s=60.0),
]  # fmt: skip
