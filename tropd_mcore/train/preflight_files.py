"""Checks that the files and folders of a configuration exist and are of the right kind.

These checks read names and config.json, and the prompts if a model folder is faulty. They do not read tokenizers or
weights (`train.start_checks`). Invariant: a file that the run does not read need not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tropd_mcore.config.derived import model_paths, reads_responses, rollout_servers
from tropd_mcore.config.schema import Config
from tropd_mcore.data.prompt_file import read_prompt_file
from tropd_mcore.errors import DataError, ModelError
from tropd_mcore.train.ground import read_model
from tropd_mcore.train.preflight_types import Fault

INFO_FILE = "tropd.json"
"""File that makes a folder a checkpoint. Source: `mcore.checkpoint_info`, which is too slow to import here."""


def model_folders(config: Config) -> Iterator[Fault]:
    """Check that student, teacher and reference are folders with a usable config.json, of a served one its sizes."""
    for key, folder in model_paths(config).items():
        if not folder.exists():
            yield Fault(key, f"{key}={folder}: not found; expected a Hugging Face model folder")
        elif not folder.is_dir():
            yield Fault(key, f"{key}={folder}: is a file; expected a Hugging Face model folder")
        elif not (folder / "config.json").is_file():
            hint = f"; {_inside(folder)}" if _inside(folder) else ""
            yield Fault(key, f"{key}={folder}: config.json not found there; expected a Hugging Face model folder{hint}")
        else:
            try:
                read_model(config, key, folder)
            except ModelError as error:
                yield Fault(key, str(error))


def _inside(folder: Path) -> str:
    """Return a hint for a folder that is a checkpoint or has a model one level below; "" for other folders."""
    if (folder / INFO_FILE).is_file():
        return "it is a checkpoint: `tropd convert mcore-to-hf` makes a model folder of it"
    try:
        models = sorted(child for child in folder.iterdir() if (child / "config.json").is_file())
    except OSError:
        return ""
    return f"did you mean {models[0]}?" if models else ""


def data_files(config: Config) -> Iterator[Fault]:
    """Check that the prompts are a file, and also the teacher responses if the run reads them."""
    prompts, responses = config.data.prompts, config.data.teacher_responses
    if (problem := file_problem(prompts)) is not None:
        yield Fault("data.prompts", f"data.prompts={prompts}: {problem}; expected a JSONL file")
    if responses is None or not reads_responses(config) or (problem := file_problem(responses)) is None:
        return
    if responses.exists():
        yield Fault("data.teacher_responses", f"data.teacher_responses={responses}: {problem}; expected a JSONL file")
        return
    yield Fault(
        "data.teacher_responses",
        f"data.teacher_responses={responses}: not yet made; run `tropd prefixes` with the same arguments first"
        + (", or set objective.guidance.enabled=false" if _guided_alone(config) else ""),
        level="not yet made",
    )


def _guided_alone(config: Config) -> bool:
    """Whether the run has one objective, which reads responses for its guidance only."""
    return len(config.objective.parts) == 1 and config.objective.samples


def held_out_files(config: Config) -> Iterator[Fault]:
    """Check that the held-out prompts and their responses are files."""
    if config.held_out is None:
        return
    files = {"held_out.prompts": config.held_out.prompts, "held_out.responses": config.held_out.responses}
    for key, path in files.items():
        if (problem := file_problem(path)) is not None:
            how = "; `tropd prefixes` writes it" if key == "held_out.responses" else ""
            yield Fault(key, f"{key}={path}: {problem}; expected a JSONL file{how}")


def prompt_lines(config: Config) -> Iterator[Fault]:
    """Check the prompt file itself if a model folder is faulty, because the full check needs a tokenizer."""
    if next(model_folders(config), None) is None or file_problem(config.data.prompts) is not None:
        return
    try:
        read_prompt_file(config.data.prompts)
    except DataError as error:
        yield from (Fault("data.prompts", line) for line in str(error).splitlines())


def file_problem(path: Path) -> str | None:
    """Return why `path` is not a readable file; None if it is."""
    if path.is_dir():
        return "is a folder"
    if not path.exists():
        return "not found"
    return None if os.access(path, os.R_OK) else "cannot be read (permission)"


def run_directory(config: Config) -> Iterator[Fault]:
    """Check that the run directory, or the nearest existing folder above it, can be written."""
    if (problem := folder_problem(config.run.dir)) is not None:
        yield Fault("run.dir", f"run.dir={config.run.dir}: {problem}; choose another run.dir")


def weights_folders(config: Config) -> Iterator[Fault]:
    """Check that the folders through which weights reach servers exist and can be written."""
    for key, server in rollout_servers(config).items():
        if (folder := server.weights_folder) is None:
            continue
        problem = folder_problem(folder) if folder.exists() else "not found"
        if problem is not None:
            yield Fault(
                f"{key}.weights_folder",
                f"{key}.weights_folder={folder}: {problem}; expected a folder that this machine and the server see",
            )


def folder_problem(path: Path) -> str | None:
    """Return why the folder `path` cannot be written or created; None if it can be."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        return f"{existing} is a file" if existing != path else "is a file"
    if existing.resolve().parts[:2] in (("/", "proc"), ("/", "sys")):
        return f"{existing} belongs to the kernel, which keeps no files there"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written"
    return None


def starting_points(config: Config) -> Iterator[Fault]:
    """Check that the checkpoint that a run starts from and the run that it replays exist."""
    begins, replay = config.run.init_from, config.run.replay
    has_own = any(config.run.dir.glob(f"checkpoints/step_*/{INFO_FILE}"))
    if begins is not None and not has_own and not begins.is_dir():
        yield Fault(
            "run.init_from",
            f"run.init_from={begins}: no such folder; expected a checkpoint folder <run.dir>/checkpoints/step_<n>",
        )
    if replay is None:
        return
    if not replay.is_dir():
        yield Fault("run.replay", f"run.replay={replay}: no such folder; expected the run directory of another run")
    elif not (replay / "rollouts").is_dir():
        yield Fault("run.replay", f"run.replay={replay}: no rollouts/ in it; expected the run directory of another run")
