"""`tropd prefixes`: the teacher answers every prompt once. Guidance takes its prefixes from these responses.

It does not train. Invariants: a served teacher is checked before and after to be the one that training would use.
Prompts are rendered with the student's template, as in training. The file is complete or absent, and an interrupted
call continues where it stopped. Responses made with another teacher, other prompts or other sampling are neither kept
nor added to.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.cli.early_checks import api_key, input_file, model_folder, output_file, refuse, server_package
from tropd_mcore.cli.server_settings import add_server_argument, changed, names
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.derived import teacher_dtype
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import writing
from tropd_mcore.progress import report_every

if TYPE_CHECKING:
    from tropd_mcore.data.prompts import PromptSet
    from tropd_mcore.rollout.prefixes import ResponseReport, ResponseSampling
    from tropd_mcore.rollout.response_origin import ResponseOrigin
    from tropd_mcore.types import Prompt
    from tropd_mcore.weights.digest import FolderDigest

TITLE = "the teacher's server (settings of rollout.server)"
"""Name, in messages, of the server that is started if the teacher of the configuration runs in the training job."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSONL file to write (default: data.teacher_responses)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=8192, metavar="N", help="longest response in tokens (8192)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature (1.0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="probability mass of nucleus sampling (1.0)"
    )
    add_server_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Sample the missing responses and write the file. Raises TropdError."""
    config, _ = load(options.config, options.overrides)
    server = changed(teacher_server(config), options.server)
    report_every(config.monitor.progress_every_s)
    out: Path | None = options.out or config.data.teacher_responses
    if out is None:
        raise ConfigError(["tropd prefixes: no file to write; set data.teacher_responses or give --out"])
    _check_files(config, out, "--out" if options.out is not None else "data.teacher_responses")
    work = _work(config, options, out)
    if work is None:
        return 0
    refuse(server_package(_section(config), server), api_key("teacher.server", server))
    report = _sample(config, out, work, server, names(options.server))
    print(
        f"{out}: {report.prompts} responses, {report.sampled} sampled now, {report.finished} ended by themselves, "
        f"{report.prompts - report.finished} were cut (longest {options.max_new_tokens} tokens)"
    )
    return 0


def _section(config: Config) -> str:
    """The section with the settings of the server (see `teacher_server`)."""
    return "teacher.server" if config.teacher.kind == "sglang" else "rollout.server"


@dataclass(frozen=True)
class _Work:
    """What to sample, and how."""

    prompts: list[Prompt]
    sampling: ResponseSampling
    origin: ResponseOrigin
    """What determines the responses of this call"""
    recorded: ResponseOrigin | None
    """The origin of the responses in the file"""
    answered: Collection[str]
    """Ids of the prompts that have a response already"""


def _check_files(config: Config, out: Path, option: str) -> None:
    """Raise ConfigError with all problems of files and folders, before anything heavy is imported."""
    refuse(
        model_folder("student.path", config.student.path),
        model_folder("teacher.path", config.teacher.path),
        input_file("data.prompts", config.data.prompts, "a JSONL file"),
        output_file(option, out),
    )


def _work(config: Config, options: argparse.Namespace, out: Path) -> _Work | None:
    """What to do; None, with a line on stdout, if all responses exist already. Raises DataError, ConfigError."""
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens, served_end_ids
    from tropd_mcore.data.prompts import PromptNeeds, load_prompts
    from tropd_mcore.data.responses import read_responses
    from tropd_mcore.data.tokenizer_gate import check_tokenizer
    from tropd_mcore.rollout.prefixes import ResponseSampling, stored_responses
    from tropd_mcore.rollout.response_origin import check_origin, load_origin
    from tropd_mcore.teacher.vocabulary import check_same_vocabulary, read_vocabulary
    from tropd_mcore.weights.served import read_vocab_size

    if config.gates.tokenizer:
        check_tokenizer(config.student.path, key="student.path")
        check_tokenizer(config.teacher.path, key="teacher.path")
    allow_extra = config.teacher.extra_tokens == "exclude"
    excluded = check_same_vocabulary(config.student.path, config.teacher.path, allow_extra=allow_extra)
    renderer = Renderer(config.student.path)
    ends = end_tokens(config, renderer, config.teacher.path)
    stored, recorded = stored_responses(out).keys(), load_origin(out)
    prompt_set = load_prompts(
        config.data.model_copy(update={"teacher_responses": None}),
        renderer,
        seed=config.run.seed,
        needs=PromptNeeds(vocab_size=read_vocab_size(config.student.path)),
        today=template_date(config, recorded.day if recorded is not None and stored else None),
    )
    end_ids = served_end_ids(ends.ids, config.teacher.path)
    origin = _origin(config, options, prompt_set, end_ids)
    answered = stored & origin.prompts.keys()
    check_origin(out, recorded, origin, answered)
    if out.is_file() and origin.prompts.keys() <= read_responses(out, ends.ids).keys():
        print(f"{out}: all {len(prompt_set.prompts)} responses exist already")
        return None
    sampling = ResponseSampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        eos_ids=end_ids,
        vocab_size=max(read_vocabulary(config.student.path).values()) + 1,
        served_width=read_vocab_size(config.teacher.path),
        excluded=frozenset(excluded),
    )
    return _Work(prompt_set.prompts, sampling, origin, recorded, answered)


def _sample(config: Config, out: Path, work: _Work, settings: ServerConfig, given: set[str]) -> ResponseReport:
    """Sample from the teacher, whose identity is checked before and after, on a server with these `settings`, whose
    keys `given` were set with `--server`.

    Raises ServerError, GateError, DataError.
    """
    from tropd_mcore.cli.server import open_server
    from tropd_mcore.rollout.prefixes import generate_responses
    from tropd_mcore.rollout.response_origin import save_origin
    from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
    from tropd_mcore.teacher.identity_check import TeacherIdentity

    served = config.teacher.kind == "sglang"
    server = open_server(
        "prefixes",
        key=_section(config),
        title=None if served else TITLE,
        model_key="teacher.path",
        model=config.teacher.path,
        dtype=config.teacher.dtype,
        config=settings,
        platform=config.platform,
        logs=config.run.dir / "logs",
        given=given,
    )
    with server:
        if config.gates.tokenizer:
            check_served_tokenizer(server, config.teacher.path)
        identity = TeacherIdentity(server, config) if served and config.gates.teacher_identity else None
        if identity is not None:
            identity.check_start()
        save_origin(out, work.recorded, work.origin, work.answered)
        report = generate_responses(server.client, work.prompts, out, work.sampling, generate=server.generate)
        if identity is not None:
            identity.check_now()
    return report


def _origin(
    config: Config, options: argparse.Namespace, prompts: PromptSet, end_ids: tuple[int, ...]
) -> ResponseOrigin:
    """What determines the responses of this call."""
    from tropd_mcore.rollout.response_origin import ResponseOrigin, prompt_digests

    return ResponseOrigin(
        teacher=str(config.teacher.path),
        files=dict(_teacher_files(config).files),
        dtype=teacher_dtype(config),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        end_ids=end_ids,
        day=prompts.printed_date,
        prompts=prompt_digests(prompts.prompts),
    )


def _teacher_files(config: Config) -> FolderDigest:
    """The digests of the teacher's folder. Those of large files are cached in the run directory, as in training."""
    from tropd_mcore.records.run_dir import RunDir
    from tropd_mcore.weights.digest import folder_digest, load_memory

    place = RunDir(config.run.dir).digests
    memory = load_memory(place)
    known = dict(memory.known)
    found = folder_digest(config.teacher.path, memory)
    if memory.known != known:
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        memory.save(place)
    return found


def teacher_server(config: Config) -> ServerConfig:
    """Settings of the teacher's server: teacher.server, or, for a teacher in the training job, those of rollout.server
    with a server that is started for this call."""
    if config.teacher.kind == "sglang":
        return config.teacher.server
    return config.rollout.server.model_copy(update={"url": None, "port": None, "dtype": None})
