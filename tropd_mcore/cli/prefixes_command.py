"""`tropd prefixes`: the teacher answers every prompt once. Guidance takes its prefixes from these responses.

Several teachers answer one after the other, each the prompts that name it. The command does not train. Invariants: a
served teacher is checked before and after to be the one that training would use. Prompts are rendered with the
student's template, as in training. The file is complete or absent, and an interrupted call continues where it stopped.
Responses made with another teacher, other prompts or other sampling are neither kept nor added to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.cli.early_checks import api_key, input_file, model_folder, output_file, refuse, server_package
from tropd_mcore.cli.server_settings import add_server_argument, all_changed, names, started_here
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.derived import rollout_servers
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.teachers import TeacherSection, folders_of, names_of, teachers_of
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import writing
from tropd_mcore.progress import report_every

if TYPE_CHECKING:
    from tropd_mcore.data.end_tokens import EndTokens
    from tropd_mcore.data.prompts import PromptSet
    from tropd_mcore.rollout.prefixes import ResponseReport, ResponseSampling
    from tropd_mcore.rollout.response_origin import ResponseOrigin
    from tropd_mcore.types import Prompt
    from tropd_mcore.weights.digest import FolderDigest

TITLE = "the teacher's server (settings of rollout.server)"
"""Name, in messages, of the server that is started if the teacher of the configuration runs in the training job."""
TITLE_OF = "the server of teacher {name} (settings of rollout.server)"
"""The same for one of several teachers."""


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
    servers = {
        teacher.key: all_changed(teacher_settings(config, teacher), options.server) for teacher in teachers_of(config)
    }
    report_every(config.monitor.progress_every_s)
    out: Path | None = options.out or config.data.teacher_responses
    if out is None:
        raise ConfigError(["tropd prefixes: no file to write; set data.teacher_responses or give --out"])
    _check_files(config, out, "--out" if options.out is not None else "data.teacher_responses")
    _check_url(config, names(options.server))
    plan = _plan(config, options, out)
    if plan is None:
        return 0
    for work in plan.works:
        for server in servers[work.teacher.key]:
            refuse(server_package(_section(work.teacher), server), api_key(f"{work.teacher.key}.server", server))
    report = _sample(config, out, plan, servers, names(options.server))
    print(
        f"{out}: {report.prompts} responses, {report.sampled} sampled now, {report.finished} ended by themselves, "
        f"{report.prompts - report.finished} were cut (longest {options.max_new_tokens} tokens)"
    )
    return 0


def _section(teacher: TeacherSection) -> str:
    """The section with the settings of a teacher's server (see `teacher_settings`)."""
    return f"{teacher.key}.server" if teacher.served else "rollout.server"


@dataclass(frozen=True)
class _Work:
    """What to sample of one teacher, and how."""

    teacher: TeacherSection
    prompts: list[Prompt]
    sampling: ResponseSampling
    origin: ResponseOrigin
    """What determines the responses of this call"""


@dataclass(frozen=True)
class _Plan:
    """What to sample of all teachers."""

    works: list[_Work]
    """Of each teacher with missing responses"""
    origins: list[ResponseOrigin]
    """What determines the responses of each teacher"""
    prompts: list[Prompt]
    """All prompts"""
    recorded: ResponseOrigin | None
    """The origin of the responses in the file"""
    answered: Collection[str]
    """Ids of the prompts that have a response already"""


def _check_files(config: Config, out: Path, option: str) -> None:
    """Raise ConfigError with all problems of files and folders, before anything heavy is imported."""
    refuse(
        model_folder("student.path", config.student.path),
        *(model_folder(teacher.path_key, teacher.path) for teacher in teachers_of(config)),
        input_file("data.prompts", config.data.prompts, "a JSONL file"),
        output_file(option, out),
    )


def _check_url(config: Config, given: set[str]) -> None:
    """Raise ConfigError if `--server` names one running server and there are several teachers."""
    if "url" in given and len(teachers_of(config)) > 1:
        urls = ", ".join(f"{teacher.key}.server.url" for teacher in teachers_of(config))
        raise ConfigError(
            [
                f"--server url names one server, and the configuration has the teachers {', '.join(names_of(config))}; "
                f"set {urls} of those with kind=sglang instead"
            ]
        )


def _plan(config: Config, options: argparse.Namespace, out: Path) -> _Plan | None:
    """What to do; None, with a line on stdout, if all responses exist already. Raises DataError, ConfigError."""
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens
    from tropd_mcore.data.prompts import PromptNeeds, load_prompts
    from tropd_mcore.data.responses import read_responses
    from tropd_mcore.data.tokenizer_gate import check_tokenizer
    from tropd_mcore.rollout.prefixes import stored_responses
    from tropd_mcore.rollout.response_origin import check_origin, load_origin
    from tropd_mcore.weights.served import read_vocab_size

    if config.gates.tokenizer:
        check_tokenizer(config.student.path, key="student.path")
        for teacher in teachers_of(config):
            check_tokenizer(teacher.path, key=teacher.path_key)
    excluded = {teacher.key: _excluded(config, teacher) for teacher in teachers_of(config)}
    renderer = Renderer(config.student.path)
    ends = end_tokens(config, renderer, folders_of(config))
    stored, recorded = stored_responses(out).keys(), load_origin(out)
    prompt_set = load_prompts(
        config.data.model_copy(update={"teacher_responses": None}),
        renderer,
        seed=config.run.seed,
        needs=PromptNeeds(vocab_size=read_vocab_size(config.student.path), teachers=names_of(config)),
        today=template_date(config, recorded.day if recorded is not None and stored else None),
    )
    works = [
        _work(config, options, teacher, prompt_set, ends, excluded[teacher.key]) for teacher in teachers_of(config)
    ]
    answered = stored & {prompt.prompt_id for prompt in prompt_set.prompts}
    for work in works:
        check_origin(out, recorded, work.origin, answered & work.origin.prompts.keys())
    ids = {prompt.prompt_id for prompt in prompt_set.prompts}
    if out.is_file() and ids <= read_responses(out, ends.ids).keys():
        print(f"{out}: all {len(prompt_set.prompts)} responses exist already")
        return None
    origins = [work.origin for work in works]
    missing = [work for work in works if not work.origin.prompts.keys() <= answered]
    return _Plan(missing or works[:1], origins, prompt_set.prompts, recorded, answered)


def _excluded(config: Config, teacher: TeacherSection) -> tuple[int, ...]:
    """The ids of tokens that only this teacher has. Raises DataError if its vocabulary is another one."""
    from tropd_mcore.teacher.vocabulary import check_same_vocabulary

    allow_extra = teacher.config.extra_tokens == "exclude"
    return check_same_vocabulary(config.student.path, teacher.path, key=teacher.path_key, allow_extra=allow_extra)


def _work(
    config: Config,
    options: argparse.Namespace,
    teacher: TeacherSection,
    prompts: PromptSet,
    ends: EndTokens,
    excluded: tuple[int, ...],
) -> _Work:
    from tropd_mcore.data.end_tokens import served_end_ids
    from tropd_mcore.rollout.prefixes import ResponseSampling
    from tropd_mcore.teacher.vocabulary import read_vocabulary
    from tropd_mcore.weights.served import read_vocab_size

    end_ids = served_end_ids(ends.ids, teacher.path)
    sampling = ResponseSampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        eos_ids=end_ids,
        vocab_size=max(read_vocabulary(config.student.path).values()) + 1,
        served_width=read_vocab_size(teacher.path),
        excluded=frozenset(excluded),
    )
    mine = [prompt for prompt in prompts.prompts if prompt.teacher == teacher.name]
    return _Work(teacher, mine, sampling, _origin(config, options, teacher, prompts, mine, end_ids))


def _sample(
    config: Config, out: Path, plan: _Plan, servers: dict[str, list[ServerConfig]], given: set[str]
) -> ResponseReport:
    """Sample from each teacher in turn, and write the file when all of them have answered.

    Raises ServerError, GateError, DataError. Responses sampled until then are kept.
    """
    from tropd_mcore.rollout.prefixes import attempts_of, write_complete
    from tropd_mcore.rollout.response_origin import save_origin

    sampled = 0
    for number, work in enumerate(plan.works):
        with _server(config, work.teacher, servers[work.teacher.key], given) as ask:
            if not number:
                save_origin(out, plan.recorded, plan.origins, plan.answered)
            sampled += ask(work, out)
    return write_complete(plan.prompts, out, sampled=sampled, attempts=attempts_of(plan.works[0].sampling))


@contextmanager
def _server(
    config: Config, teacher: TeacherSection, settings: list[ServerConfig], given: set[str]
) -> Iterator[Callable[[_Work, Path], int]]:
    """Open servers of the teacher with these `settings`, whose keys `given` were set with `--server`.

    Yields what samples. The identity of the teacher is checked before and after. Raises ServerError, GateError.
    """
    from tropd_mcore.cli.server import open_servers
    from tropd_mcore.rollout.prefixes import sample_missing
    from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
    from tropd_mcore.teacher.identity_check import TeacherIdentity

    name = "" if teacher.name is None else f"-{teacher.name}"
    title = TITLE if teacher.name is None else TITLE_OF.format(name=teacher.name)
    servers = open_servers(
        f"prefixes{name}",
        key=_section(teacher),
        title=None if teacher.served else title,
        model_key=teacher.path_key,
        model=teacher.path,
        dtype=teacher.config.dtype,
        configs=settings,
        platform=config.platform,
        logs=config.run.dir / "logs",
        given=given,
    )
    with servers:
        if config.gates.tokenizer:
            for server in servers.each:
                check_served_tokenizer(server, teacher.path)
        identity = None
        if teacher.served and config.gates.teacher_identity:
            identity = TeacherIdentity(servers, config, teacher.name)
            identity.check_start()

        def ask(work: _Work, out: Path) -> int:
            return sample_missing(servers, work.prompts, out, work.sampling)

        yield ask
        if identity is not None:
            identity.check_now()


def _origin(
    config: Config,
    options: argparse.Namespace,
    teacher: TeacherSection,
    prompts: PromptSet,
    mine: list[Prompt],
    end_ids: tuple[int, ...],
) -> ResponseOrigin:
    """What determines the responses of this call to the prompts of one teacher."""
    from tropd_mcore.rollout.response_origin import ResponseOrigin, prompt_digests

    return ResponseOrigin(
        teacher=str(teacher.path),
        files=dict(_teacher_files(config, teacher).files),
        dtype=teacher.computes_in,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        end_ids=end_ids,
        day=prompts.printed_date,
        prompts=prompt_digests(mine),
    )


def _teacher_files(config: Config, teacher: TeacherSection) -> FolderDigest:
    """The digests of the teacher's folder. Those of large files are cached in the run directory, as in training."""
    from tropd_mcore.records.run_dir import RunDir
    from tropd_mcore.weights.digest import folder_digest, load_memory

    place = RunDir(config.run.dir).digests
    memory = load_memory(place)
    known = dict(memory.known)
    found = folder_digest(teacher.path, memory)
    if memory.known != known:
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        memory.save(place)
    return found


def teacher_settings(config: Config, teacher: TeacherSection) -> list[ServerConfig]:
    """Settings of the servers of a teacher: those of its section, or, for a teacher in the training job, those of the
    rollout servers on the first node, started for this call."""
    if teacher.served:
        return list(teacher.servers.values())
    return started_here(rollout_servers(config).values())
