"""Asks the interpreter that a configuration names for a server what it is, before anything starts.

This module does not start servers (`process`) or routers (`router`) and imports nothing of SGLang. Invariant: an
unusable interpreter is one line that names its key.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tropd_mcore.errors import ServerError
from tropd_mcore.foreign_text import quoted
from tropd_mcore.serving.environment import of_interpreter

ANSWER_S = 25.0
"""Longest time in seconds that an interpreter may take to answer. A file system that is slow at first needs some."""
_PROGRAM = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version" if importlib.util.find_spec(name) else None
print(json.dumps({"python": sys.version.split()[0], "sglang": version("sglang"), "torch": version("torch"),
                  "smg": version("smg")}))
"""


@dataclass(frozen=True)
class Interpreter:
    """What an interpreter says about itself."""

    python: str
    sglang: str
    torch: str | None

    def __str__(self) -> str:
        return f"Python {self.python}, sglang {self.sglang}, torch {self.torch or 'not installed'}"


def beside() -> Path | None:
    """Return the interpreter of the server's environment that examples/setup_env.sh makes beside this one, or None."""
    path = Path(sys.prefix).parent / ".venv-server" / "bin" / "python"
    return path if path.is_file() else None


def way_to_sglang(key: str) -> str:
    """Return what to do if a server is to be started, its `key` names no interpreter, and this one has no sglang.

    Installing sglang would replace the torch of a trainer for GPUs, so the other environment comes first.
    """
    found = beside()
    if found is not None:
        return f"set {key}.python to {found}, which examples/setup_env.sh made"
    return (
        f"set {key}.python to an interpreter that has it (on a GPU machine examples/setup_env.sh makes one), name the "
        "url of a server that runs, or on a CPU run `pip install sglang==0.5.23` as requirements/cpu.txt says"
    )


def ask(path: Path, *, key: str) -> Interpreter:
    """Return what the interpreter at `path` is. `key` is the configuration key that names it.

    Raises ServerError, in one line, if there is none, if it cannot run a server, or if its Python is another minor
    version than ours: weights in shared memory are pickled here and unpickled there.
    """
    wanted = f"expected a Python {_minor(sys.version)} interpreter with sglang"
    if not path.is_file():
        inside = path / "bin" / "python"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ServerError(f"{key}={path}: {'is a folder' if path.is_dir() else 'not found'}; {wanted}{hint}")
    answer = _answer(path, f"{key}={path}", wanted)
    if _minor(answer["python"]) != _minor(sys.version):
        raise ServerError(
            f"{key}={path}: is Python {answer['python']}, but this program runs in Python {sys.version.split()[0]}; "
            "make both environments with the same minor version"
        )
    if answer["sglang"] is None:
        raise ServerError(
            f"{key}={path}: has no package sglang; run `{path} -m pip install sglang==0.5.23`, or name another one"
        )
    return Interpreter(answer["python"], answer["sglang"], answer["torch"])


ROUTER = "smg==1.13.0"
"""The package of the router, in the version that was tested."""


def way_to_router(key: str) -> str:
    """Return what to do if a router is to be started, its `key` names no interpreter, and this one has no smg."""
    return (
        f"run `pip install {ROUTER}` as requirements/router.txt says, set {key}.python to an interpreter that has it, "
        f"or remove {key}: the job then chooses the server of each sample itself"
    )


def ask_router(path: Path | None, *, key: str) -> str:
    """Return the version of smg that the interpreter at `path` (None = this one) has. `key` is the router's section.

    Raises ServerError, in one line, if there is no such interpreter or it has no smg.
    """
    if path is None:
        try:
            return importlib.metadata.version("smg")
        except importlib.metadata.PackageNotFoundError:
            raise ServerError(
                f"{key}: starting a router needs the package smg, which is not installed; {way_to_router(key)}"
            ) from None
    named, wanted = f"{key}.python={path}", "expected a Python interpreter with the package smg"
    if not path.is_file():
        raise ServerError(f"{named}: {'is a folder' if path.is_dir() else 'not found'}; {wanted}")
    found = _answer(path, named, wanted)["smg"]
    if found is None:
        raise ServerError(f"{named}: has no package smg; run `{path} -m pip install {ROUTER}`, or name another one")
    return found


def _answer(path: Path, named: str, wanted: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [str(path.absolute()), "-P", "-c", _PROGRAM],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            env=of_interpreter(path),
            check=False,
        )
    except OSError as error:
        raise ServerError(f"{named}: cannot be executed ({error.strerror}); {wanted}") from error
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{named}: has not answered within {ANSWER_S:g} s; {wanted}") from error
    try:
        answer = json.loads(done.stdout)
        return {name: answer[name] for name in ("python", "sglang", "torch")} | {"smg": answer.get("smg")}
    except (ValueError, KeyError, TypeError) as error:
        said = quoted((done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2])
        raise ServerError(f"{named}: answers with {said} and exit code {done.returncode}; {wanted}") from error


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
