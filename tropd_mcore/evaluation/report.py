"""Writes report.html of a run: settings, curves, held-out accuracy and rollouts on one page.

This module does not monitor live (see `monitor`); each part of the page has its own file. Invariants: the page is one
file that needs nothing from outside, and its policy forbids a browser to load anything. It can be read without its
script. If a run lacks some data, the page says so in its place. The same run directory gives the same file, byte for
byte.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from tropd_mcore.errors import DataError
from tropd_mcore.evaluation.charts import legend_mark
from tropd_mcore.evaluation.curves_view import RUN_HUES, curves_section
from tropd_mcore.evaluation.evaluation_view import evaluation_section
from tropd_mcore.evaluation.headline import Tile, sentences, tiles
from tropd_mcore.evaluation.metrics_view import Notes, metrics_section
from tropd_mcore.evaluation.rollout_texts import find_texts
from tropd_mcore.evaluation.rollouts_section import rollouts_section
from tropd_mcore.evaluation.run_records import RunRecords, read_run
from tropd_mcore.evaluation.settings_view import settings_section
from tropd_mcore.evaluation.stored_hints import hints_of
from tropd_mcore.files import publish_text

TOKEN_STEPS = 6
"""Number of steps whose rollouts are shown: the first, the last, and others evenly between."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of the page."""

    out: Path | None = None
    """File of the page; None = <run_dir>/report.html"""
    compare: Sequence[Path] = ()
    """Run directories to compare the run with"""
    tokenizer: Path | None = None
    """Folder with the tokenizer of the rollouts; None = the student's, from the run's configuration"""
    notes: Notes = field(default_factory=dict)
    """Metric name -> its meaning"""
    rollout_steps: int = TOKEN_STEPS


@dataclass(frozen=True)
class Report:
    """A written page."""

    path: Path
    warnings: list[str]
    """What the page lacks or may show wrongly, and how to fix it"""


def write_report(run_dir: Path, options: ReportOptions) -> Report:
    """Write the page of `run_dir`.

    Raises DataError if a folder is not a run directory, a file in it is damaged, or the page cannot be written.
    """
    folders = [run_dir, *options.compare]
    if len(folders) > len(RUN_HUES):
        raise DataError(f"--compare: expected at most {len(RUN_HUES) - 1} runs, found {len(folders) - 1}")
    steps = [options.rollout_steps, *[0] * len(options.compare)]
    runs = [
        read_run(folder, token_steps=count, name=name)
        for folder, name, count in zip(folders, _names(folders), steps, strict=True)
    ]
    texts = find_texts(runs[0], options.tokenizer)
    hints, unread = _hints(runs)
    path = options.out or run_dir / "report.html"
    if path.is_dir():
        raise DataError(f"--out: expected a file, found the folder {path}; name the file in it")
    sections = (
        _header(runs, hints),
        evaluation_section(runs),
        curves_section(runs),
        metrics_section(runs, options.notes),
        rollouts_section(runs[0], texts, named=len(runs) > 1),
        settings_section(runs),
    )
    publish_text(path, _page(" and ".join(run.name for run in runs), "".join(sections)), key="--out")
    return Report(path, [*([texts.problem] if texts.problem and runs[0].tokens else []), *unread])


def _hints(runs: Sequence[RunRecords]) -> tuple[list[list[str]], list[str]]:
    """The hints of each run, and why those of a run could not be found. Both stand on the page."""
    found, unread = [], []
    for run in runs:
        try:
            found.append(hints_of(run))
        except DataError as error:
            unread.append(str(error))
            found.append([str(error)])
    return found, unread


def _page(title: str, sections: str) -> str:
    """The whole document. Its policy allows its own script and style by their hashes and forbids everything else."""
    style, script = (_part(name) for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>TrOPD run {escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{sections}</main><script>{script}</script></body></html>\n"
    )


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source expression of a Content-Security-Policy that allows only this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as is needed to make them unique."""
    paths = [folder.resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise DataError(f"--compare: {folders[0]}: the same run is named twice")


def _header(runs: Sequence[RunRecords], hints: Sequence[Sequence[str]]) -> str:
    if len(runs) > 1:
        return _comparison_header(runs, hints)
    (run,) = runs
    boxes = "".join(f'<p class="warning">{escape(line)}</p>' for line in hints[0])
    shown = "".join(
        f'<div class="tile"><span>{escape(tile.title)}</span><b>{escape(tile.value)}</b><small>{escape(tile.note)}'
        "</small></div>"
        for tile in tiles(run)
    )
    return (
        f'<header><h1>{escape(run.name)}</h1><p>{_models(run)}</p><p class="verdict-line">'
        f'{escape(" ".join(sentences(run)))}</p>{boxes}<div class="tiles">{shown}</div></header>'
    )


def _comparison_header(runs: Sequence[RunRecords], hints: Sequence[Sequence[str]]) -> str:
    """One column per run with its sentences, hints and tiles."""
    found = [{tile.title: tile for tile in tiles(run)} for run in runs]
    titles = list(dict.fromkeys(title for column in found for title in column))
    heads = "".join(
        f"<th>{legend_mark(hue, 'solid')}{escape(run.name)}</th>" for run, hue in zip(runs, RUN_HUES, strict=False)
    )
    models = "".join(f"<td>{_models(run)}</td>" for run in runs)
    words = "".join(f"<td>{escape(' '.join(sentences(run)))}</td>" for run in runs)
    boxes = "".join(f"<td>{escape(' '.join(lines)) or '&ndash;'}</td>" for lines in hints)
    hinted = f"<tr><th>Hints</th>{boxes}</tr>" if any(hints) else ""
    rows = "".join(
        f"<tr><th>{escape(title)}</th>{''.join(_tile_cell(column.get(title)) for column in found)}</tr>"
        for title in titles
    )
    return (
        f"<header><h1>{escape(' and '.join(run.name for run in runs))}</h1>"
        f'<div class="scroll card"><table class="compared"><thead><tr><th></th>{heads}</tr></thead><tbody>'
        f"<tr><th>Models</th>{models}</tr><tr><th>In words</th>{words}</tr>{hinted}{rows}</tbody></table></div>"
        "</header>"
    )


def _tile_cell(tile: Tile | None) -> str:
    if tile is None:
        return "<td>&ndash;</td>"
    return f"<td><b>{escape(tile.value)}</b><small>{escape(tile.note)}</small></td>"


def _models(run: RunRecords) -> str:
    names = [
        f"{role}: {Path(str(run.settings[key])).name}"
        for role, key in (("student", "student.path"), *run.teachers)
        if run.settings.get(key)
    ]
    return escape(", ".join(names))
