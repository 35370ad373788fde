"""`tropd prefixes`: the teacher answers every prompt once, and its responses become the prefixes of guidance.

Not for training. Invariants: a served teacher is the one that training would take, before and after; prompts are
rendered with the student's template, as in training; the file is whole or absent, and an interrupted call goes on where
it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import ConfigError


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
    from tropd_mcore.rollout.prefixes import ResponseSampling, generate_responses
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
    prompts = load_prompts(data, renderer, seed=config.run.seed, needs=needs, today=template_date(config)).prompts
    if out.is_file() and {prompt.prompt_id for prompt in prompts} <= read_responses(out, ends.ids).keys():
        print(f"{out}: all {len(prompts)} responses are there")
        return 0
    sampling = ResponseSampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        eos_ids=served_end_ids(ends.ids, config.teacher.path),
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
        report = generate_responses(server.client, prompts, out, sampling)
        if identity is not None:
            identity.check_now()
    print(
        f"{out}: {report.prompts} responses, {report.sampled} sampled now, {report.finished} ended by themselves, "
        f"{report.prompts - report.finished} were cut (longest {options.max_new_tokens} tokens)"
    )
    return 0


def teacher_server(config: Config) -> ServerConfig:
    """The server that answers for the teacher: its own section, or, for a teacher in the training job, one like the
    students' that is started for this call."""
    if config.teacher.kind == "sglang":
        return config.teacher.server
    return config.rollout.server.model_copy(update={"url": None, "port": None, "dtype": None})
