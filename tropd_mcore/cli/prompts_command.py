"""`tropd prompts`: write `data.prompts` from the files of a public data set.

It fetches nothing: the files are on the user's disk. Invariants: every row that does not become a line is counted on
the output. A question of a held-out set is refused unless the user says what to do with it. An existing file that
differs is not overwritten. The record beside the file says what it was made from.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tropd_mcore.cli.arguments import natural, positive
from tropd_mcore.cli.early_checks import input_file, model_folder, output_file, refuse
from tropd_mcore.data.chat_template import Message
from tropd_mcore.data.dataset_prompts import (
    SLOT,
    Candidate,
    Columns,
    Counts,
    candidates,
    chosen,
    lines,
    overlaps,
    put_around,
    within,
    without,
)
from tropd_mcore.data.dataset_rows import Row, read_rows
from tropd_mcore.data.prompt_file import PromptRecord, read_prompt_file
from tropd_mcore.errors import DataError
from tropd_mcore.files import file_digest, publish_text, shown
from tropd_mcore.progress import counted, progress
from tropd_mcore.train.preflight_files import file_problem

RECORD = ".source.json"
"""Suffix of the record beside the prompts."""
SHOWN_OVERLAPS = 3

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="FILE", help="JSONL or parquet file of the set, on your disk")
    add("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write, for data.prompts or `tropd eval`")
    add("--prompt-field", required=True, metavar="NAME", help="column of the question: a text, or a chat")
    add("--answer-field", metavar="NAME", help="column of the answer, such as reward_model.ground_truth")
    add("--id-field", metavar="NAME", help="column of ids (default: NAME-ROW, from --name and the row's number)")
    add("--name", metavar="NAME", help="beginning of the ids (default: the name of the written file)")
    add("--where", action="append", default=[], type=_condition, metavar="NAME=VALUE", help="only rows with this value")
    add("--template", metavar="TEXT", help=f"text put around the question, with {SLOT} in its place")
    add("--held-out", action="append", default=[], type=Path, metavar="FILE", help="evaluation prompts to keep out")
    add(
        "--overlap",
        choices=("refuse", "remove", "keep"),
        default="refuse",
        help="what to do with questions of a held-out file (refuse)",
    )
    add("--model", type=Path, metavar="DIR", help="model folder whose tokenizer counts --max-prompt-tokens")
    add("--max-prompt-tokens", type=positive, metavar="N", help="leave out longer prompts; needs --model")
    add("--limit", type=positive, metavar="N", help="at most N prompts")
    add("--seed", type=natural, metavar="N", help="draw those N at random instead of taking the first ones")


def run(options: argparse.Namespace) -> int:
    """Write the file and print where every row went. Raises TropdError."""
    _check(options)
    columns = Columns(options.prompt_field, options.answer_field, options.id_field, tuple(options.where))
    counts = Counts()
    with progress(log, "reading the data set", unit="rows") as state:
        found = candidates(counted(_rows(options.sources, columns), state), columns, counts)
    if not counts.rows:
        raise DataError(f"no rows in {', '.join(shown(path) for path in options.sources)}")
    if options.held_out:
        found = _apart(found, options, counts)
    found = put_around(found, options.template)
    if options.max_prompt_tokens is not None:
        found = within(found, _token_counter(options.model), options.max_prompt_tokens, counts)
    found = chosen(found, options.limit, options.seed, counts)
    text = lines(found, options.name or options.out.name.partition(".")[0], counts)
    report = _report(options, counts)
    if not counts.written:
        raise DataError(f"no prompt is left; nothing was written\n{report}")
    _publish(options, text, counts)
    print(f"{shown(options.out)}: {counts.written} prompts\n{report}")
    return 0


def _condition(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError with all problems of the command line."""
    refuse(
        (
            f"{shown(path)}: {problem}; expected a JSONL or parquet file"
            for path in options.sources
            if (problem := file_problem(path)) is not None
        ),
        *(input_file("--held-out", path, "a file that `tropd prompts` wrote") for path in options.held_out),
        output_file("--out", options.out),
        model_folder("--model", options.model) if options.model is not None else [],
        _contradictions(options),
    )


def _contradictions(options: argparse.Namespace) -> Iterator[str]:
    if options.template is not None and options.template.count(SLOT) != 1:
        yield f"--template: expected {SLOT} once, found it {options.template.count(SLOT)} times"
    if (options.max_prompt_tokens is None) != (options.model is None):
        yield "--max-prompt-tokens and --model belong together; give both or neither"
    if options.seed is not None and options.limit is None:
        yield "--seed draws --limit prompts; give --limit too"
    if options.overlap != "refuse" and not options.held_out:
        yield f"--overlap {options.overlap} has nothing to compare with; give --held-out"
    names = [path.resolve() for path in (*options.sources, *options.held_out)]
    if options.out.resolve() in names:
        yield f"--out {options.out}: is one of the files to read; choose another name"
    if len(set(names)) < len(names):
        yield "a file is named twice; name each file once"


def _rows(paths: list[Path], columns: Columns) -> Iterator[Row]:
    for path in paths:
        yield from read_rows(path, columns.names())


def _apart(found: list[Candidate], options: argparse.Namespace, counts: Counts) -> list[Candidate]:
    """Compare with the held-out files, and do what --overlap says. Raises DataError if it says nothing."""
    questions = [question for path in options.held_out for question in _questions(path)]
    hits = overlaps(found, questions)
    if hits and options.overlap == "refuse":
        examples = "".join(f"\n{made.place}: {text.strip()[:100]!r}" for made, text in hits[:SHOWN_OVERLAPS])
        more = f"\n... and {len(hits) - SHOWN_OVERLAPS} more" if len(hits) > SHOWN_OVERLAPS else ""
        raise DataError(
            f"{len(hits)} prompts ask a question of a held-out file; give --overlap remove (or keep, if accuracy on "
            f"it is not to be reported){examples}{more}"
        )
    if options.overlap == "keep":
        log.warning("%d prompts ask a question of a held-out file and are kept (--overlap keep)", len(hits))
        return found
    return without(found, hits, counts)


def _questions(path: Path) -> Iterator[str]:
    """The questions of a prompt file, without the template that its record names. Raises DataError."""
    before, after = _template_of(path)
    for record in read_prompt_file(path, key="--held-out"):
        question = _last(record)
        if question.startswith(before) and question.endswith(after):
            question = question[len(before) : len(question) - len(after)]
        yield question


def _template_of(path: Path) -> tuple[str, str]:
    """The text before and after the question, from the record of `path`; empty without one."""
    record = path.with_name(path.name + RECORD)
    if not record.is_file():
        return "", ""
    try:
        template = json.loads(record.read_bytes())["options"]["template"] or SLOT
        before, _, after = template.partition(SLOT)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{shown(record)}: not a record of `tropd prompts`; make {path.name} again") from error
    return before, after


def _last(record: PromptRecord) -> str:
    return record.prompt if isinstance(record.prompt, str) else str(record.prompt[-1]["content"])


def _token_counter(model: Path) -> Callable[[list[Message]], int]:
    """Count the tokens of a chat as training renders it with this model's template."""
    from tropd_mcore.data.chat import Renderer

    renderer = Renderer(model)
    return lambda messages: len(renderer.prompt_ids(messages))


def _report(options: argparse.Namespace, counts: Counts) -> str:
    """One line per count, also where it is 0."""
    where = " and ".join(f"{name}={value}" for name, value in options.where)
    limit = "" if options.limit is None else f"beyond --limit {options.limit}"
    held_out = f"ask a question of {', '.join(path.name for path in options.held_out)}"
    if options.overlap == "keep":
        held_out += " (kept, not counted)"
    told = [
        (counts.rows, f"rows in {len(options.sources)} files"),
        (counts.other, f"without {where}" if where else ""),
        (counts.empty, "without a question"),
        (counts.unanswered, f"without an answer in {options.answer_field}" if options.answer_field else ""),
        (counts.several, f"with several answers in {options.answer_field}" if options.answer_field else ""),
        (counts.repeated, "repeat the prompt of an earlier row"),
        (counts.disputed, "prompts have rows with different answers" if options.answer_field else ""),
        (counts.overlapping, held_out if options.held_out else ""),
        (counts.too_long, f"longer than {options.max_prompt_tokens} tokens" if options.max_prompt_tokens else ""),
        (counts.beyond_limit, limit),
        (counts.answer_turns, "had an answer after the question, which was cut off"),
    ]
    text = "\n".join(f"  {count:>9} {what}" for count, what in told if what)
    return text if options.held_out else f"{text}\n  not compared with an evaluation set (--held-out)"


def _publish(options: argparse.Namespace, text: str, counts: Counts) -> None:
    """Write the record, then the prompts. Raises DataError if another file is in the place."""
    if options.out.is_file() and options.out.read_bytes() != text.encode():
        raise DataError(f"--out {shown(options.out)}: exists and differs; remove it, or choose another name")
    recorded = (
        "prompt_field", "answer_field", "id_field", "name", "where", "template", "overlap", "max_prompt_tokens",
        "limit", "seed",
    )  # fmt: skip
    record = {
        "sources": {str(path): file_digest(path) for path in options.sources},
        "held_out": {str(path): file_digest(path) for path in options.held_out},
        "options": {name: getattr(options, name) for name in recorded},
        "counts": asdict(counts),
    }
    record_path = options.out.with_name(options.out.name + RECORD)
    publish_text(record_path, json.dumps(record, indent=1) + "\n", key="--out")
    publish_text(options.out, text, key="--out")
