"""`tropd prefixes`: the teacher answers every prompt once, and its responses become the prefixes of guidance.

Not for training. Invariants: a served teacher is the one that training would take, before and after; prompts are
rendered with the student's template, as in training; the file is whole or absent, and an interrupted call goes on where
it stopped; responses that were made otherwise (teacher, prompts, sampling) are neither kept nor added to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.derived import teacher_dtype
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import ConfigError

if TYPE_CHECKING:
    from tropd_mcore.data.prompts import PromptSet
    from tropd_mcore.rollout.response_origin import ResponseOrigin
    from tropd_mcore.weights.digest import FolderDigest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSONL to write (default: data.teacher_responses)")
    parser.add_argument("--max-new-tokens", type=positive, default=8192, metavar="N", help="longest response (8192)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature (1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass (1.0)")


def run(options: argparse.Namespace) -> int:
    """Sample what is missing and write the file. Raises TropdError."""
    config, _ = load(options.config, options.overrides)
    out: Path | None = options.out or config.data.teacher_responses
    if out is None:
        raise ConfigError(["tropd prefixes: no file to write; set data.teacher_responses or give --out"])

    from tropd_mcore.cli.server import open_server
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens, served_end_ids
    from tropd_mcore.data.prompts import PromptNeeds, load_prompts
    from tropd_mcore.data.responses import read_responses
    from tropd_mcore.data.tokenizer_gate import check_tokenizer
    from tropd_mcore.rollout.prefixes import ResponseSampling, generate_responses, stored_responses
    from tropd_mcore.rollout.response_origin import check_origin, load_origin, save_origin
    from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
    from tropd_mcore.teacher.vocabulary import check_same_vocabulary, read_vocabulary, read_width
    from tropd_mcore.train.teacher_identity import TeacherIdentity

    if config.gates.tokenizer:
        check_tokenizer(config.student.path, key="student.path")
        check_tokenizer(config.teacher.path, key="teacher.path")
    allow_extra = config.teacher.extra_tokens == "exclude"
    excluded = check_same_vocabulary(config.student.path, config.teacher.path, allow_extra=allow_extra)
    renderer = Renderer(config.student.path)
    ends = end_tokens(config, renderer, config.teacher.path)
    data = config.data.model_copy(update={"teacher_responses": None})
    needs = PromptNeeds(vocab_size=read_width(config.student.path))
    stored, recorded = stored_responses(out).keys(), load_origin(out)
    day = template_date(config, recorded.day if recorded is not None and stored else None)
    prompt_set = load_prompts(data, renderer, seed=config.run.seed, needs=needs, today=day)
    prompts = prompt_set.prompts
    end_ids = served_end_ids(ends.ids, config.teacher.path)
    origin = _origin(config, options, prompt_set, end_ids)
    answered = stored & origin.prompts.keys()
    check_origin(out, recorded, origin, answered)
    if out.is_file() and origin.prompts.keys() <= read_responses(out, ends.ids).keys():
        print(f"{out}: all {len(prompts)} responses are there")
        return 0
    sampling = ResponseSampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        eos_ids=end_ids,
        vocab_size=max(read_vocabulary(config.student.path).values()) + 1,
        served_width=read_width(config.teacher.path),
        excluded=frozenset(excluded),
    )
    check_identity = config.teacher.kind == "sglang" and config.gates.teacher_identity
    server = open_server(
        "teacher",
        key="teacher.server" if config.teacher.kind == "sglang" else "rollout.server",
        model_key="teacher.path",
        model=config.teacher.path,
        dtype=config.teacher.dtype,
        config=teacher_server(config),
        platform=config.platform,
        logs=config.run.dir / "logs",
    )
    with server:
        if config.gates.tokenizer:
            check_served_tokenizer(server, config.teacher.path)
        identity = TeacherIdentity(server, config) if check_identity else None
        if identity is not None:
            identity.check_start()
        save_origin(out, recorded, origin, answered)
        report = generate_responses(server.client, prompts, out, sampling)
        if identity is not None:
            identity.check_now()
    print(
        f"{out}: {report.prompts} responses, {report.sampled} sampled now, {report.finished} ended by themselves, "
        f"{report.prompts - report.finished} were cut (longest {options.max_new_tokens} tokens)"
    )
    return 0


def _origin(
    config: Config, options: argparse.Namespace, prompts: PromptSet, end_ids: tuple[int, ...]
) -> ResponseOrigin:
    """What decides the responses of this call."""
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
    """The digests of the teacher's folder; those of large files are remembered in the run directory, as in training."""
    from tropd_mcore.train.run_dir import RunDir
    from tropd_mcore.weights.digest import folder_digest, load_memory

    place = RunDir(config.run.dir).digests
    memory = load_memory(place)
    known = dict(memory.known)
    found = folder_digest(config.teacher.path, memory)
    if memory.known != known:
        place.parent.mkdir(parents=True, exist_ok=True)
        memory.save(place)
    return found


def teacher_server(config: Config) -> ServerConfig:
    """The server that answers for the teacher: its own section, or, for a teacher in the training job, one like the
    students' that is started for this call."""
    if config.teacher.kind == "sglang":
        return config.teacher.server
    return config.rollout.server.model_copy(update={"url": None, "port": None, "dtype": None})
