"""What a user may ask of either trainer, and what each of them printed.

Nothing here is an opinion: both are run, and their last line or their exception is kept as it is. Only the path of the
working folder is cut off.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.versus.settings import Settings, our_config
from tropd_mcore.files import read_step_lines
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.records.run_dir import RunDir

STEPS = 4
LIMIT_S = 600.0
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w+(?:Error|Exception|Interrupt): .+)$", re.MULTILINE)
OUR_ERROR = re.compile(r"^error: .+$", re.MULTILINE)


@dataclass(frozen=True)
class Place:
    """Where the probes run."""

    work: Path
    root: Path
    models: Path
    """the pair as it was made"""
    student: str
    """folder of the student in it"""
    ours: Sequence[str]
    """command that is `tropd`"""
    trl_python: str
    environment: dict[str, str]


@dataclass(frozen=True)
class Question:
    """One thing that is asked of both."""

    name: str
    asked: str
    trl: str
    """name of the probe of TRL"""
    ours: dict[str, Any]
    """sections of our configuration that differ"""
    ranks: int = 1


QUESTIONS = (
    Question("widths", "a teacher with more padding rows than the student", "train", {}),
    Question("wrong_tokenizer", "a teacher whose tokenizer swaps two tokens", "train", {}),
    Question(
        "tensor_parallel", "two tensor-parallel ranks, on a CPU", "tensor_parallel", {"parallel": {"tensor": 2}}, 2
    ),
    Question(
        "teacher_topk", "the teacher's 16 best tokens instead of its whole vocabulary", "teacher_topk",
        {"objective": {"kind": "gkd", "divergence": "rkl", "topk": 16, "norm": "tail"}},
    ),
    Question(
        "served_topk", "reverse KL on the 16 best tokens of a served teacher", "served_topk",
        {"objective": {"kind": "gkd", "divergence": "rkl", "topk": 16, "norm": "tail"},
         "teacher": {"kind": "sglang", "server": {"max_total_tokens": 16384}}},
    ),
    Question("resume", "a resume from the checkpoint in the middle", "resume", {}),
)  # fmt: skip


def ask(question: Question, settings: Settings, place: Place) -> dict[str, Any]:
    """Return {name, asked, trl, ours}; the answers have `exit_code` and `printed`."""
    settings = _folders(question, replace(settings, steps=STEPS, export_every=None), place)
    return {
        "name": question.name,
        "asked": question.asked,
        "trl": _ask_trl(question, settings, place),
        "ours": _ask_ours(question, settings, place),
    }


def same_loss(settings: Settings, place: Place) -> dict[str, Any]:
    """Return the loss and the gradient norm of both on the same responses, before the first update."""
    settings = replace(settings, steps=1, export_every=None)
    code, log = _train_ours(settings, place, f"same_{settings.loss}", {})
    run_dir = RunDir(place.work / f"same_{settings.loss}" / "run")
    if code != 0:
        raise SystemExit(f"error: tropd train failed (exit code {code}): {_ours_printed(code, log, run_dir)}")
    line = read_step_lines(run_dir.metrics)[0]
    rows = [
        {"prompt": rollout.prompt_ids.tolist(), "response": rollout.response_ids.tolist()}
        for rollout in load_rollouts(run_dir.rollouts(0))
    ]
    out = place.work / f"same_{settings.loss}" / "trl"
    out.mkdir(parents=True, exist_ok=True)
    (out / "rollouts.json").write_text(json.dumps(rows))
    code, printed = _run_trl("loss", settings, place, out)
    if code != 0:
        raise SystemExit(f"error: the loss of TRL could not be computed: {printed}")
    ours = {"loss": line["loss/total"], "gradient_norm": line["optimizer/grad_norm"]}
    return {"loss": settings.loss, "ours": ours, "trl": json.loads(printed)}


def _folders(question: Question, settings: Settings, place: Place) -> Settings:
    """Return the settings with the model folders that the question is about."""
    if question.name == "widths":
        return replace(settings, student=str(place.models / place.student), teacher=str(place.models / "teacher"))
    if question.name == "wrong_tokenizer":
        return replace(settings, teacher=str(swap_two_tokens(Path(settings.teacher), place.work / "swapped")))
    return settings


def swap_two_tokens(folder: Path, out: Path, first: str = "3", second: str = "7") -> Path:
    """Return `out`, a copy of a model folder in whose tokenizer two tokens have each other's id."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    content = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def _ask_trl(question: Question, settings: Settings, place: Place) -> dict[str, Any]:
    code, printed = _run_trl(question.trl, settings, place, place.work / question.name / "trl", question.ranks)
    return {"exit_code": code, "printed": printed}


def _run_trl(probe: str, settings: Settings, place: Place, out: Path, ranks: int = 1) -> tuple[int, str]:
    out.mkdir(parents=True, exist_ok=True)
    settings.write(out / "settings.json")
    launch = [place.trl_python]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, "-m", "benchmarks.versus.trl_probes", probe, str(out / "settings.json"), str(out)]
    done = _run(command, out / "log", place)
    return done.returncode, _shown(trl_printed(done.returncode, done.stdout, done.stderr), place)


def trl_printed(code: int, stdout: str, stderr: str) -> str:
    """Return the last line of a probe that ended well, else the first exception that is no consequence of another."""
    if code == 0:
        return stdout.strip().splitlines()[-1] if stdout.strip() else ""
    found = [text for text in EXCEPTION.findall(stderr) if "ChildFailedError" not in text]
    return found[0] if found else (stderr.strip().splitlines() or ["no message"])[-1]


def _ask_ours(question: Question, settings: Settings, place: Place) -> dict[str, Any]:
    name = f"{question.name}/ours"
    run = {"run": {"checkpoint_every": STEPS // 2}} if question.name == "resume" else {}
    code, log = _train_ours(settings, place, name, question.ours | run)
    folder = place.work / name / "run"
    if question.name == "resume" and code == 0:
        last = folder / "checkpoints" / f"step_{STEPS:06d}"
        (folder / "export").rename(place.work / name / "first")
        shutil.rmtree(last)
        code, log = _train_ours(settings, place, name, question.ours | run)
        if code == 0:
            exports = (place.work / name / "first", folder / "export")
            first, second = (load_file(export / "model.safetensors") for export in exports)
            differ = [key for key in first if not torch.equal(first[key], second[key])]
            text = f"{len(differ)} of {len(first)} tensors differ after a resume from step {STEPS // 2} of {STEPS}"
            return {"exit_code": code, "printed": text}
    return {"exit_code": code, "printed": _shown(_ours_printed(code, log, RunDir(folder)), place)}


def _train_ours(settings: Settings, place: Place, name: str, sections: dict[str, Any]) -> tuple[int, str]:
    folder = place.work / name
    folder.mkdir(parents=True, exist_ok=True)
    config = our_config(settings, folder / "run")
    config["run"]["export_at_end"] = True
    for section, keys in sections.items():
        config[section] = keys if section == "objective" else config.get(section, {}) | keys
    (folder / "config.yaml").write_text(json.dumps(config))
    command = [*place.ours, "train", str(folder / "config.yaml")]
    done = _run(command, folder / "log", place)
    return done.returncode, done.stdout + done.stderr


def _run(command: Sequence[str], log: Path, place: Place) -> subprocess.CompletedProcess[str]:
    """Run a command of either trainer to its end, and keep what it printed in `log`."""
    done = subprocess.run(command, cwd=place.root, env=place.environment, capture_output=True, text=True,
                          timeout=LIMIT_S, check=False)  # fmt: skip
    log.write_text(done.stdout + done.stderr)
    return done


def _ours_printed(code: int, log: str, run_dir: RunDir) -> str:
    if code == 0:
        losses = [line["loss/total"] for line in read_step_lines(run_dir.metrics)]
        return f"trained {len(losses)} steps, mean loss {fmean(losses):.4g}"
    found = OUR_ERROR.findall(log)
    return found[-1] if found else (log.strip().splitlines() or ["no message"])[-1]


def _shown(text: str, place: Place) -> str:
    for folder in (place.work, place.work.parent, place.models, place.root):
        text = text.replace(f"{folder}/", "")
    return text
