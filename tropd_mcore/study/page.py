"""The page of a study: its tables, pictures and every run, written from the result files alone.

Invariants: the same results give the same page, byte for byte. The page says which runs are missing. It interprets
nothing; that is the work of people, on a page of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tropd_mcore.errors import DataError
from tropd_mcore.files import publish_text
from tropd_mcore.study.alarms import MISSED, judge
from tropd_mcore.study.curves import picture
from tropd_mcore.study.plan import BEFORE, Study
from tropd_mcore.study.result import CellResult, load_result
from tropd_mcore.study.tables import accuracy_table, course_table, rows_of


def write_page(study: Study) -> list[Path]:
    """Write the page and its pictures, and return their paths. Raises DataError if there is no result at all."""
    written = []
    for path, text in page_files(study).items():
        publish_text(path, text, key="page")
        written.append(path)
    return written


def page_files(study: Study) -> dict[Path, str]:
    """Return path -> text of the page and its pictures. Raises DataError if there is no result or a damaged one."""
    results = [load_result(path) for cell in study.cells if (path := study.result(cell)).is_file()]
    if not results:
        raise DataError(f"{study.plan.results}: no result of {study.path} is there yet; run the study first")
    files: dict[Path, str] = {}
    lines = [*_head(study, results)]
    for name, group in study.plan.groups.items():
        lines += [f"## {group.label}", "", *([group.note, ""] if group.note else [])]
        for pair in group.pairs:
            rows = rows_of(study.plan, results, name, pair)
            if not any(row.objective != BEFORE for row in rows):
                lines += [f"No run on the pair '{study.plan.pairs[pair].label}' has a result yet.", ""]
                continue
            label = study.plan.pairs[pair].label
            title = f"{group.label}: {label}"
            image = Path(study.plan.images) / f"study-{study.plan.name}-{name}-{pair}.svg"
            files[image] = picture(rows, title)
            shown = _relative(image, Path(study.plan.page))
            lines += [f"### {title}", "", *accuracy_table(study.plan, rows), "", *course_table(rows), ""]
            lines += [f"![Curves: {title}]({shown})", ""]
    lines += [*_hints(results), *_runs(results)]
    files[Path(study.plan.page)] = "\n".join(lines).rstrip("\n") + "\n"
    return files


def _head(study: Study, results: Sequence[CellResult]) -> Iterator[str]:
    plan = study.plan
    missing = len({cell.name for cell in study.cells}) - len(results)
    machines = Counter(f"{result.machine['cpu']}, {result.machine['cores']} cores" for result in results)
    commits = Counter(result.commit for result in results)
    yield f"# {plan.title}"
    yield ""
    yield f"`tropd study {study.path} --page` writes this page from the files in `{plan.results}`. Do not edit it."
    yield ""
    trained = sum(result.objective != BEFORE for result in results)
    yield (
        f"{len(results)} runs are shown: {trained} trained students and {len(results) - trained} evaluations of "
        f"students before training. {missing} runs of the plan are missing."
    )
    yield ""
    yield "- Machine: " + "; ".join(f"{name} ({count} runs)" for name, count in sorted(machines.items())) + "."
    yield "- Commits: " + ", ".join(f"`{name}` ({count})" for name, count in sorted(commits.items())) + "."
    yield (
        "- `±` is half of Student's 95 % interval over seeds. A cell with one seed has none. No interval is corrected "
        "for the number of comparisons."
    )
    yield "- A difference is between runs of the same seed, which begin with the same student."
    yield "- `cut` is the share of greedy answers that reached the longest length."
    yield "- `last` is the mean of the last five steps that a curve keeps. Own tokens are those that the student learns"
    yield "  from as its own; teacher's tokens are those of prefixes."
    yield "- `s` is the wall time of the training. Runs may have shared the machine, so it compares nothing."
    yield ""
    name = next(result.cell for result in results if result.objective != BEFORE)
    yield "A run whose result is there is not repeated. To repeat one, put its result aside:"
    yield ""
    yield "```"
    yield f"tropd study {study.path} --list          # the names of all runs"
    yield f"mv {plan.results}/{name}.json {name}.before.json"
    yield f"tropd study {study.path} --only {name}   # a new folder: {plan.runs}/{name} must not exist"
    yield "```"
    yield ""


def _hints(results: Sequence[CellResult]) -> Iterator[str]:
    """What the hints were worth."""
    yield "## Hints that the runs gave"
    yield ""
    yield "`tropd train` and `tropd eval` print a hint if their numbers name better objectives"
    yield "([choosing](choosing.md)). A hint is right if one of these reached a higher sampled accuracy with the same"
    yield "student, seed and number of steps. It is missed if a run of another objective got none, and one of them was"
    yield f"better by {100 * MISSED:.0f} points."
    yield ""
    yield "| hint | runs | given | right | false alarms | missed |"
    yield "|---|---|---|---|---|---|"
    for row in judge(results):
        yield f"| {row.hint.label} | {row.runs} | {row.given} | {row.right} | {row.false_alarms} | {row.missed} |"
    yield ""


def _runs(results: Sequence[CellResult]) -> Iterator[str]:
    yield "## All runs"
    yield ""
    yield "| run | steps | greedy % | sampled % | s | commit |"
    yield "|---|---|---|---|---|---|"
    for result in results:
        accuracy = result.accuracy
        sampled = "" if accuracy.sampled is None else f"{100 * accuracy.sampled:.1f}"
        commit = f"`{result.commit}`{' with changes' if result.modified else ''}"
        numbers = f"{result.steps} | {100 * accuracy.greedy:.1f} | {sampled} | {result.seconds:.0f}"
        yield f"| {result.cell} | {numbers} | {commit} |"


def _relative(image: Path, page: Path) -> str:
    """The picture's path as the page writes it; both are relative to the same folder."""
    shared = page.parent.parts
    return "/".join(image.parts[len(shared) :]) if image.parts[: len(shared)] == shared else f"/{image.as_posix()}"
