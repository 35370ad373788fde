"""Draws the committed results: benchmarks/results/*.json -> benchmarks/results/*.svg. Needs the extra `bench`.

python -m benchmarks.plot
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
GREY, BLUE, RED = "#7d8590", "#2f81f7", "#d1462f"
"""Colours that are read on white and on black."""
AXIS_LABELS = {
    "tokens": "tokens",
    "vocabulary": "vocabulary",
    "k": "teacher candidates k",
    "world_size": "tensor-parallel ranks",
}


def main() -> None:
    """Draw every result that exists."""
    plt.rcParams["svg.hashsalt"] = "tropd"  # the same data gives the same file
    for axis in AXIS_LABELS:
        path = RESULTS / f"scaling_{axis}.json"
        if path.exists():
            _save(path, _scaling(axis, json.loads(path.read_text())))
    drawn = {"loss_only": _bars, "fused": _over_floor, "memory": _memory, "quickstart": _quickstart}
    for name, draw in drawn.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            _save(path, draw(json.loads(path.read_text())))


def _quickstart(result: dict[str, Any]) -> Any:
    """Accuracy before, after OPD and after the quickstart, and the curves; read on white and on black."""
    shown = {"before": ("before", GREY), "opd": ("OPD", RED), "after": ("quickstart", BLUE)}
    with plt.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY)):
        figure, (bars, curves) = plt.subplots(1, 2, figsize=(9, 3.1), width_ratios=(1, 1.5))
        for place, (when, (label, colour)) in enumerate(shown.items()):
            found = [result["evaluations"][when][name] for name in ("greedy", "sampled")]
            height = [100 * each["accuracy"] for each in found]
            spread = [
                [100 * (each["accuracy"] - each["low"]) for each in found],
                [100 * (each["high"] - each["accuracy"]) for each in found],
            ]
            drawn = bars.bar(
                [x + 0.27 * place - 0.27 for x in (0, 1)], height, 0.25, yerr=spread, color=colour, ecolor=GREY,
                capsize=3, label=label,
            )  # fmt: skip
            bars.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        bars.set(xticks=(0, 1), xticklabels=("greedy", "sampled, T = 1"), ylim=(0, 138), ylabel="held-out, % right")
        for when, found in result["right"].items():
            label, colour = shown[when]
            curves.plot(found["steps"], [100 * share for share in found["share"]], color=colour, label=label)
        first = result["right"]["after"]["steps"][0]
        if first:
            curves.axvspan(0, first, color=BLUE, alpha=0.15, linewidth=0)
            curves.text(first / 2, 60, "fine-tuning on\nteacher responses", ha="center", fontsize=8)
        curves.set(xlabel="step", ylabel="student's own answers, % right", ylim=(0, 138))
    for plot in (bars, curves):
        plot.patch.set_alpha(0)
        plot.legend(fontsize=8, frameon=False, labelcolor=GREY, loc="upper left", ncols=3)
        for edge in plot.spines.values():
            edge.set_color(GREY)
    figure.patch.set_alpha(0)
    return figure


def _scaling(axis: str, result: dict[str, Any]) -> Any:
    figure, plot = plt.subplots(figsize=(5, 3.2))
    for method in _methods(result):
        rows = [row for row in result["rows"] if row["method"] == method]
        x = [row[axis] for row in rows]
        y = [row["cpu_s"]["median"] for row in rows]
        low = [row["cpu_s"]["median"] - row["cpu_s"]["least"] for row in rows]
        high = [row["cpu_s"]["most"] - row["cpu_s"]["median"] for row in rows]
        plot.errorbar(x, y, yerr=[low, high], marker="o", markersize=3, capsize=2, label=method)
    plot.set(xscale="log", yscale="log", xlabel=AXIS_LABELS[axis], ylabel="CPU seconds per rank")
    plot.legend(fontsize=7)
    return figure


def _bars(result: dict[str, Any]) -> Any:
    figure, (times, memory) = plt.subplots(1, 2, figsize=(8, 3))
    names = _methods(result)
    bars = times.barh(names, [row["cpu_s"]["median"] for row in result["rows"]])
    times.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    times.set(xlabel="CPU seconds per rank")
    bars = memory.barh(names, [row["extra_bytes_per_element"] for row in result["rows"]])
    memory.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    memory.set(xlabel="extra bytes per (token x local column)", yticklabels=[])
    for plot in (times, memory):
        plot.margins(x=0.15)
    return figure


def _over_floor(result: dict[str, Any]) -> Any:
    figure, plot = plt.subplots(figsize=(5, 2.6))
    rows = [row for row in result["rows"] if row["method"] != "floor"]
    middle = [row["over_floor"]["median"] for row in rows]
    spread = [
        [value - row["over_floor"]["least"] for value, row in zip(middle, rows, strict=True)],
        [row["over_floor"]["most"] - value for value, row in zip(middle, rows, strict=True)],
    ]
    plot.errorbar(middle, [row["method"] for row in rows], xerr=spread, fmt="o", capsize=3)
    plot.axvline(1.0, color="grey", linewidth=1)
    plot.set(xlabel="CPU seconds / those of the three matrix products")
    return figure


def _memory(result: dict[str, Any]) -> Any:
    figure, plot = plt.subplots(figsize=(5, 3.2))
    for method in _methods(result):
        rows = [row for row in result["rows"] if row["method"] == method]
        plot.plot([row["tokens"] for row in rows], [row["extra_bytes"] / 1e6 for row in rows], marker="o", label=method)
    plot.set(xlabel="tokens", ylabel="peak extra MB")
    plot.legend(fontsize=7)
    return figure


def _methods(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in result["rows"]))


def _save(path: Path, figure: Any) -> None:
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)
    print(path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
