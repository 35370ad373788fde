"""Arguments shared by several subcommands."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add CONFIG and the dotted overrides."""
    parser.add_argument("config", nargs="?" if optional else None, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="dotted overrides, for example optimizer.learning_rate=1e-5",
    )


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def exit_code(text: str) -> int:
    """Parse an exit code of a process, 0 to 255."""
    if (code := natural(text)) > 255:
        raise argparse.ArgumentTypeError(f"expected an exit code, 0 to 255, found {text!r}")
    return code
