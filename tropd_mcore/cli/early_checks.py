"""Checks of the files and folders of a command line, made before anything heavy is imported or started.

This module does not check configurations (`config.checks`) or the contents of files. Invariants: nothing is written.
All problems are reported at once, each on a line with its option.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ConfigError
from tropd_mcore.train.preflight_files import INFO_FILE, file_problem, folder_problem
from tropd_mcore.train.preflight_machine import importable, interpreter_problem, missing_sglang


def refuse(*found: Iterable[str]) -> None:
    """Raise ConfigError with every line of `found`, if there is one."""
    problems = [line for lines in found for line in lines]
    if problems:
        raise ConfigError(problems)


def _named(option: str, path: Path) -> str:
    """An option, or a configuration key, with its value."""
    return f"{option}{' ' if option.startswith('-') else '='}{path}"


def input_file(option: str, path: Path, expected: str) -> Iterator[str]:
    """Check that `path` is a readable file. `expected` describes it in the message."""
    if (problem := file_problem(path)) is not None:
        yield f"{_named(option, path)}: {problem}; expected {expected}"


def model_folder(option: str, path: Path) -> Iterator[str]:
    """Check that `path` is a folder with a config.json."""
    if not path.is_dir():
        found = "is a file" if path.exists() else "not found"
        yield f"{_named(option, path)}: {found}; expected a Hugging Face model folder"
    elif not (path / "config.json").is_file():
        yield f"{_named(option, path)}: config.json not found there; expected a Hugging Face model folder"


def checkpoint_folder(option: str, path: Path) -> Iterator[str]:
    """Check that `path` is a complete checkpoint."""
    if not path.is_dir():
        yield f"{_named(option, path)}: {'is a file' if path.exists() else 'not found'}; expected a checkpoint folder"
    elif not (path / INFO_FILE).is_file():
        newest = sorted(path.glob(f"checkpoints/*/{INFO_FILE}")) or sorted(path.glob(f"*/{INFO_FILE}"))
        hint = f"; did you mean {newest[-1].parent}?" if newest else ""
        yield f"{_named(option, path)}: no {INFO_FILE} in it; expected a complete checkpoint folder{hint}"


def output_file(option: str, path: Path) -> Iterator[str]:
    """Check that a file can be written at `path`."""
    if path.is_dir():
        yield f"{_named(option, path)}: is a folder; expected the name of a file"
    elif (problem := folder_problem(path.parent)) is not None:
        yield f"{_named(option, path)}: {problem}; choose another place"
    elif path.exists() and not os.access(path, os.W_OK):
        yield f"{_named(option, path)}: cannot be written (permission); choose another place"


def output_folder(option: str, path: Path) -> Iterator[str]:
    """Check that a new folder can be created at `path`, which must be absent or empty."""
    if path.exists() and not path.is_dir():
        yield f"{_named(option, path)}: a file of that name exists; expected a new or empty folder"
    elif path.is_dir() and any(path.iterdir()):
        yield f"{_named(option, path)}: not empty; choose a new folder or remove its content"
    elif (problem := folder_problem(path.parent)) is not None:
        yield f"{_named(option, path)}: {problem}; choose another place"


def verifier_package(kind: str) -> Iterator[str]:
    """Check that the package that checks the answers is installed."""
    if kind == "math_verify" and not importable("math_verify"):
        yield (
            "verifier.kind=math_verify needs the package math_verify, which is not installed; run `pip install "
            "'tropd-mcore[eval]'`"
        )


def server_package(section: str, server: ServerConfig) -> Iterator[str]:
    """If a server is to be started, check that its interpreter has SGLang."""
    if (problem := interpreter_problem(section, server)) is not None:
        yield problem
    if (problem := missing_sglang(section, server)) is not None:
        yield problem


def api_key(section: str, server: ServerConfig) -> Iterator[str]:
    """Check that the environment holds the API key of a server at a url."""
    variable = server.api_key_env
    if server.url is not None and variable is not None and not os.environ.get(variable):
        yield f"{section}.api_key_env={variable}: this environment variable is unset or empty; export it"
