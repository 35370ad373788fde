"""Make the quickstart's example in one folder, from scratch: a tokenizer, prompts, a teacher and two students.

The first student has a bad habit (it forgets carries), the second a wrong prior (it uses another procedure). The small
example has no second student.

    python -m examples.make_models models/arithmetic              # for the quickstart
    python -m examples.make_models models/arithmetic-tiny --tiny  # for CI

    teacher/ student/ misled/  Hugging Face folders (Qwen3, float32) with the same tokenizer
    train.jsonl heldout.jsonl  prompts: id, messages, answer
    example.json               settings, content hash, measured accuracies and times

This script does not train on your own data and does not sample teacher responses (see `tropd prefixes`). Invariants:
the folder is complete or absent. A second call with the same settings and the same code returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from examples.arithmetic.settings import FULL, SOFT, TINY, ExampleSettings
from examples.arithmetic.task import Problem, make_splits, problem_stream, worked_answer
from tropd_mcore import logs
from tropd_mcore.files import partial_name, remove_left_partials
from tropd_mcore.progress import progress
from tropd_mcore.signals import die_with_parent

SUMMARY = "example.json"
MISLED = "misled"
"""Folder of the second student. It has a wrong prior: it knows the teacher's procedure and uses another one."""

log = logging.getLogger("examples.make_models")


def make_example(out: Path, settings: ExampleSettings, *, threads: int = 1) -> dict[str, Any]:
    """Return the summary of the example in `out`. Make it first if it is missing or has other settings or code.

    Raises FileExistsError if `out` holds something else.
    """
    content_hash = _content_hash(settings)
    found = _read_summary(out)
    if found is not None and found["content_hash"] == content_hash:
        return found
    if found is None and out.exists():
        raise FileExistsError(f"{out}: expected an example made by this script or nothing, found no {SUMMARY} in it")
    remove_left_partials(out.parent, f".{out.name}.*")
    partial = partial_name(out)
    partial.mkdir(parents=True)
    log.info(
        "making %s: student (%d steps), teacher (%d steps) and misled student (%d steps)",
        out,
        *_training_steps(settings),
    )
    try:
        summary = {"content_hash": content_hash, "settings": asdict(settings), **_build(partial, settings, threads)}
        (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if found is not None:
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def _build(folder: Path, settings: ExampleSettings, threads: int) -> dict[str, Any]:
    """Fill `folder` and return the measured accuracies and times."""
    with progress(log, "loading the libraries"):
        import torch  # not at the top, so that a second call stays fast

        from examples.arithmetic import models, tokenizer

    torch.set_num_threads(threads)
    clock = _Clock()
    random = Random(settings.seed)
    digits = {"min_digits": settings.min_digits, "max_digits": settings.max_digits}
    splits = make_splits(random, **digits, train=settings.train_prompts, heldout=settings.heldout_prompts)
    stream = problem_stream(random, **digits, exclude=splits)
    with progress(log, f"tokenizer: learning from {settings.tokenizer_texts} texts"):
        fast_tokenizer = tokenizer.train_tokenizer(
            _texts(islice(stream, settings.tokenizer_texts)), max_positions=settings.max_positions
        )
    for name, problems in (("train", splits.train), ("heldout", splits.heldout)):
        _write_lines(folder / f"{name}.jsonl", _prompt_lines(name, problems))
    clock.lap("data")
    misled = MISLED if settings.misled_training else None
    for name in filter(None, ("student", "teacher", misled)):
        fast_tokenizer.save_pretrained(folder / name)
    made: dict[str, Any] = {}
    with _beside(_make_misled, folder / misled, settings, threads) if misled else nullcontext():
        for name, shape, training in (
            ("student", settings.student, settings.student_training),
            ("teacher", settings.teacher, settings.teacher_training),
        ):
            made[name] = models.new_model(shape, fast_tokenizer, settings.max_positions, seed=settings.seed)
            models.pretrain(made[name], fast_tokenizer, stream, training, seed=settings.seed, what=name)
            made[name].save_pretrained(folder / name)
            clock.lap(name)
    summary = {}
    if misled:
        clock.lap(misled)
        made[misled] = models.load(folder / misled)
        summary["distance"] = _distance(made[misled], made["teacher"], fast_tokenizer, splits.heldout, settings)
    accuracy = {}
    for name, model in made.items():
        with progress(log, f"{name}: answering {len(splits.heldout)} held-out problems"):
            accuracy[name] = models.greedy_accuracy(
                model, fast_tokenizer, splits.heldout, max_new_tokens=settings.max_response_tokens
            )
    clock.lap("evaluation")
    return {"greedy_heldout_correct": accuracy, **summary, **clock.summary()}


def _distance(
    student: Any, teacher: Any, tokenizer: Any, problems: Sequence[Problem], settings: ExampleSettings
) -> dict[str, float]:
    """Return how far the second student is from the teacher. Raises NoExample if that is no wrong prior."""
    from examples.arithmetic import distance

    with progress(log, f"{MISLED}: measuring the distance to the teacher"):
        found = distance.measure(
            student, teacher, tokenizer, problems, max_new_tokens=settings.max_response_tokens, seed=settings.seed
        )
    if problems_found := found.problems():
        raise NoExample(f"{MISLED}: {'; '.join(problems_found)}")
    return found.rounded()


def _make_misled(folder: Path, settings: ExampleSettings, threads: int) -> None:
    """Train the second student and save it beside its tokenizer in `folder`."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from examples.arithmetic import models

    torch.set_num_threads(threads)
    digits = {"min_digits": settings.min_digits, "max_digits": settings.max_digits}
    splits = make_splits(
        Random(settings.seed), **digits, train=settings.train_prompts, heldout=settings.heldout_prompts
    )
    stream = problem_stream(Random(settings.seed + 1), **digits, exclude=splits)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = models.new_model(settings.student, tokenizer, settings.max_positions, seed=settings.seed + 1)
    for number, stage in enumerate(settings.misled_training, start=1):
        what = f"{MISLED}, stage {number} of {len(settings.misled_training)}"
        models.pretrain(model, tokenizer, stream, stage, seed=settings.seed + number, what=what)
    model.save_pretrained(folder)


def _alone(function: Callable[..., None], parent: int, *arguments: Any) -> None:
    """Run in a process that ends with its parent and leaves Ctrl-C to it."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure()
    function(*arguments)


@contextmanager
def _beside(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run `function` in another process meanwhile, and wait for it at the end. Raises RuntimeError if it fails."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_alone, args=(function, os.getpid(), *arguments))
    process.start()
    try:
        yield
        with progress(log, "waiting for the second student"):
            process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the second student was not made (exit code {process.exitcode})")
    finally:
        process.kill()
        process.join()


def _training_steps(settings: ExampleSettings) -> tuple[int, int, int]:
    misled = sum(stage.max_steps for stage in settings.misled_training)
    return settings.student_training.max_steps, settings.teacher_training.max_steps, misled


def _texts(problems: Iterable[Problem]) -> Iterator[str]:
    """The texts that the tokenizer is trained on, with the words of the chat and of the task."""
    for problem in problems:
        yield f"system\nuser\n{problem.text}\nassistant\n{worked_answer(problem.a, problem.b)}"


def _prompt_id(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def _prompt_lines(split: str, problems: Iterable[Problem]) -> Iterator[dict[str, Any]]:
    for number, problem in enumerate(problems):
        yield {"id": _prompt_id(split, number), "messages": problem.messages, "answer": problem.answer}


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _content_hash(settings: ExampleSettings) -> str:
    """Hash of the settings and of every source file that makes the example."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for source in (Path(__file__), *sorted((Path(__file__).parent / "arithmetic").glob("*.py"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _read_summary(out: Path) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return summary


class _Clock:
    """Wall-clock and CPU seconds per part."""

    def __init__(self) -> None:
        self._laps: dict[str, tuple[float, float]] = {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the part `name`."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = self._laps.get(name, (0.0, 0.0))
        self._laps[name] = wall + now[0] - self._last[0], cpu + now[1] - self._last[1]
        self._last = now

    def summary(self) -> dict[str, dict[str, float]]:
        wall = {name: round(wall, 1) for name, (wall, _) in self._laps.items()}
        cpu = {name: round(cpu, 1) for name, (_, cpu) in self._laps.items()}
        return {
            "wall_s": wall | {"total": round(sum(wall.values()), 1)},
            "cpu_s": cpu | {"total": round(sum(cpu.values()), 1)},
        }


class NoExample(Exception):
    """A model that was made is not what the example is about."""


class _Ended(BaseException):
    """A signal asks this process to end. The files made so far are removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


def _end_on_signals() -> None:
    """End on the first SIGINT, SIGTERM or SIGHUP, and ignore further ones during the clean-up."""
    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
             if signal.getsignal(number) != signal.SIG_IGN]  # fmt: skip

    def end(number: int, _frame: object) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(number)

    for number in heard:
        signal.signal(number, end)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.make_models", description="Make the arithmetic example.")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="folder to make")
    variant = parser.add_mutually_exclusive_group()
    variant.add_argument("--tiny", action="store_true", help="make the small variant for CI")
    variant.add_argument("--soft", action="store_true", help="make a teacher that is unsure and a narrower student")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="number of CPU threads (default: 1)")
    parser.add_argument("--seed", type=int, default=FULL.seed, metavar="N", help=f"random numbers ({FULL.seed})")
    options = parser.parse_args(arguments)
    logs.configure()
    _end_on_signals()
    try:
        settings = replace(TINY if options.tiny else SOFT if options.soft else FULL, seed=options.seed)
        summary = make_example(options.out, settings, threads=options.threads)
    except _Ended as ended:
        print(f"stopped while making {options.out}; nothing is left, the same command starts again", file=sys.stderr)
        return 128 + ended.number
    except (FileExistsError, NoExample) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(f"error: cannot write {options.out}: {reason}; make room there or name another folder", file=sys.stderr)
        return 2
    print(f"{options.out}: greedy held-out answers that are right: {summary['greedy_heldout_correct']}")
    if "distance" in summary:
        print(f"{MISLED}, distance to the teacher: {summary['distance']}")
    print(f"seconds: {summary['wall_s']}, of CPU: {summary['cpu_s']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
