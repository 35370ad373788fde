"""Faults: wrong model folders and data files, for a launch and for `tropd doctor`."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.launch import tropd
from tests.faults.lies import one_rank, raw_controls, whole_run
from tests.faults.scene import Scene, copied
from tests.faults.stage import write_lines
from tests.faults.verdict import Fault, Seen

Make = Callable[[Scene, Path], list[str]]
"""Writes a wrong file into a folder. Returns the overrides that name it."""
LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1234567\n"
)


def launched(make: Make, *, doctor: bool = True, ranks: int = 1) -> Callable[[Scene], Seen]:
    """The job, preceded by `tropd doctor`, which has to find the same problem. The job's output is judged."""

    def play(scene: Scene) -> Seen:
        overrides = [*make(scene, scene.folder), f"parallel.tensor={ranks}"]
        words = []
        if doctor:
            found = scene.play_to_the_end(tropd("doctor", scene.config, *overrides, f"run.dir={scene.run_dir}"))
            words = [] if found.code == 2 else [f"tropd doctor ended with {found.code} and did not find it"]
        seen = scene.play_to_the_end(scene.command(*overrides))
        seen.weak += words
        if (scene.run_dir / "metrics.jsonl").exists():
            seen.lost.append("a step was trained")
        return seen

    return play


def _prompts(write: Callable[[Path, Scene], None], name: str = "prompts.jsonl") -> Make:
    def make(scene: Scene, folder: Path) -> list[str]:
        write(folder / name, scene)
        return [f"data.prompts={folder / name}"]

    return make


def _model(damage: Callable[[Path], None], key: str = "student") -> Make:
    def make(scene: Scene, folder: Path) -> list[str]:
        damage(copied(scene.stage.model(key), folder / key))
        return [f"{key}.path={folder / key}"]

    return make


def _lines(scene: Scene) -> list[dict[str, object]]:
    return [json.loads(line) for line in scene.stage.prompts.read_text().splitlines()]


def parquet(path: Path, _scene: Scene) -> None:
    path.write_bytes(b"PAR1\x15\x04\x15\x10" + bytes(range(256)) + b"PAR1")


def zipped(path: Path, scene: Scene) -> None:
    path.write_bytes(gzip.compress(scene.stage.prompts.read_bytes()))


def utf16(path: Path, scene: Scene) -> None:
    path.write_bytes(scene.stage.prompts.read_text().encode("utf-16"))


def pointer(path: Path, _scene: Scene) -> None:
    path.write_text(LFS)


def page(path: Path, _scene: Scene) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>404</body></html>\n")


def surrogate(path: Path, scene: Scene) -> None:
    lines = scene.stage.prompts.read_text().splitlines()
    lines[2] = '{"id": "s0p2", "prompt": "how many \\ud83d apples"}'
    path.write_text("\n".join(lines) + "\n")


def torn(path: Path, scene: Scene) -> None:
    path.write_text(scene.stage.prompts.read_text()[:-30])


def empty(path: Path, _scene: Scene) -> None:
    path.write_text("")


def twice(path: Path, scene: Scene) -> None:
    lines = _lines(scene)
    write_lines(path, [*lines, lines[3]])


def long_prompt(path: Path, scene: Scene) -> None:
    lines = _lines(scene)
    lines[4]["prompt"] = "how many apples " * 400
    write_lines(path, lines)


def paths_as_ids(path: Path, scene: Scene) -> None:
    lines = _lines(scene)
    for number, line in enumerate(lines):
        line["id"] = f"../../{number}\x1b[31m<script>"
    write_lines(path, lines)


def hostile_ids(scene: Scene) -> Seen:
    """A run of prompts whose ids contain `../`, control characters and a script tag, and its report."""
    path = scene.folder / "prompts.jsonl"
    paths_as_ids(path, scene)
    one_rank(scene, 1, f"data.prompts={path}", "objective.guidance.enabled=false")
    seen = whole_run(scene)
    report = scene.play_to_the_end(tropd("report", scene.run_dir))
    seen.lost += raw_controls(seen.output + report.output)
    pages = [page.read_text(encoding="utf-8") for page in scene.run_dir.glob("*.html")]
    if not pages or any("[31m<script>" in page for page in pages):
        seen.lost.append("there is no report, or an id is a script in it")
    return seen


def weights_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS)


def bin_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"\0" * 100)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def tokenizer_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(LFS)


def other_release(folder: Path) -> None:
    """A tokenizer.json that the installed release of tokenizers cannot read."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["type"] = "BPE2"
    content["version"] = "3.0"
    path.write_text(json.dumps(content))


def other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def short_context(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))


def code_of_its_own(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    path.write_text(json.dumps(content))
    (folder / "mine.py").write_text(f"open({str(folder.parent / 'hostile-code-ran')!r}, 'w').close()\n")


def nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def missing(key: str) -> Make:
    return lambda scene, folder: [f"{key}=/nope"]


def no_response(scene: Scene, folder: Path) -> list[str]:
    lines = [json.loads(line) for line in scene.stage.responses.read_text().splitlines()]
    write_lines(folder / "responses.jsonl", [line for line in lines if line["id"] != "s0p3"])
    scene.config = scene.stage.live_config
    return [f"data.teacher_responses={folder / 'responses.jsonl'}"]


def changed_prompts(scene: Scene) -> Seen:
    """Other texts under the same path between two launches."""
    path = scene.folder / "prompts.jsonl"
    shutil.copy(scene.stage.prompts, path)
    return _changed(scene, f"data.prompts={path}", lambda: write_lines(path, [
        line | {"prompt": f"{line['prompt']} now"} for line in _lines(scene)]))  # fmt: skip


def changed_teacher(scene: Scene) -> Seen:
    """Other weights of the teacher in place between two launches."""
    folder = copied(scene.stage.model("teacher"), scene.folder / "teacher")
    source = scene.stage.model("other") / "model.safetensors"
    return _changed(scene, f"teacher.path={folder}", lambda: shutil.copy(source, folder / "model.safetensors"))


def _changed(scene: Scene, override: str, change: Callable[[], object]) -> Seen:
    scene.overrides = [override]
    first = scene.play_to_the_end(scene.command("run.stop_after=2"))
    change()
    second = scene.play_to_the_end(scene.command())
    if first.code != 0:
        second.lost.append(f"the first launch ended with {first.code}")
    return second


def _row(
    name: str, done: str, make: Make, line: str,
    *, doctor: bool = True, ranks: int = 1, representative: bool = False,
) -> Fault:  # fmt: skip
    return Fault(
        id=f"file-{name}",
        group="file",
        done=done,
        wanted="exit code 2, one line that names file, cause and cure; no step is trained; `tropd doctor` finds it too",
        play=launched(make, doctor=doctor, ranks=ranks),
        line=line,
        representative=representative,
    )


FAULTS = [
    _row("no-student", "student.path=/nope", missing("student.path"), "student.path=/nope: not found",
         representative=True),
    _row("no-teacher", "teacher.path=/nope", missing("teacher.path"), "teacher.path=/nope: not found"),
    _row("no-prompts", "data.prompts=/nope", missing("data.prompts"), "data.prompts=/nope"),
    _row("no-replay", "run.replay=/nope", missing("run.replay"), "run.replay=/nope"),
    _row("prompts-parquet", "a parquet file as prompts", _prompts(parquet), "data.prompts.*parquet"),
    _row("prompts-gzip", "a gzip archive as prompts", _prompts(zipped), "data.prompts.*gzip"),
    _row("prompts-utf16", "prompts in UTF-16", _prompts(utf16), "data.prompts.*UTF-16"),
    _row("prompts-lfs", "a Git LFS pointer as prompts", _prompts(pointer), "data.prompts.*LFS"),
    _row("prompts-page", "a web page as prompts", _prompts(page), "data.prompts.*(web page|HTML)"),
    _row("prompts-surrogate", "a lone surrogate in line 3 of the prompts", _prompts(surrogate),
         "prompts.jsonl:3.*surrogate", ranks=2),
    _row("prompts-torn", "the last line of the prompts is torn", _prompts(torn), r"prompts.jsonl:\d+"),
    _row("prompts-empty", "no prompts", _prompts(empty), "data.prompts|prompts.jsonl"),
    _row("prompts-twice", "one id twice", _prompts(twice), "(?i)s0p3"),
    _row("prompts-long", "a prompt longer than data.max_prompt_tokens", _prompts(long_prompt),
         "data.max_prompt_tokens"),
    _row("weights-lfs", "a Git LFS pointer as weights", _model(weights_pointer), "model.safetensors.*LFS"),
    _row("weights-bin", "a folder with pytorch_model.bin only", _model(bin_only), "safetensors"),
    _row("weights-cut", "truncated weights", _model(cut_weights), "model.safetensors"),
    _row("no-config", "a model folder without config.json", _model(no_config), "student.path.*config.json"),
    _row("tokenizer-lfs", "a Git LFS pointer as tokenizer.json", _model(tokenizer_pointer), "tokenizer.json.*LFS"),
    _row("tokenizer-release", "tokenizer.json of another release", _model(other_release), "tokenizer.json"),
    _row("vocabulary", "a teacher with other ids for two tokens", _model(other_vocabulary, "teacher"),
         "differ in 2 of"),
    _row("context", "a teacher whose context is shorter than a rollout", _model(short_context, "teacher"),
         "16 tokens"),
    _row("auto-map", "a model folder with code of its own", _model(code_of_its_own), "mine"),
    _row("nan-teacher", "a NaN in the teacher's weights", _model(nan_weights, "teacher"), "(?i)nan|finite",
         doctor=False),
    _row("no-response", "one prompt without a stored teacher response", no_response, "s0p3|1 of"),
    Fault(
        id="file-ids-with-paths",
        group="file",
        done="ids of prompts with ../, escapes and a script",
        wanted="harmless: the run ends well, no control characters on the terminal, the report shows them as text",
        play=hostile_ids,
        code=(0,),
        shared=True,
    ),
    Fault(
        id="file-prompts-changed",
        group="file",
        done="other prompts under the same path between two launches",
        wanted="exit code 2, one line with both digests",
        play=changed_prompts,
        line="data.prompts.*content changed",
    ),
    Fault(
        id="file-teacher-changed",
        group="file",
        done="other weights of the teacher in place between two launches",
        wanted="exit code 2, one line with both digests",
        play=changed_teacher,
        line="teacher.path.*(content changed|model.safetensors)",
    ),
]  # fmt: skip
