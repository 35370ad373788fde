"""`tropd eval`: accuracy of a model on prompts with answers, with its interval, and the difference to another result.

Not for training metrics. Invariants: lengths, temperature, server and verifier are those of the configuration, so that
results of one configuration can be compared; the server is started for the call and serves nothing but the model.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_config_arguments, natural, positive
from tropd_mcore.cli.template_date import template_date
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tropd_mcore.evaluation.evaluate import EvaluationResult, EvaluationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL; every line has an answer")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: <run.dir>/export)")
    parser.add_argument("--samples", type=natural, default=4, metavar="N", help="sampled answers a prompt (4)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the result as JSON; not evaluated again if there"
    )
    parser.add_argument(
        "--compare-with",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="print the difference to a result",
    )
    parser.add_argument("--url", help="base URL of a server that already serves the model")


def run(options: argparse.Namespace) -> int:
    """Evaluate, and print one line for the model and one for each comparison. Raises TropdError."""
    config, _ = load(options.config, options.overrides)
    if config.verifier.kind == "none":
        raise ConfigError(["tropd eval: verifier.kind is none; set verifier.kind to exact_match or math_verify"])
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens
    from tropd_mcore.evaluation.evaluate import EvaluationSettings, compare, describe, load_result

    others = [load_result(path) for path in options.compare_with]
    model = options.model or config.run.dir / "export"
    if not model.is_dir():
        raise DataError(f"tropd eval: no model folder at {model}; give --model, or train to the end for an export")
    ends = end_tokens(config, Renderer(config.student.path), config.teacher.path)
    settings = EvaluationSettings(
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
    today = template_date(config)
    result = _stored(options.out, model, settings, today)
    if result is None:
        result = _evaluate(model, settings, config, options.url, today)
        if options.out is not None:
            result.save(options.out)
    print(describe(result))
    for other in others:
        change = compare(other, result)
        print(
            f"{result.model} - {other.model}: greedy {change['difference']:+.1%} "
            f"[{change['low']:+.1%}, {change['high']:+.1%}]"
        )
    return 0


def _stored(out: Path | None, model: Path, settings: EvaluationSettings, today: date) -> EvaluationResult | None:
    """The result in `out` where it is of this model folder, these prompts and settings."""
    from tropd_mcore.evaluation.evaluate import load_result
    from tropd_mcore.weights.digest import data_digest, folder_digest

    if out is None or not out.is_file():
        return None
    found = load_result(out)
    same = found.settings == settings and found.model == str(model)
    same = same and found.prompts_sha256 == data_digest(Path(settings.prompts), key="--prompts").sha256
    same = same and found.model_sha256 == folder_digest(model).whole()
    return found if same and found.template_date in (None, today.isoformat()) else None


def _evaluate(
    model: Path, settings: EvaluationSettings, config: Config, url: str | None, today: date
) -> EvaluationResult:
    from tropd_mcore.cli.server import open_server
    from tropd_mcore.data.tokenizer_gate import check_tokenizer
    from tropd_mcore.evaluation.evaluate import evaluate
    from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
    from tropd_mcore.teacher.identity import check_serves

    if config.gates.tokenizer:
        check_tokenizer(model, key="--model")
    server = open_server(
        "evaluation",
        key="rollout.server",
        model_key="--model",
        model=model,
        dtype=config.student.dtype,
        config=config.rollout.server.model_copy(update={"url": url, "port": None}),
        platform=config.platform,
        logs=config.run.dir / "logs",
    )
    with server:
        if config.gates.tokenizer:
            check_served_tokenizer(server, model)
        if url is not None and config.gates.model_reading:
            check_serves(server.client, model, key="--model", url_key="--url")
        return evaluate(model, server.client.generate, settings, today=today)
