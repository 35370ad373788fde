"""`tropd` finds the subcommand, parses its arguments, and turns errors of the user into one line and exit code 2.

This module does not implement subcommands. Invariants: `tropd --help` imports nothing heavy. Ctrl-C and SIGTERM end a
command with one line and also end its servers, even if the command is stuck in C code.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Protocol, cast

from tropd_mcore import logs, signals
from tropd_mcore.errors import TropdError
from tropd_mcore.progress import progress

COMMANDS = {
    "train": "train one configuration on this node, or as one node of several",
    "config": "check a configuration; print it resolved, the plan of the run, or what the keys mean",
    "metrics": "print what each metric of metrics.jsonl means",
    "doctor": "check this machine and environment, and the files a configuration names",
    "selftest": "prove on this machine that a job can run, and write a report to send back",
    "prompts": "write data.prompts from the files of a public data set",
    "prefixes": "sample the teacher responses that guidance continues",
    "eval": "measure the accuracy of a model on held-out prompts, and compare results",
    "study": "run pairs of models x objectives x seeds, and write the page of their results",
    "report": "write a report of a run directory as one HTML file",
    "conformance": "check a vocabulary-parallel loss and its gradients against a float64 oracle",
    "convert": "convert between Hugging Face folders and Megatron checkpoints",
    "recipes": "list and copy the configurations and scripts that come with the package",
}
"""Subcommand -> help; `tropd_mcore.cli.<subcommand>_command` implements it."""

SHORT_COMMANDS = ("config", "recipes", "train")
"""Commands that print at once and end, or whose processes write their own log."""

log = logging.getLogger(__name__ if __name__ != "__main__" else "tropd_mcore.cli.main")

EPILOG = "Training: tropd train CONFIG.yaml [key=value ...]; the same command again resumes it."

GOES_ON = ("prefixes", "study")
"""Commands that continue where they stopped when they are run again."""

LEAVE_S = 8.0
"""Longest time from a signal to the end. After that the process exits, and the kernel ends its servers with it."""


class Command(Protocol):
    """Interface of a subcommand's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command and return the exit code. Raises TropdError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return the exit code: 0 done, 2 user error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="tropd", description="Trust-region on-policy distillation.", epilog=EPILOG)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    command: Command | None = None
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == called:
            try:
                command = cast(Command, importlib.import_module(f"tropd_mcore.cli.{name}_command"))
            except ModuleNotFoundError as error:
                return _say_missing(name, error)
            command.add_arguments(subparser)
    if called is not None and command is None and (close := difflib.get_close_matches(called, COMMANDS, n=1)):
        parser.error(f"{called}: no such command; did you mean {close[0]}?")
    options = _parse(parser, arguments)
    assert command is not None, "argparse refuses a command line without a known subcommand"
    logs.configure(int(os.environ.get("RANK", "0")))  # not 0 in a conversion by several ranks
    if called != "train":  # the launcher of a job handles signals itself
        _end_on_signals(str(called))
    try:
        if options.command in SHORT_COMMANDS:
            return command.run(options)
        log.info("tropd %s", shlex.join(arguments))
        with progress(log, f"tropd {options.command}"):
            return command.run(options)
    except TropdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        return _say_missing(str(called), error)
    except _Ended as ended:
        signals.say(ended.line)
        return ended.code
    except KeyboardInterrupt:
        signals.say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the pipe has closed it: `tropd metrics | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        return 128 + signal.SIGPIPE


def _say_missing(command: str, error: ModuleNotFoundError) -> int:
    """Print in one line which package the command needs; returns 2. A missing module of this package is raised
    again."""
    package = (error.name or "").partition(".")[0]
    if not package or package == "tropd_mcore":
        raise error
    print(
        f"error: tropd {command} needs the Python package {package}, which is not installed; "
        "run `pip install 'tropd-mcore[train]'` (of a checkout: '.[train]'), which has what the commands need",
        file=sys.stderr,
    )
    return 2


class _Ended(BaseException):
    """A signal, raised in the main thread so that servers are stopped on the way out."""

    def __init__(self, command: str, number: int) -> None:
        self.code = 128 + number
        word = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        self.line = f"{word}; the same command {'goes on' if command in GOES_ON else 'starts again'}"


def _end_on_signals(command: str) -> None:
    """End the command on SIGINT, SIGTERM and SIGHUP: the first one raises an exception, the second one exits at
    once."""
    heard: list[float] = []

    def leave(number: int) -> None:
        ended = _Ended(command, number)
        signals.say(ended.line)
        os._exit(ended.code)

    def hear(number: int, _frame: object) -> None:
        heard.append(time.monotonic())
        if len(heard) == 1:
            raise _Ended(command, number)
        if heard[-1] - heard[0] >= signals.SECOND_S:
            leave(number)

    def wait(number: signal.Signals) -> None:
        timer = threading.Timer(LEAVE_S, leave, [number])  # the main thread may be inside C code
        timer.daemon = True
        timer.start()

    signals.listen((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), wait, hear)


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Dotted overrides may also follow options, where argparse does not accept them itself."""
    options, rest = parser.parse_known_args(arguments)
    if rest:
        if not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    return options


if __name__ == "__main__":
    sys.exit(main())
