"""Faults: checkpoints and stored files of a run that are damaged, replaced or malicious."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.scene import Scene, copied
from tests.faults.stage import Reference
from tests.faults.verdict import Fault, Seen

Damage = Callable[[Path, Scene], None]
"""Damages a run directory that has 4 of 8 steps."""


class Hostile:
    """A pickle that writes a file when it is loaded normally."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, (f"open({str(self.trace)!r}, 'w').close()",))


def half_done(scene: Scene) -> Path:
    """A copy of a run that stopped after step 4 of 8. It is made once per stage."""
    with scene.stage.once:
        source = scene.stage.root / "played" / "half" / "run"
        if not source.exists():
            made = Scene(scene.stage, scene.stage.place("half"))
            made.overrides = ["run.stop_after=4"]
            try:
                launch = made.job()
                if not launch.ended() or launch.process.poll() != 0:
                    raise RuntimeError(f"the run to damage was not made: {launch.tail()}")
            finally:
                made.close()
    return copied(source, scene.run_dir)


def damaged(damage: Damage, *, resumes: bool = False, more: tuple[str, ...] = ()) -> Callable[[Scene], Seen]:
    """Damage the run directory, then run the same command. `resumes` if the damage must not matter."""

    def play(scene: Scene) -> Seen:
        run_dir = half_done(scene)
        damage(run_dir, scene)
        seen = scene.play_to_the_end(scene.command(*more))
        trace = scene.folder / "hostile-code-ran"
        if trace.exists():
            seen.lost.append("the code of a hostile file was run")
        if resumes and seen.code == 0:
            seen.lost += scene.stage.reference().differences(Reference.of(run_dir))
        return seen

    return play


def newest(run_dir: Path) -> Path:
    """Folder of the newest checkpoint."""
    return max((run_dir / "checkpoints").glob("step_*"))


def _shard(run_dir: Path) -> Path:
    return max(newest(run_dir).glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(run_dir: Path, _scene: Scene) -> None:
    path = _shard(run_dir)
    path.write_bytes(path.read_bytes()[:-1000])


def remove_shard(run_dir: Path, _scene: Scene) -> None:
    _shard(run_dir).unlink()


def empty_index(run_dir: Path, _scene: Scene) -> None:
    (newest(run_dir) / ".metadata").write_bytes(b"")


def empty_common(run_dir: Path, _scene: Scene) -> None:
    (newest(run_dir) / "common.pt").write_bytes(b"")


def flip(run_dir: Path, _scene: Scene) -> None:
    path = _shard(run_dir)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def hostile_index(run_dir: Path, scene: Scene) -> None:
    (newest(run_dir) / ".metadata").write_bytes(pickle.dumps(Hostile(scene.folder / "hostile-code-ran")))


def hostile_common(run_dir: Path, scene: Scene) -> None:
    (newest(run_dir) / "common.pt").write_bytes(pickle.dumps(Hostile(scene.folder / "hostile-code-ran")))


def rename(run_dir: Path, _scene: Scene) -> None:
    folder = newest(run_dir)
    folder.rename(folder.with_name("step_000006"))


def no_info(run_dir: Path, _scene: Scene) -> None:
    (newest(run_dir) / "tropd.json").unlink()


def half_written(run_dir: Path, _scene: Scene) -> None:
    folder = newest(run_dir)
    shutil.copytree(folder, folder.with_name("step_000006.partial"))
    (folder.with_name("step_000008")).mkdir()


def torn_info(run_dir: Path, _scene: Scene) -> None:
    path = newest(run_dir) / "tropd.json"
    path.write_text(path.read_text()[:40])


def torn_end(run_dir: Path, _scene: Scene) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "loss/to')


def torn_middle(run_dir: Path, _scene: Scene) -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:25]
    path.write_text("\n".join(lines) + "\n")


def repeated_line(run_dir: Path, _scene: Scene) -> None:
    """A metrics line beyond the checkpoint, as left by a crash. It is dropped and written again."""
    path = run_dir / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as stream:
        stream.write(json.dumps(last | {"step": 4}) + "\n")


def torn_rollouts(run_dir: Path, scene: Scene) -> None:
    source = scene.stage.root / "sampled" / "rollouts" / "step_000004.npz"
    (run_dir / "rollouts" / "step_000004.npz").write_bytes(source.read_bytes()[:-200])


def other_rollouts(run_dir: Path, scene: Scene) -> None:
    """Rollouts sampled by another model. Their log-probs are not the student's."""
    import dataclasses

    from tropd_mcore.records.replay import load_rollouts, save_rollouts

    source = scene.stage.root / "sampled" / "rollouts" / "step_000004.npz"
    changed = [dataclasses.replace(each, rollout_logp=each.rollout_logp - 0.7) for each in load_rollouts(source)]
    save_rollouts(run_dir / "rollouts" / "step_000004.npz", changed)


def torn_config(run_dir: Path, _scene: Scene) -> None:
    path = run_dir / "config.resolved.yaml"
    path.write_text(path.read_text()[:200] + "\n  : [")


def nothing(_run_dir: Path, _scene: Scene) -> None:
    """Nothing is damaged."""


def _refused(name: str, done: str, damage: Damage, line: str, *, representative: bool = False) -> Fault:
    return Fault(
        id=f"checkpoint-{name}",
        group="checkpoint",
        done=done,
        wanted="exit code 2, one line that names the file and what can be done; nothing is run or trained",
        play=damaged(damage),
        line=line,
        representative=representative,
    )


def _harmless(name: str, done: str, damage: Damage, line: str = "") -> Fault:
    return Fault(
        id=f"checkpoint-{name}",
        group="checkpoint",
        done=done,
        wanted="the run goes on, equal bit for bit",
        play=damaged(damage, resumes=True),
        code=(0,),
        line=line,
    )


FAULTS = [
    _refused("truncated", "a shard of the newest checkpoint is truncated", truncate, r"\.distcp|checkpoint"),
    _refused("missing", "a shard is missing", remove_shard, r"\.distcp|checkpoint"),
    _refused("index", "the index of the shards is empty", empty_index, r"\.metadata|checkpoint"),
    _refused("common", "common.pt is empty", empty_common, r"common\.pt|checkpoint"),
    _refused("bit-flip", "one bit of a main weight is flipped", flip, "step_000002"),
    _refused("hostile-index", "a hostile pickle in place of the index", hostile_index, "checkpoint"),
    _refused("hostile-common", "a hostile pickle in place of common.pt", hostile_common, "checkpoint"),
    _refused("renamed", "the folder of a checkpoint has the name of another step", rename, "step"),
    _refused("torn-info", "the JSON of the newest checkpoint is torn", torn_info, "tropd.json"),
    _harmless("no-info", "the newest checkpoint has no JSON: the one before it is taken", no_info, "tropd.json"),
    _harmless("half-written", "half-written and empty folders beside the checkpoints", half_written),
    _harmless("metrics-torn-end", "the last line of metrics.jsonl is torn", torn_end),
    _harmless("metrics-beyond", "metrics.jsonl has a line beyond the checkpoint", repeated_line),
    _refused("metrics-torn-middle", "a line in the middle of metrics.jsonl is torn", torn_middle,
             "metrics.jsonl:2"),
    _refused("rollouts-torn", "stored rollouts of the next step are torn", torn_rollouts, "step_000004.npz"),
    _refused("rollouts-other", "stored rollouts of the next step are of other weights", other_rollouts,
             "gates.sampler_logprob"),
    _refused("config-torn", "the record of the launch before is torn", torn_config, "config.resolved.yaml"),
    Fault(
        id="checkpoint-other-layout",
        group="checkpoint",
        done="resume of a run of two tensor-parallel ranks on one rank",
        wanted="the run goes on, with a line that says so",
        play=damaged(nothing, more=("parallel.tensor=1",)),
        code=(0,),
        line="parallel",
    ),
    Fault(
        id="checkpoint-other-objective",
        group="checkpoint",
        done="resume with another objective",
        wanted="exit code 2, one line that names the key and the way out",
        play=damaged(nothing, more=("objective.outlier.topk=4",)),
        line="objective.outlier.topk",
    ),
]  # fmt: skip
