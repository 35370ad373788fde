"""`tropd recipes` lists and copies the configurations and scripts that come with the package.

An installation from a wheel has no checkout beside it. The models of the quickstart are not among the files;
examples/make_models.py makes them. Invariants: an existing file that differs is never overwritten. A copy is complete
or absent.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tropd_mcore.cli import shipped
from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="file to copy: a path of the list, its last part, or a pattern such as 'configs/*' (none: print the list)",
    )
    parser.add_argument("--all", action="store_true", help="copy all files; the examples then run from there")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="folder to copy into (default: .)")


def run(options: argparse.Namespace) -> int:
    """List or copy. Raises ConfigError for an unknown name, and if a file that differs would be overwritten."""
    root = shipped.root()
    files = shipped.files_of(root)
    if not files:
        raise ConfigError([f"tropd recipes: no files found in {root}; install the package again"])
    if options.all:
        chosen = files
    elif options.names:
        chosen = sorted({path for name in options.names for path in _called(name, files)})
    elif options.to != Path():
        raise ConfigError(["tropd recipes: --to needs files to copy; give a NAME, or pass --all"])
    else:
        for path in files:
            if path.name != "__init__.py":
                print(f"{path}\n    {_about(root / path)}")
        print("\ntropd recipes NAME ... [--to DIR] copies; --all copies everything")
        return 0
    _copy(root, chosen, options.to)
    return 0


def _called(name: str, files: list[Path]) -> list[Path]:
    found = [path for path in files if name in (str(path), path.name, path.stem) or fnmatch(str(path), name)]
    if not found:
        near = difflib.get_close_matches(name, [word for path in files for word in (str(path), path.name, path.stem)])
        hint = f"; did you mean {near[0]}?" if near else "; `tropd recipes` prints the list"
        raise ConfigError([f"tropd recipes {name}: no such recipe or script{hint}"])
    return found


def _about(path: Path) -> str:
    """The first line of a file's description of itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if path.suffix == ".json":
        return "Result of plain OPD that the quickstart's table shows (examples/quickstart_table.py)."
    if path.suffix == ".patch":
        return "Lines to insert into the source of that stack (docs/integrations.md)."
    lines = (line for line in text.splitlines() if line.startswith("# "))
    return next(lines, "# ")[2:]


def _write(source: Path, stream: BinaryIO) -> None:
    stream.write(source.read_bytes())


def _copy(root: Path, files: list[Path], target: Path) -> None:
    differing, new = [], []
    for path in files:
        place = target / path
        if not os.path.lexists(place):
            new.append(path)
        elif not place.is_file() or place.read_bytes() != (root / path).read_bytes():
            differing.append(str(place))
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ConfigError(
            [f"tropd recipes: {', '.join(differing[:3])}{more} would be overwritten; give another folder with --to"]
        )
    for path in new:
        place = target / path
        publish_file(place, partial(_write, root / path), key="--to")
        place.chmod((root / path).stat().st_mode & 0o777 | 0o200)
        print(place)
    if len(new) < len(files):
        print(f"{len(files) - len(new)} files exist already and are the same")
