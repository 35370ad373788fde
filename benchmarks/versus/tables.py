"""The tables of docs/performance.md, from results/versus_trl.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.versus.settings import DIVERGENCES, SYSTEMS
from benchmarks.versus.timings import PARTS

BEGIN, END = "<!-- versus_trl: begin -->", "<!-- versus_trl: end -->"
NAMES = {"ours": "tropd_mcore", "trl": "TRL"}
LOSS_NAMES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL"}
PAIRS = ("small", "large")
GIB = 2**30

Result = Mapping[str, Any]
Run = Mapping[str, Any]

FORM: dict[str, tuple[str, ...]] = {
    "": ("command", "machine", "versions", "settings", "models", "target", "student", "before", "same_loss", "runs",
         "limits"),
    "runs": ("pair", "loss", "system", "repeat", "start_up", "seconds", "cpu_s_per_step", "rss_bytes", "pss_bytes",
             "evaluations", "to_target"),
    "same_loss": ("loss", "ours", "trl"),
    "limits": ("asked", "trl", "ours"),
}  # fmt: skip
"""Keys of the result file and of the entries of its lists."""


def check_form(result: Result) -> None:
    """Raise ValueError if the result file is not what the tables are made of."""
    for part, keys in FORM.items():
        for entry in [result] if not part else result[part]:
            missing = [key for key in keys if key not in entry]
            if missing:
                raise ValueError(f"versus_trl.json: expected {', '.join(keys)} in {part or 'the file'}, found no "
                                 f"{', '.join(missing)}")  # fmt: skip
    for run in result["runs"]:
        absent = {*PARTS, "step"} - set(run["seconds"])
        if absent or run["pair"] not in PAIRS or run["loss"] not in DIVERGENCES or run["system"] not in SYSTEMS:
            raise ValueError(f"versus_trl.json: run {run['pair']} {run['loss']} {run['system']}: expected a known name "
                             f"and seconds of each part, found none of {sorted(absent)}")  # fmt: skip
    for cell in cells(result):
        counts = {system: len(chosen(result, *cell, system)) for system in SYSTEMS}
        if len(set(counts.values())) != 1:
            raise ValueError(
                f"versus_trl.json: {' '.join(cell)}: expected as many runs of each trainer, found {counts}"
            )


def cells(result: Result) -> list[tuple[str, str]]:
    """Return the (pair, loss) that were run, in the order of the tables."""
    present = {(run["pair"], run["loss"]) for run in result["runs"]}
    return [(pair, loss) for pair in PAIRS for loss in DIVERGENCES if (pair, loss) in present]


def chosen(result: Result, pair: str, loss: str, system: str) -> list[Run]:
    """Return the repetitions of one cell."""
    return [run for run in result["runs"] if (run["pair"], run["loss"], run["system"]) == (pair, loss, system)]


def spread(values: Sequence[float]) -> str:
    """Return `median (least to most)`."""
    return f"{_median(values)} ({_number(min(values))} to {_number(max(values))})"


def tables(result: Result) -> str:
    """Return all tables as Markdown."""
    check_form(result)
    parts = (_where(result), _target(result), _parts(result), _same_loss(result), _limits(result))
    return "\n\n".join(part for part in parts if part)


def write_docs(page: Path, result: Result) -> None:
    """Replace the lines between the two marks of `page`."""
    text = page.read_text(encoding="utf-8")
    page.write_text(with_tables(text, result), encoding="utf-8")


def with_tables(text: str, result: Result) -> str:
    """Return `text` with the tables between its two marks. Raises ValueError if it does not have both, once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once each in the page, found {text.count(BEGIN)} and "
                         f"{text.count(END)}")  # fmt: skip
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables(result)}\n{END}{rest.split(END)[1]}"


def read(path: Path) -> Result:
    """Return the result file."""
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def _where(result: Result) -> str:
    machine, versions, before = result["machine"], result["versions"], result["before"]
    right = {role: f"{before[role]['right']} of {before[role]['count']}" for role in ("student", "teacher")}
    return (
        f"{machine['cores']} cores of {machine['processor']}, commit {machine['commit']}, {machine['date']}; TRL "
        f"{versions['trl']['trl']} with torch {versions['trl']['torch']}, tropd_mcore with torch "
        f"{versions['ours']['torch']}. Sampled answers of the small pair that are right before training: "
        f"{result['student']} {right['student']}, teacher {right['teacher']}."
    )


def _target(result: Result) -> str:
    rows = []
    for pair, loss in cells(result):
        for system in SYSTEMS:
            runs = [run for run in chosen(result, pair, loss, system) if run["evaluations"]]
            reached = [run["to_target"] for run in runs if run["to_target"] is not None]
            if not runs:
                continue
            who = [LOSS_NAMES[loss], NAMES[system], f"{len(reached)} of {len(runs)}"]
            if not reached:
                rows.append([*who, *["-"] * 5])
                continue
            numbers = [[each["step"] for each in reached]]
            for key in ("cpu_s", "wall_s", "cpu_with_start_up_s", "wall_with_start_up_s"):
                numbers.append([each[key] for each in reached])
            rows.append([*who, *map(spread, numbers)])
    if not rows:
        return ""
    header = ["loss", "trainer", "runs", "steps", "CPU-seconds", "seconds", "CPU-seconds with start-up",
              "seconds with start-up"]  # fmt: skip
    title = f"To {100 * result['target']:.0f} % sampled accuracy, small pair:"
    return f"{title}\n\n{_markdown(header, rows)}"


def _parts(result: Result) -> str:
    rows = []
    for pair, loss in cells(result):
        for system in SYSTEMS:
            runs = chosen(result, pair, loss, system)
            rows.append([
                pair, LOSS_NAMES[loss], NAMES[system],
                *(_median([run["seconds"][part] for run in runs]) for part in PARTS),
                spread([run["seconds"]["step"] for run in runs]),
                spread([run["cpu_s_per_step"] for run in runs]),
                _median([run["rss_bytes"] / GIB for run in runs]),
                _median([run["pss_bytes"] / GIB for run in runs]),
            ])  # fmt: skip
    header = ["pair", "loss", "trainer", "rollout", "teacher", "forward and backward", "optimizer", "rest", "step",
              "CPU-seconds per step", "peak RSS, GiB", "peak PSS, GiB"]  # fmt: skip
    return f"Seconds per step:\n\n{_markdown(header, rows)}"


def _same_loss(result: Result) -> str:
    columns = [(key, system) for key in ("loss", "gradient_norm") for system in SYSTEMS]
    rows = [
        [LOSS_NAMES[each["loss"]], *(f"{each[system][key]:.7g}" for key, system in columns)]
        for each in result["same_loss"]
    ]
    header = ["loss", "value, tropd_mcore", "value, TRL", "gradient norm, tropd_mcore", "gradient norm, TRL"]
    return f"The same responses, before the first update:\n\n{_markdown(header, rows)}" if rows else ""


def _limits(result: Result) -> str:
    rows = [
        [each["asked"], *(_code(each[system]["printed"]) for system in ("trl", "ours"))] for each in result["limits"]
    ]
    version = result["versions"]["trl"]["trl"]
    return f"What was asked of both:\n\n{_markdown(['asked', f'TRL {version}', 'tropd_mcore'], rows)}" if rows else ""


def _median(values: Sequence[float]) -> str:
    return _number(median(values))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _code(text: str) -> str:
    """Return `text` as code that Markdown shows as it is."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        yield f"| {' | '.join(header)} |"
        yield "|" + "---|" * len(header)
        for row in rows:
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"

    return "\n".join(lines())
