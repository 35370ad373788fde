"""`tropd eval`: accuracy of one or several models on prompts with answers, with intervals, and their differences.

Not for training metrics. Invariant: all models of one call answer the same prompts with the same settings, each from a
server of its own that serves nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tropd_mcore.cli.arguments import add_server_arguments, positive, server_config
from tropd_mcore.config.schema import PlatformConfig, VerifierConfig
from tropd_mcore.errors import ConfigError

if TYPE_CHECKING:
    from tropd_mcore.evaluation.evaluate import EvaluationResult, EvaluationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders; first the baseline")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSONL; every line has an answer")
    parser.add_argument("--max-new-tokens", type=positive, required=True, metavar="N", help="longest answer")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="sampled answers a prompt; 0: greedy only (4)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the sampled answers (1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the sampled answers (1.0)")
    parser.add_argument(
        "--verifier", choices=("exact_match", "math_verify"), default="exact_match", help="how answers are judged"
    )
    default = VerifierConfig.model_fields["pattern"].default
    parser.add_argument("--pattern", default=default, metavar="REGEX", help=f"group 1 is the answer ({default})")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/<name of the model folder>.json")
    add_server_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate each model and print a line for it, and one for each comparison with the first. Raises TropdError."""
    names = [model.resolve().name for model in options.models]
    if options.out is not None and len(set(names)) < len(names):
        raise ConfigError([f"tropd eval: --out needs folders of different names, found {', '.join(names)}"])
    if options.url is not None and len(names) > 1:
        raise ConfigError(["tropd eval: a server at --url serves one model; give one MODEL"])
    from tropd_mcore.evaluation.evaluate import EvaluationSettings, compare, describe

    settings = EvaluationSettings(
        prompts=str(options.prompts),
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        temperature=options.temperature,
        top_p=options.top_p,
        verifier=options.verifier,
        pattern=options.pattern,
        limit=options.limit,
    )
    results: list[EvaluationResult] = []
    for name, model in zip(names, options.models, strict=True):
        result = _evaluate(name, model, settings, options)
        print(describe(result), flush=True)
        if options.out is not None:
            result.save(options.out / f"{name}.json")
        results.append(result)
    for result in results[1:]:
        change = compare(results[0], result)
        print(
            f"{result.model} - {results[0].model}: greedy {change['difference']:+.1%} "
            f"[{change['low']:+.1%}, {change['high']:+.1%}]"
        )
    return 0


def _evaluate(
    name: str, model: Path, settings: EvaluationSettings, options: argparse.Namespace
) -> EvaluationResult:
    from tropd_mcore.cli.server import open_server
    from tropd_mcore.evaluation.evaluate import evaluate

    logs = Path(tempfile.mkdtemp(prefix="tropd-eval-"))
    server = open_server(
        name,
        model_key="MODEL",
        model=model,
        config=server_config(options),
        platform=PlatformConfig(kind=options.platform),
        logs=logs,
    )
    with server:
        result = evaluate(model, server.client.generate, settings)
    shutil.rmtree(logs)  # kept where the server failed
    return result
