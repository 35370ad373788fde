"""Records the inputs of a launch by content: digests of data files and model folders, versions, the number of ranks.

This module does not decide what may differ between two launches (`train.resume`). Invariants: <run.dir>/inputs.json
records accepted launches only. Every rank has the same digests. The ranks share the reading of files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

import tropd_mcore
from tropd_mcore.config.derived import model_paths, reads_responses
from tropd_mcore.config.schema import Config
from tropd_mcore.config.teachers import the_teacher
from tropd_mcore.errors import ConfigError, ModelError
from tropd_mcore.files import file_digest, publish_text
from tropd_mcore.mcore.collective import gather_on_rank_zero, on_rank_zero, raise_on_all_ranks
from tropd_mcore.progress import progress
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.serving.interpreter import ask
from tropd_mcore.train.ground import Ground
from tropd_mcore.train.preflight_machine import one_per_interpreter
from tropd_mcore.weights.digest import (
    DigestMemory,
    Fingerprint,
    FolderDigest,
    data_digest,
    load_memory,
    model_files,
    read_files,
)

if TYPE_CHECKING:
    from tropd_mcore.train.components import JobContext

log = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "sglang")
"""Distributions whose versions affect the numbers of a run."""

Read = tuple[Path, Fingerprint, str]
"""A file that was read: path, fingerprint (size and times), SHA-256."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class DataInput(_Record):
    """A data file."""

    path: str
    sha256: str
    lines: int


class ModelInput(_Record):
    """A model folder."""

    path: str
    files: dict[str, str]
    """{name in the folder: SHA-256}"""

    @property
    def digest(self) -> FolderDigest:
        """The digests of the folder's files."""
        return FolderDigest(self.files)


class Beginning(_Record):
    """The checkpoint that a run started from."""

    path: str
    step: int
    sha256: str
    """Digest of its tropd.json."""
    with_optimizer: bool


class Inputs(_Record):
    """All inputs of a launch."""

    data: dict[str, DataInput]
    """By configuration key"""
    models: dict[str, ModelInput]
    """By configuration key"""
    code: dict[str, str] = {}
    """{configuration key: SHA-256 of the source file that it names}"""
    launch: dict[str, str] = {}
    """Versions, platform and number of ranks"""
    init_from: Beginning | None = None
    """None if the run started from the weights of student.path."""


def read_inputs(context: JobContext) -> Inputs:
    """Compute the digest of every input of this launch. Collective; raises DataError and ModelError.

    Cost: files whose digests are not remembered are read in full. The ranks share the files, at about 1 GiB per second
    per rank, or as fast as the disk reads.
    """
    layout = context.layout
    control = layout.groups.control
    wanted = on_rank_zero(partial(_unread, context), control)
    with progress(log, f"reading {len(wanted)} files of model folders for their digests"):
        mine: list[Read] = []
        with raise_on_all_ranks(control):
            mine = read_files(wanted[layout.rank :: layout.world_size])
        read = gather_on_rank_zero(mine, control)
        launch = {"ranks": str(layout.world_size), "platform": context.platform.name}
        return on_rank_zero(lambda: _remembered(context, launch, [entry for part in read for entry in part]), control)


def read_inputs_alone(ground: Ground, *, ranks: int | None, platform: str) -> Inputs:
    """Return the result of `read_inputs`, read by this process alone. Nothing is written. Raises DataError, ModelError.

    If `ranks` is None, the number of ranks is taken from the previous launch.
    """
    wanted = _unread(ground)
    with progress(log, f"reading {len(wanted)} files of model folders for their digests"):
        read = read_files(wanted)
    if ranks is None:
        recorded = load_inputs(ground.run_dir)
        launch = {"ranks": recorded.launch["ranks"]} if recorded is not None and "ranks" in recorded.launch else {}
    else:
        launch = {"ranks": str(ranks)}
    return _compose(ground, {**launch, "platform": platform}, read, load_memory(ground.run_dir.digests))


def load_inputs(run_dir: RunDir) -> Inputs | None:
    """Return the record of the previous launch; None if there is none. Raises ConfigError if it is damaged."""
    path = run_dir.inputs
    if not path.exists():
        return None
    try:
        return Inputs.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise ConfigError(
            [f"{path}: the record of the run's inputs is damaged ({reason}); restore it, or remove it to skip the "
             "comparison of contents"]
        ) from error  # fmt: skip


def save_inputs(run_dir: RunDir, inputs: Inputs) -> None:
    """Publish the record. Raises DataError if it cannot be written."""
    publish_text(run_dir.inputs, inputs.model_dump_json(indent=1) + "\n")


def teacher_name(config: Config, inputs: Inputs, identity: str = "", *, candidates: int | None = None) -> str:
    """Return text that distinguishes the scores of different teachers; it does not depend on the teacher's path.

    `config` has one teacher (`config.teachers.alone`). `identity` is the identity of the server if a server scores (see
    `teacher.identity`). `candidates` is the number of candidates per token; None = as many as the objective needs.
    """
    section = the_teacher(config)
    teacher = section.config
    parts = {
        "kind": teacher.kind,
        "folder": inputs.models[section.path_key].digest.whole(),
        "dtype": section.computes_in,
        "candidates": config.objective.teacher_topk if candidates is None else candidates,
        "softcap": config.loss.logit_softcap,
        "extra_tokens": teacher.extra_tokens,
        "server": identity or None,
    }
    return " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _files(ground: Ground) -> dict[str, list[Path]]:
    """Return {configuration key: files} of every model folder."""
    return {key: [path / name for name in model_files(path)] for key, path in model_paths(ground.config).items()}


def _unread(ground: Ground) -> list[Path]:
    """Return the files without a remembered digest, each once, the largest first so the ranks' shares are similar."""
    memory = load_memory(ground.run_dir.digests)
    try:
        paths = {path.resolve() for files in _files(ground).values() for path in files}
        unknown = [(path.stat().st_size, path) for path in paths if memory.recall(path) is None]
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return [path for _, path in sorted(unknown, reverse=True)]


def _remembered(ground: Ground, launch: dict[str, str], read: list[Read]) -> Inputs:
    """Compose the record from the files that all ranks read and the remembered digests, and remember both."""
    memory = load_memory(ground.run_dir.digests)
    found = _compose(ground, launch, read, memory)
    memory.remember(read)
    memory.forget_all_but({str(path.resolve()) for paths in _files(ground).values() for path in paths})
    memory.save(ground.run_dir.digests)
    return found


def _compose(ground: Ground, launch: dict[str, str], read: list[Read], memory: DigestMemory) -> Inputs:
    config = ground.config
    now = {str(path): digest for path, _, digest in read}
    files = _files(ground)
    models = {
        key: ModelInput(
            path=str(folder),
            files={path.relative_to(folder).as_posix(): _digest(path, now, memory) for path in files[key]},
        )
        for key, folder in model_paths(config).items()
    }
    paths, responses = {"data.prompts": config.data.prompts}, config.data.teacher_responses
    # A file that the run does not read may be missing. If it exists, its changes are reported.
    if responses is not None and (reads_responses(config) or responses.is_file()):
        paths["data.teacher_responses"] = responses
    return Inputs(
        data={key: _data_input(key, path) for key, path in paths.items()},
        models=models,
        code=_code(config),
        launch={**launch, **installed_versions(), **_server_versions(config)},
    )


def _digest(path: Path, now: dict[str, str], memory: DigestMemory) -> str:
    digest = now.get(str(path.resolve())) or memory.recall(path)
    if digest is None:
        raise ModelError(f"{path}: changes while it is read; start the run when it is complete")
    return digest


def _data_input(key: str, path: Path) -> DataInput:
    found = data_digest(path, key=key)
    return DataInput(path=str(path), sha256=found.sha256, lines=found.lines)


def _code(config: Config) -> dict[str, str]:
    """Return the digest of the source file of each custom objective, if Python can find that file."""
    found: dict[str, str] = {}
    parts = config.objective.parts
    for place, part in enumerate(parts):
        if part.function_path is None:
            continue
        spec = importlib.util.find_spec(part.function_path.partition(":")[0])
        if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
            key = "objective" if len(parts) == 1 else f"objective.phases.{place}.objective"
            found[f"{key}.function"] = file_digest(Path(spec.origin))
    return found


def _server_versions(config: Config) -> dict[str, str]:
    """Return {section and package: version} of the started servers that have an interpreter of their own."""
    found: dict[str, str] = {}
    for section, server in one_per_interpreter(config).items():
        if server.python is not None:
            there = ask(server.python, key=f"{section}.python")
            found |= {f"{section}: sglang": there.sglang, f"{section}: torch": there.torch or "none"}
    return found


def installed_versions() -> dict[str, str]:
    """Return {package: version} of this package and of those that a run depends on, if they are installed."""
    found = {"tropd_mcore": tropd_mcore.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
