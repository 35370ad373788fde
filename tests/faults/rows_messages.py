"""Faults: command lines and environments that are wrong. Most need one process and a second."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.e2e.jobs import REPOSITORY
from tests.faults.launch import Launch, tropd
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

Words = Callable[[Scene], list[str]]
GPU_RECIPE = REPOSITORY / "configs" / "qwen3-1.7b-from-qwen3-8b-1n8g-tp2.yaml"
NODES_RECIPE = REPOSITORY / "configs" / "qwen3-8b-from-qwen3-32b-4n8g-tp4pp2.yaml"
FIRST_LINE_S = 2.0
"""First line of a command on an idle machine."""


def said(words: Words, *, extra: Mapping[str, str] | None = None, starts: bool = False) -> Callable[[Scene], Seen]:
    """Run a command to its end. Unless `starts`, it may start no rank and no server."""

    def play(scene: Scene) -> Seen:
        seen = scene.play_to_the_end(words(scene), extra=extra)
        launch = scene.last
        assert launch is not None
        ranks = [process for process in launch.pids() if process != launch.process.pid]
        if not starts and len(ranks) > 1:
            seen.weak.append(f"{len(ranks)} processes were started before it was said")
        if seen.seconds > 10 * FIRST_LINE_S and not starts:
            seen.weak.append(f"said after {seen.seconds:.0f} s")
        return seen

    return play


def _train(*overrides: str, live: bool = False) -> Words:
    def words(scene: Scene) -> list[str]:
        if live:
            scene.config = scene.stage.live_config
        return scene.command(*overrides)

    return words


def two_objectives(scene: Scene) -> Seen:
    """objective.kind on the command line with a file that has keys of another kind."""
    seen = scene.play_to_the_end(tropd("config", scene.config, "objective.kind=gkd", f"run.dir={scene.run_dir}"))
    if seen.code == 0 and "gkd" not in seen.output:
        seen.lost.append("the objective is another one")
    return seen


def without_package(package: str, *overrides: str) -> Callable[[Scene], Seen]:
    """A package that the configuration needs is not installed."""
    return said(_train(*overrides), extra={"TROPD_FAULTS_HIDE": package})


def taken_port(scene: Scene) -> Seen:
    """rollout.server.port is used by another process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        scene.config = scene.stage.live_config
        return scene.play_to_the_end(scene.command(f"rollout.server.port={taken.getsockname()[1]}"))


def nodes(
    port: str, *, address: str = "127.0.0.1", ranks: tuple[int, ...] = (0, 1), interrupt_s: float = 0.0
) -> Callable[[Scene], Seen]:
    """One agent per node, all on this machine. The output of node 0 is judged."""

    def play(scene: Scene) -> Seen:
        chosen = _free_port() if port == "free" else port
        launches: list[Launch] = []
        for rank in ranks:
            extra = {"NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "1"}
            extra |= {"MASTER_PORT": chosen} if chosen else {}
            extra |= {"MASTER_ADDR": address} if address else {}
            launches.append(scene.start(scene.command(), extra=extra))
        scene.struck = 0.0
        if interrupt_s:
            time.sleep(interrupt_s)
            launches[0].process.send_signal(signal.SIGINT)
        seens = [scene.end(launch) for launch in launches]
        for other in seens[1:]:
            if other.code != seens[0].code or other.hung:
                seens[0].lost.append(f"another node ended with {other.code}")
        if seens[0].code == 0:
            scene.current = None
            seens[0].lost += scene.finish()
        return seens[0]

    return play


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _eval_without_prompts(scene: Scene) -> list[str]:
    return tropd("eval", scene.stage.live_config, "--prompts", "/nope.jsonl", "--model",
                 scene.stage.model("student"), f"run.dir={scene.run_dir}")  # fmt: skip


def _broken_file(scene: Scene) -> list[str]:
    path = scene.folder / "broken.yaml"
    text = scene.config.read_text().replace("learning_rate: 1.0e-6", "lr: fast").replace("steps: 8", "steps: -1")
    path.write_text(f"{text}monitro: {{}}\n")
    return tropd("config", path)


def quickstart_without_venv(scene: Scene) -> list[str]:
    """`VENV=/abs/path bash examples/quickstart.sh` with an unknown size."""
    return ["bash", str(REPOSITORY / "examples" / "quickstart.sh")]


def _row(
    name: str, done: str, wanted: str, play: Callable[[Scene], Seen], line: str, *, code: int = 2,
    representative: bool = False,
) -> Fault:  # fmt: skip
    return Fault(
        id=f"message-{name}",
        group="message",
        done=done,
        wanted=wanted,
        play=play,
        code=(code,),
        line=line,
        limit_s=90.0,
        representative=representative,
    )


ONE_LINE = "exit code 2 and one line, before any rank starts"
PYTHON = Path(sys.executable).parent.parent
FAULTS = [
    _row("help", "tropd train --help", "the usage, exit code 0", said(lambda scene: tropd("train", "--help")),
         "usage: tropd train", code=0),
    _row("script-help", "bash examples/tropd_pretrain.sh --help", "the usage, exit code 0",
         said(lambda scene: ["bash", "examples/tropd_pretrain.sh", "--help"]), "usage:", code=0),
    _row("script-nothing", "bash examples/tropd_pretrain.sh without arguments", "the usage, exit code 2",
         said(lambda scene: ["bash", "examples/tropd_pretrain.sh"]), "usage:"),
    _row("no-config", "tropd train /nope.yaml", ONE_LINE, said(lambda scene: tropd("train", "/nope.yaml")),
         "/nope.yaml"),
    _row("unknown-key", "optimizer.lr=1e-5", f"{ONE_LINE} that suggests optimizer.learning_rate",
         said(_train("optimizer.lr=1e-5")), "optimizer.learning_rate", representative=True),
    _row("alias-tp", "parallel.tp=2", f"{ONE_LINE} that suggests parallel.tensor", said(_train("parallel.tp=2")),
         "parallel.tensor"),
    _row("alias-batch", "rollout.batch_size=8", f"{ONE_LINE} that suggests a key of the batch",
         said(_train("rollout.batch_size=8")), "prompts_per_step"),
    _row("alias-max-tokens", "rollout.max_tokens=8", f"{ONE_LINE} that suggests rollout.max_new_tokens",
         said(_train("rollout.max_tokens=8")), "rollout.max_new_tokens"),
    _row("sections", "errors in three sections of one file", "exit code 2 and a line for each",
         said(_broken_file), "monitro|monitor"),
    _row("objective", "objective.kind=gkd over a file with keys of tropd", "the old keys go, with a line that says so",
         two_objectives, "objective", code=0),
    _row("layout", "parallel.tensor does not divide the heads", ONE_LINE,
         said(_train("parallel.tensor=3")), "(?i)tensor"),
    _row("math-verify", "math_verify is not installed", f"{ONE_LINE} with the package",
         without_package("math_verify", "verifier.kind=math_verify"), "math_verify"),
    _row("wandb", "wandb is not installed", f"{ONE_LINE} with the package",
         without_package("wandb", "monitor.wandb_project=p"), "wandb"),
    _row("tensorboard", "tensorboard is not installed", f"{ONE_LINE} with the package",
         without_package("tensorboard", "monitor.tensorboard=true"), "tensorboard"),
    _row("sglang", "sglang is not installed", f"{ONE_LINE} with the package",
         said(_train(live=True), extra={"TROPD_FAULTS_HIDE": "sglang"}), "sglang"),
    _row("port", "rollout.server.port is taken", "exit code 2 and one line with the key", taken_port,
         "rollout.server.port"),
    _row("key-unset", "the variable of rollout.server.api_key_env is unset", ONE_LINE,
         said(_train("rollout.server.url=http://127.0.0.1:1", "rollout.server.max_total_tokens=null",
                     "rollout.server.api_key_env=NO_SUCH_VARIABLE", live=True)), "NO_SUCH_VARIABLE"),
    _row("nobody-at-url", "nobody listens at rollout.server.url", "exit code 2 and one line with the key",
         said(_train("rollout.server.url=http://127.0.0.1:1", "rollout.server.max_total_tokens=null",
                     "rollout.server.max_retries=1", live=True), starts=True), "rollout.server.*127.0.0.1:1"),
    _row("gpu-recipe", "a recipe of 8 GPUs on a machine with none", ONE_LINE,
         said(lambda scene: tropd("train", GPU_RECIPE, "platform.kind=cuda", f"run.dir={scene.run_dir}")),
         "(?i)gpu"),
    _row("gpu-doctor", "tropd doctor of a recipe of 8 GPUs on a machine with none", "exit code 2, a FAIL for the GPUs",
         said(lambda scene: tropd("doctor", GPU_RECIPE, "platform.kind=cuda"), starts=True), "(?i)gpu"),
    _row("dry-run-nodes", "--dry-run of the recipe of 4 nodes", "the plan at once, without other nodes and ranks",
         said(lambda scene: tropd("train", NODES_RECIPE, "--dry-run"),
              extra={"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}), "(?i)ranks|parallel", code=0),
    _row("no-address-nodes", "2 nodes without MASTER_ADDR", ONE_LINE, nodes("", address="", ranks=(0,)),
         "MASTER_ADDR"),
    _row("missing-node", "one agent of two; Ctrl-C after 20 s", "a line that names the node it waits for; 130",
         nodes("free", ranks=(0,), interrupt_s=20), "node 1", code=130),
    _row("two-agents", "two agents on loopback, one rank each", "the run ends, equal bit for bit to that of one agent",
         nodes("free"), "", code=0),
    _row("two-agents-port-0", "two agents, MASTER_PORT=0 as the printed line has it", "the run ends",
         nodes("0"), "", code=0),
    _row("eval-prompts", "tropd eval --prompts /nope.jsonl", "exit code 2 and one line, before a server starts",
         said(_eval_without_prompts), "/nope.jsonl"),
    _row("report-nothing", "tropd report of a folder without a run", "exit code 2 and one line",
         said(lambda scene: tropd("report", scene.folder)), "metrics|run"),
    _row("convert-nothing", "tropd convert of a folder without a checkpoint", "exit code 2 and one line",
         said(lambda scene: tropd("convert", "mcore-to-hf", "--mcore", scene.folder, "--out", scene.folder / "out"),
              starts=True),
         "checkpoint|tropd.json"),
    _row("quickstart-size", "VENV=<absolute path> QUICKSTART_SIZE=huge bash examples/quickstart.sh",
         "exit code 2 and one line that names the size, not the environment",
         said(quickstart_without_venv, extra={"VENV": str(PYTHON), "QUICKSTART_SIZE": "huge", "SETUP": "0"},
              starts=True), "QUICKSTART_SIZE"),
]  # fmt: skip
