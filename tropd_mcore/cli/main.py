"""`tropd`: finds the subcommand, parses its arguments, and turns errors of the user into one line and exit code 2.

Not for the subcommands themselves. Invariants: `tropd --help` imports nothing heavy; training is not here, because it
runs on all ranks (`torchrun ... -m tropd_mcore.train`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from tropd_mcore.errors import TropdError

COMMANDS = {
    "config": "check a configuration; print it resolved, or the plan of the run",
    "doctor": "check this machine and environment, and the files a configuration names",
    "prefixes": "sample the teacher responses that guidance continues",
    "eval": "measure the accuracy of a model on held-out prompts, and compare results",
    "report": "write a report of a run directory as one HTML file",
    "conformance": "check a vocabulary-parallel loss and its gradients against a float64 oracle",
    "convert": "convert between Hugging Face folders and Megatron checkpoints",
}
"""Subcommand -> help; `tropd_mcore.cli.<subcommand>_command` implements it."""

EPILOG = "Training: bash examples/tropd_pretrain.sh CONFIG.yaml (torchrun of python -m tropd_mcore.train)."


class Command(Protocol):
    """What a subcommand's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, options: argparse.Namespace) -> int:
        """Do it; returns the exit code. Raises TropdError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return the exit code: 0 done, 2 an error of the user."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="tropd", description="Trust-region on-policy distillation.", epilog=EPILOG)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    command: Command | None = None
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == called:
            command = cast(Command, importlib.import_module(f"tropd_mcore.cli.{name}_command"))
            command.add_arguments(subparser)
    options = _parse(parser, arguments)
    assert command is not None, "argparse refuses a command line without a known subcommand"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("tropd_mcore").setLevel(logging.INFO)
    try:
        return command.run(options)
    except TropdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse, and let dotted overrides also stand after options, where argparse leaves them over."""
    options, rest = parser.parse_known_args(arguments)
    if rest:
        if not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    return options


if __name__ == "__main__":
    sys.exit(main())
