"""`python -m tests.faults consoles --out docs/consoles.md`: output of commands, with seconds and the longest silence.

This module does not judge (`verdict` does). Invariants: every console is that of a real command of this tree, in a pipe
as in a log. It contains no path of the machine: $WORK is the folder of models and runs, and `...` replaces all but the
last part of other paths.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.jobs import REPOSITORY
from tests.faults import results
from tests.faults.launch import Launch, send, tropd
from tests.faults.play import without_paths
from tests.faults.rows_disk import disk_of, no_room
from tests.faults.rows_signals import to_terminal
from tests.faults.scene import Scene, end_with_the_suite, scene
from tests.faults.stage import Stage, set_stage
from tests.faults.table import as_shell

LONGEST = 100
"""Lines of one console. The middle of a longer one is left out."""
LIMIT_S = 1200.0


@dataclass(frozen=True)
class Console:
    """One console to show."""

    title: str
    play: Callable[[Scene], tuple[Launch, float]]
    """Runs it. Returns the launch and the second at which the fault happened (0 = no fault)."""
    what: str = ""
    """The fault, in words."""


def plain(*words: object, extra: dict[str, str] | None = None) -> Callable[[Scene], tuple[Launch, float]]:
    """Run a command to its end."""

    def play(made: Scene) -> tuple[Launch, float]:
        values = {"LIVE": made.stage.live_config, "REPLAY": made.stage.replay_config, "RUN": f"run.dir={made.run_dir}"}
        filled = [values.get(str(word), word) for word in words]
        launch = made.start(tropd(*filled), extra=extra)
        launch.ended(LIMIT_S)
        return launch, 0.0

    return play


def quickstart(made: Scene) -> tuple[Launch, float]:
    """The quickstart in its small size, in this environment."""
    extra = {"QUICKSTART_SIZE": "tiny", "VENV": str(Path(sys.executable).parent.parent),
             "QUICKSTART_RUN": str(made.run_dir)}  # fmt: skip
    launch = made.start(["bash", str(REPOSITORY / "examples" / "quickstart.sh")], extra=extra)
    launch.ended(LIMIT_S)
    return launch, 0.0


def prefixes(made: Scene) -> tuple[Launch, float]:
    """Teacher responses with its own server."""
    words = ["prefixes", made.stage.live_config, "--out", made.folder / "responses.jsonl", "--max-new-tokens", "16"]
    launch = made.start(tropd(*words, f"run.dir={made.run_dir}"))
    launch.ended(LIMIT_S)
    return launch, 0.0


def evaluation(made: Scene) -> tuple[Launch, float]:
    """Accuracy with its own server."""
    words = ["eval", made.stage.live_config, "--prompts", made.stage.prompts, "--model", made.stage.model("student")]
    launch = made.start(tropd(*words, f"run.dir={made.run_dir}"))
    launch.ended(LIMIT_S)
    return launch, 0.0


def replayed(edge: str, act: Callable[[Scene, Launch], None], *more: str) -> Callable[[Scene], tuple[Launch, float]]:
    """A run of two ranks from stored rollouts, with a fault when rank 0 is at `edge`."""

    def play(made: Scene) -> tuple[Launch, float]:
        made.overrides = list(more)
        launch = made.job()
        launch.arm(edge, nth=3)
        launch.reach()
        launch.look()
        at = launch.seconds
        act(made, launch)
        launch.go()
        launch.ended(LIMIT_S)
        return launch, at

    return play


def server_stopped(made: Scene) -> tuple[Launch, float]:
    """A run with its own server, which is suspended during a step."""
    made.config = made.stage.live_config
    made.overrides = ["run.steps=4", "rollout.server.hang_timeout_s=20"]
    launch = made.job()
    launch.arm("before generate", nth=2)
    launch.reach()
    server = launch.server(made.run_dir)
    at = launch.seconds
    for process in (server, *server.children(recursive=True)):
        send(process, signal.SIGSTOP)
    launch.go()
    launch.ended(LIMIT_S)
    return launch, at


def full(made: Scene) -> tuple[Launch, float]:
    """A disk that is full before a checkpoint."""
    disk = disk_of(made)
    return replayed("before checkpoint", lambda _, launch: no_room(launch, disk))(made)


CONSOLES = (
    Console("tropd --help", plain("--help")),
    Console("tropd train --help", plain("train", "--help")),
    Console("tropd metrics trust", plain("metrics", "trust")),
    Console("tropd config --explain objective.trust", plain("config", "--explain", "objective.trust")),
    Console("A wrong path", plain("train", "REPLAY", "student.path=/nope", "RUN")),
    Console("The quickstart (QUICKSTART_SIZE=tiny)", quickstart),
    Console("Teacher responses", prefixes),
    Console("An evaluation", evaluation),
    Console("Ctrl-C", replayed("before score", lambda _, launch: to_terminal(launch, signal.SIGINT)), "Ctrl-C"),
    Console("SIGTERM, as Slurm sends it", replayed("before score", lambda _, launch: launch.process.terminate()),
            "SIGTERM to the launcher"),
    Console("SIGKILL of the launcher", replayed("before score", lambda _, launch: launch.process.kill()),
            "SIGKILL to the launcher"),
    Console("A server that stands still (rollout.server.hang_timeout_s=20)", server_stopped, "SIGSTOP to the server"),
    Console("A rank that stands still (run.rank_timeout_s=30)", replayed("before score",
            lambda _, launch: send(launch.rank(1), signal.SIGSTOP), "run.rank_timeout_s=30"), "SIGSTOP to rank 1"),
    Console("A full disk", full, "the disk is full"),
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults consoles", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: the console)")
    parser.add_argument("--only", help="only consoles whose title has this text")
    parser.add_argument("--work", type=Path, help="folder of models and runs, kept (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tropd-consoles-") as spare:
        root: Path = (options.work or Path(spare)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        stage = set_stage(root)
        end_with_the_suite(stage)
        chosen = [console for console in CONSOLES if not options.only or options.only in console.title]
        text = page([section(stage, console) for console in chosen])
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


def page(sections: list[str]) -> str:
    """The whole page."""
    found = results.circumstances()
    head = [
        "# What commands print",
        "",
        "This page shows what real commands print. To record it on your machine:",
        "",
        "```",
        "python -m tests.faults consoles --out docs/consoles.md",
        "```",
        "",
        "Each block is the output of one command into a pipe, as in a log. The number before each line is the second",
        "at which it was printed. `<<<` marks the moment at which the command was disturbed. From long output,",
        "the lines in the middle are left out. $WORK is the folder of models and runs.",
        f"Recorded at commit {found['commit'][:12]}, {found['date']}, {found['machine']}.",
        "",
    ]
    return "\n".join([*head, *sections]).rstrip("\n") + "\n"


def section(stage: Stage, console: Console) -> str:
    """One console as text."""
    begun = time.monotonic()
    with scene(stage, f"console-{console.title[:30]}") as made:
        launch, at = console.play(made)
        time.sleep(0.5)  # the reader may lag by one line
        end, code = launch.seconds - 0.5, as_shell(launch.process.poll())
        left = launch.left()
        lines = list(launch.lines)
        command = " ".join(launch.command).replace(f"{sys.executable} -m tropd_mcore.cli.main", "tropd")
    times = [0.0, *(line.at for line in lines), end]
    silence, since = max((later - earlier, earlier) for earlier, later in itertools.pairwise(times))
    first = lines[0].at if lines else end
    shown = [f"{line.at:7.1f}  {_clean(line.text, stage)}" for line in lines]
    if at:
        place = sum(line.at <= at for line in lines)
        shown.insert(place, f"{at:7.1f}  <<< {console.what}")
    if len(shown) > LONGEST:
        shown = [*shown[: LONGEST // 2], f"         ... {len(shown) - LONGEST} lines ...", *shown[-LONGEST // 2 :]]
    print(f"{console.title}: {code}, {time.monotonic() - begun:.0f} s, longest silence {silence:.0f} s", flush=True)
    facts = f"Exit code {code} after {end:.1f} s. First line after {first:.1f} s, longest silence {silence:.1f} s"
    facts += f" from second {since:.0f} on. Left running: {len(left)}."
    if at:
        facts += f" {end - at:.1f} s from the fault to the end."
    return "\n".join([f"## {console.title}", "", facts, "", "```", f"$ {_clean(command, stage)}", *shown, "```", ""])


def _clean(text: str, stage: Stage) -> str:
    text = without_paths(text.replace(f"{REPOSITORY}/", ""), stage.root)
    return "".join(character if character.isprintable() else "?" for character in text)[:240]
