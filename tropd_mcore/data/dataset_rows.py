"""Reads the rows of a public data set as it was published: JSONL or parquet, with columns of any name.

The meaning of the columns is in `dataset_prompts`. Invariants: a file is either read to its end or refused in one line.
A parquet file is read in batches, and only the wanted columns of it, so it may be larger than the memory.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tropd_mcore.data.jsonl import any_object, read_lines
from tropd_mcore.errors import DataError, first_line
from tropd_mcore.file_kinds import PARQUET, in_the_way
from tropd_mcore.files import shown

BATCH_ROWS = 1024
"""Rows of a parquet file in memory at a time; a row may hold a long answer."""


class Row(NamedTuple):
    """One row. `value` is None if the row is no object; `problem` then says what it is."""

    place: str
    value: dict[str, Any] | None
    problem: str = ""


def read_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a file, with at least the wanted columns. Raises DataError if the file cannot be read.

    `columns` are names of columns, without the part after a dot. One that the file lacks is refused, with the names
    that it has; in JSONL, the first row decides.
    """
    found = in_the_way(path)
    if found is not None and found.what == PARQUET:
        yield from _parquet(path, columns)
        return
    if found is not None:
        raise DataError(f"{shown(path)}: expected JSONL or parquet; {found}")
    yield from _jsonl(path, columns)


def field_of(value: dict[str, Any], name: str) -> Any:
    """The value at a dotted name such as `reward_model.ground_truth`; None if a part of it is missing."""
    found: Any = value
    for part in name.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(part)
    return found


def _jsonl(path: Path, columns: Collection[str]) -> Iterator[Row]:
    first = True
    for number, line in read_lines(path, "data set"):
        place = f"{shown(path)}:{number}"
        try:
            value = any_object(line)
        except DataError as error:
            yield Row(place, None, str(error))
            continue
        if first:
            _check_columns(path, columns, list(value))
            first = False
        yield Row(place, value)


def _parquet(path: Path, columns: Collection[str]) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        errors = importlib.import_module("pyarrow").ArrowException
    except ModuleNotFoundError as error:
        raise DataError(
            f"{shown(path)}: reading parquet needs the package pyarrow, which is not installed; run `pip install "
            "'tropd-mcore[data]'` (of a checkout: '.[data]'), or convert the file to JSONL"
        ) from error
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)  # no effect on files without checksums
        _check_columns(path, columns, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{shown(path)}: row {number}", value)
    except (errors, OSError, ValueError) as error:
        raise DataError(
            f"{shown(path)}: cannot be read as parquet: {first_line(error)[:160]}; fetch the file again"
        ) from error


def _check_columns(path: Path, wanted: Collection[str], present: list[str]) -> None:
    """Raise DataError for the first wanted column that the file lacks."""
    for name in wanted:
        if name not in present:
            close = difflib.get_close_matches(name, present, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(f"{shown(path)}: no column {name!r}{hint} (it has {', '.join(map(str, present))})")
