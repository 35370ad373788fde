"""Faults: no disk space, no write permission, no run directory, no flock, and two jobs in one run directory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.faults.disks import Disk, can_mount, small_disk
from tests.faults.launch import Launch, tropd
from tests.faults.scene import Scene
from tests.faults.verdict import Fault, Seen

Play = Callable[[Scene], Seen]
CHAIN = "disk"
FULL = r"(?i)error.*(no space left|file too large).*"


def disk_of(scene: Scene) -> Disk | None:
    """The small disk of the scene, with its run directory on it. None if this user may not mount one."""
    if "disk" not in scene.shared:
        scene.shared["disk"] = None
        if can_mount():
            scene.shared["disk"] = scene.cleanup.enter_context(small_disk(scene.folder / "disk"))
            scene.run_dir = scene.folder / "disk" / "run"
    found: Disk | None = scene.shared["disk"]
    return found


def no_room(launch: Launch, disk: Disk | None) -> None:
    """From now on the processes of the launch cannot write another byte."""
    if disk is not None:
        disk.fill()
        return
    for process in launch.members():
        process.rlimit(psutil.RLIMIT_FSIZE, (0, psutil.RLIM_INFINITY))


def full_at(edge: str) -> Play:
    """The disk is full from `edge` on. Space is freed after the launch has ended."""

    def play(scene: Scene) -> Seen:
        disk = disk_of(scene)
        launch = scene.job()
        launch.halt(edge)
        scene.strike(launch)
        no_room(launch, disk)
        launch.go()
        seen = scene.end(launch)
        if disk is not None:
            disk.free()
        return seen

    return play


def full_for(command: Callable[[Scene, Path], list[str]]) -> Play:
    """Any command whose output goes to a full disk. No partial file may remain."""

    def play(scene: Scene) -> Seen:
        disk = disk_of(scene)
        place = scene.folder / "disk"
        place.mkdir(exist_ok=True)
        words = command(scene, place)
        if disk is not None:
            disk.fill()
        else:
            words = ["prlimit", "--fsize=0", *words]
        seen = scene.play_to_the_end(words)
        seen.lost += [
            f"half-written: {path.name}" for path in place.rglob("*") if path.is_file() and path.name.startswith("out")
        ]
        return seen

    return play


def _report(scene: Scene, place: Path) -> list[str]:
    run_dir = scene.stage.root / "played" / "reference" / "run"
    scene.stage.reference()
    return tropd("report", run_dir, "--out", place / "out.html")


def _convert(scene: Scene, place: Path) -> list[str]:
    return tropd("convert", "hf-to-mcore", "--hf", scene.stage.model("student"), "--out", place / "out")


def _eval(scene: Scene, place: Path) -> list[str]:
    url = scene.stage.outside("student").url
    return tropd("eval", scene.stage.live_config, "--prompts", scene.stage.prompts, "--model",
                 scene.stage.model("student"), "--samples", "0", "--url", url, "--out", place / "out.json",
                 f"run.dir={scene.folder / 'run'}")  # fmt: skip


def _prefixes(scene: Scene, place: Path) -> list[str]:
    url = scene.stage.outside("teacher").url
    return tropd("prefixes", scene.stage.live_config, "--out", place / "out.jsonl", "--max-new-tokens", "8",
                 "teacher.kind=sglang", f"teacher.server.url={url}", f"run.dir={scene.folder / 'run'}")  # fmt: skip


def _models(scene: Scene, place: Path) -> list[str]:
    return [sys.executable, "-m", "examples.make_models", str(place / "out"), "--tiny"]


def full_at_rollouts(scene: Scene) -> Seen:
    """The disk is full when sampled rollouts are about to be stored."""
    scene.config = scene.stage.live_config
    scene.overrides = ["parallel.tensor=1", "run.steps=2", f"rollout.server.url={scene.stage.outside('student').url}",
                       "rollout.server.max_total_tokens=null"]  # fmt: skip
    seen = full_at("before store rollouts")(scene)
    seen.lost += scene.finish()
    return seen


def removed(scene: Scene) -> Seen:
    """The run directory is removed in mid-run and not created again."""
    launch = scene.job()
    launch.halt("before optimizer")
    scene.strike(launch)
    shutil.rmtree(scene.run_dir)
    launch.go()
    seen = scene.end(launch)
    if scene.run_dir.exists():
        seen.lost.append("the removed directory was made again by a job that does not hold it")
    return seen


def second_job(extra: dict[str, str] | None = None) -> Play:
    """The same command while it runs. The first one then runs to its end."""

    def play(scene: Scene) -> Seen:
        scene.environment = extra or {}
        first = scene.job()
        first.halt("before score")
        second = scene.start(scene.command())
        scene.struck = 0.0
        seen = scene.end(second)
        scene.current = first
        first.go()
        seen.lost += scene.finish()
        return seen

    return play


def no_flock(*overrides: str) -> Play:
    """A whole run on a file system without flock."""

    def play(scene: Scene) -> Seen:
        scene.environment = {"TROPD_FAULTS_NO_FLOCK": "1"}
        scene.overrides = list(overrides)
        launch = scene.job()
        scene.struck = 0.0
        seen = scene.end(launch)
        if seen.code == 0:
            scene.environment = {}
            seen.lost += scene.finish()
        return seen

    return play


def read_only(scene: Scene) -> Seen:
    """A run directory that cannot be written: a file is in place of one of its parent folders."""
    (scene.folder / "file").write_text("in the way")
    scene.run_dir = scene.folder / "file" / "run"
    return scene.play_to_the_end(scene.command())


def _row(name: str, what: str, edge: str, *, representative: bool = False) -> Fault:
    return Fault(
        id=f"disk-{name}",
        group="disk",
        done=f"the disk is full at {what}",
        wanted="exit code 2, one line that names the file; with room again the same command goes on, equal bit for bit",
        play=full_at(edge),
        line=FULL,
        chain=CHAIN,
        representative=representative,
    )


def _command(name: str, what: str, command: Callable[[Scene, Path], list[str]], *, shared: bool = False) -> Fault:
    return Fault(
        id=f"disk-{name}",
        group="disk",
        done=f"the disk is full at {what}",
        wanted="exit code 2, one line that names the file; nothing half-written",
        play=full_for(command),
        line=FULL,
        shared=shared,
    )


FAULTS = [
    _row("records", "the records of a launch", "after load model"),
    _row("scores", "the scores of the teacher", "after forward and backward"),
    _row("metrics", "the metrics line", "before metrics", representative=True),
    _row("checkpoint", "the tensors of a checkpoint", "before checkpoint"),
    _row("checkpoint-info", "the JSON of a checkpoint", "before checkpoint info"),
    _row("export", "the export", "before export"),
    Fault(
        id="disk-rollouts",
        group="disk",
        done="the disk is full at the rollouts of a step",
        wanted="exit code 2, one line that names the file; with room again the same command goes on",
        play=full_at_rollouts,
        line=FULL,
        shared=True,
    ),
    _command("report", "the report", _report),
    _command("convert", "a converted checkpoint", _convert),
    _command("eval", "the result of an evaluation", _eval, shared=True),
    _command("prefixes", "the teacher's responses", _prefixes, shared=True),
    _command("make-models", "the models of the quickstart", _models),
    Fault(
        id="disk-run-dir-removed",
        group="disk",
        done="run.dir is removed in mid-run",
        wanted="exit code 2, one line; the directory is not made again",
        play=removed,
        line="run.dir",
        limit_s=60.0,
    ),
    Fault(
        id="disk-second-job",
        group="disk",
        done="the same command while it runs",
        wanted="exit code 2, one line; the first goes on, equal bit for bit",
        play=second_job(),
        line="run.dir.*(in use|held|another job)",
    ),
    Fault(
        id="disk-no-flock",
        group="disk",
        done="a file system without flock (Lustre)",
        wanted="the run goes to its end, equal bit for bit",
        play=no_flock(),
        code=(0,),
        line="flock|lock",
    ),
    Fault(
        id="disk-no-flock-second-job",
        group="disk",
        done="the same command while it runs, on a file system without flock",
        wanted="exit code 2, one line; the first goes on",
        play=second_job({"TROPD_FAULTS_NO_FLOCK": "1"}),
        line="run.dir.*(in use|held|another job)",
    ),
    Fault(
        id="disk-no-flock-demanded",
        group="disk",
        done="run.lock=flock on a file system without flock",
        wanted="exit code 2, one line that names the key",
        play=no_flock("run.lock=flock"),
        line="run.lock",
    ),
    Fault(
        id="disk-not-writable",
        group="disk",
        done="run.dir below a file",
        wanted="exit code 2, one line that names the key",
        play=read_only,
        line="run.dir",
    ),
]
