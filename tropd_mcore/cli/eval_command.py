"""`tropd eval`: accuracy of a model on prompts with answers, with its interval, and the difference to another result.

It computes no training metrics. Invariants: lengths, temperature, server and verifier are those of the configuration,
so results of one configuration can be compared. The server is started for this call and serves only this model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_config_arguments, natural, positive
from tropd_mcore.cli.early_checks import (
    api_key,
    input_file,
    model_folder,
    output_file,
    refuse,
    server_package,
    verifier_package,
)
from tropd_mcore.cli.server_settings import add_server_argument, all_changed, names, started_here
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.derived import phase_configs, rollout_servers
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.config.teachers import folders_of, teachers_of
from tropd_mcore.errors import DataError
from tropd_mcore.progress import report_every

if TYPE_CHECKING:
    from tropd_mcore.evaluation.evaluate import EvaluationResult, EvaluationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file of prompts; every line needs an `answer`",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: <run.dir>/export)")
    parser.add_argument(
        "--samples", type=natural, default=4, metavar="N", help="number of sampled answers per prompt (4)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the result as JSON; if it is there already, it is not evaluated again",
    )
    parser.add_argument(
        "--compare-with",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="print the difference to an earlier result; may be repeated",
    )
    parser.add_argument(
        "--url", action="append", help="base URL of a server that already serves the model; may be repeated"
    )
    add_server_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate, then print one line for the model and one for each comparison. Raises TropdError.

    Problems of files and options are found before a server is started.
    """
    config, _ = load(options.config, options.overrides)
    servers = all_changed(_own_servers(config, options.url), options.server)
    report_every(config.monitor.progress_every_s)
    model = options.model or config.run.dir / "export"
    _check_options(config, options, model)
    from tropd_mcore.config.hints import of_evaluation
    from tropd_mcore.evaluation.evaluate import compare, describe, load_result, read_prompts

    others = [load_result(path) for path in options.compare_with]
    settings, today = _settings(config, options), template_date(config)
    read_prompts(model, settings, today)
    result = _stored(options.out, model, settings, today)
    if result is None:
        for server in servers:
            refuse(server_package("rollout.server", server), api_key("rollout.server", server))
        for other in others:
            _check_comparable(other, settings)
        result = _evaluate(model, settings, config, servers, names(options.server), today)
        if options.out is not None:
            result.save(options.out)
    print(describe(result))
    if result.sampled is not None and options.model is None:  # the student that this configuration trained
        for line in of_evaluation(result.greedy.accuracy, result.sampled.accuracy, phase_configs(config)[-1]):
            print(line)
    for other in others:
        change = compare(other, result)
        print(
            f"{result.model} - {other.model}: greedy {change['difference']:+.1%} "
            f"[{change['low']:+.1%}, {change['high']:+.1%}]{_sampled(change)}"
        )
    return 0


def _sampled(change: dict[str, float]) -> str:
    """The difference of the sampled accuracies, if both results have it."""
    if "sampled_difference" not in change:
        return ""
    low, high = change["sampled_low"], change["sampled_high"]
    return f"; sampled {change['sampled_difference']:+.1%} [{low:+.1%}, {high:+.1%}]"


def _check_options(config: Config, options: argparse.Namespace, model: Path) -> None:
    """Raise ConfigError with all problems of the command line; nothing heavy is imported."""
    refuse(
        ["tropd eval: verifier.kind is none; set verifier.kind to exact_match or math_verify"]
        if config.verifier.kind == "none"
        else [],
        [f"tropd eval: no model folder at {model}; give --model, or train to the end for an export"]
        if not model.is_dir()
        else model_folder("--model", model),
        input_file("--prompts", options.prompts, "a JSONL file whose lines have an `answer`"),
        output_file("--out", options.out) if options.out is not None else [],
        *(input_file("--compare-with", path, "a result of `tropd eval`") for path in options.compare_with),
        *(model_folder(key, path) for key, path in _tokenizers(config).items()),
        verifier_package(config.verifier.kind),
    )


def _tokenizers(config: Config) -> dict[str, Path]:
    """The folders whose end tokens end an answer."""
    return {"student.path": config.student.path, **{each.path_key: each.path for each in teachers_of(config)}}


def _settings(config: Config, options: argparse.Namespace) -> EvaluationSettings:
    """The settings that determine the answers and their verdicts."""
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens
    from tropd_mcore.evaluation.evaluate import EvaluationSettings

    ends = end_tokens(config, Renderer(config.student.path), folders_of(config))
    return EvaluationSettings(
        prompts=str(options.prompts),
        max_new_tokens=config.rollout.max_new_tokens,
        samples=options.samples,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        verifier=config.verifier.kind,
        pattern=config.verifier.pattern,
        unfinished=config.verifier.unfinished,
        thinking=list(config.verifier.thinking) if config.verifier.thinking is not None else None,
        chat_template_kwargs=config.data.chat_template_kwargs,
        template_date=config.data.template_date.isoformat() if config.data.template_date else None,
        limit=options.limit,
        end_ids=list(ends.ids),
    )


def _check_comparable(other: EvaluationResult, settings: EvaluationSettings) -> None:
    """Raise DataError if the result to compare with was made with other settings."""
    if other.settings != settings:
        theirs, ours = asdict(other.settings), asdict(settings)
        changed = ", ".join(
            f"{key} {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]
        )
        raise DataError(
            f"--compare-with: {other.model} was evaluated with other settings ({changed}); evaluate both again"
        )


def _stored(out: Path | None, model: Path, settings: EvaluationSettings, today: date) -> EvaluationResult | None:
    """The result in `out` if it was made with this model folder, these prompts and settings; else None."""
    from tropd_mcore.evaluation.evaluate import load_result
    from tropd_mcore.weights.digest import data_digest, folder_digest

    if out is None or not out.is_file():
        return None
    found = load_result(out)
    same = found.settings == settings and found.model == str(model)
    same = same and found.prompts_sha256 == data_digest(Path(settings.prompts), key="--prompts").sha256
    same = same and found.model_sha256 == folder_digest(model).whole()
    return found if same and found.template_date in (None, today.isoformat()) else None


def _own_servers(config: Config, urls: Sequence[str] | None) -> list[ServerConfig]:
    """The servers at `--url`, or those of rollout.server, started for this call."""
    if urls:
        return [config.rollout.server.model_copy(update={"url": url, "port": None}) for url in urls]
    return [
        server.model_copy(update={"dtype": config.rollout.server.dtype})
        for server in started_here(rollout_servers(config).values())
    ]


def _evaluate(
    model: Path,
    settings: EvaluationSettings,
    config: Config,
    served: list[ServerConfig],
    given: set[str],
    today: date,
) -> EvaluationResult:
    """Evaluate the model in a folder on servers with the settings `served`, of which `--server` set `given`."""
    from tropd_mcore.cli.server import open_servers
    from tropd_mcore.data.tokenizer_gate import check_tokenizer
    from tropd_mcore.evaluation.evaluate import evaluate
    from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
    from tropd_mcore.teacher.identity import check_serves

    if config.gates.tokenizer:
        check_tokenizer(model, key="--model")
    servers = open_servers(
        "evaluation",
        key="rollout.server",
        model_key="--model",
        model=model,
        dtype=config.student.dtype,
        configs=served,
        platform=config.platform,
        logs=config.run.dir / "logs",
        given=given,
    )
    with servers:
        for server in servers.each:
            if config.gates.tokenizer:
                check_served_tokenizer(server, model)
            if not server.is_started and config.gates.model_reading:
                check_serves(server.client, model, key="--model", url_key="--url")
        return evaluate(model, servers.generate, settings, today=today)
