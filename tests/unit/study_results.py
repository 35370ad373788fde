"""A small plan of a study, and made-up results of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tropd_mcore.study.result import Accuracy, CellResult

ROOT = Path(__file__).resolve().parents[2]

PLAN: dict[str, Any] = {
    "name": "small",
    "title": "A small study",
    "config": str(ROOT / "configs" / "quickstart-cpu.yaml"),
    "runs": "runs/study",
    "results": "results",
    "page": "docs/study.md",
    "images": "docs/images",
    "reference": "opd",
    "evaluation": {"prompts": "models/seed-{seed}/heldout.jsonl"},
    "settings": {"run.seed": "{seed}", "data.prompts": "models/seed-{seed}/train.jsonl"},
    "pairs": {
        "habit": {
            "label": "bad habit",
            "settings": {"student.path": "models/seed-{seed}/student"},
            "prepare": ["python -m examples.make_models models/seed-{seed}"],
        }
    },
    "objectives": {
        "opd": {"label": "OPD", "settings": {"objective.kind": "opd"}},
        "fkl": {"label": "FKL", "settings": {"objective.kind": "gkd", "objective.divergence": "fkl"}},
    },
    "groups": {
        "main": {"label": "Two seeds", "pairs": ["habit"], "objectives": ["opd", "fkl"], "seeds": [1, 2]},
    },
}


def write_plan(folder: Path, plan: dict[str, Any]) -> Path:
    """Write a plan whose results go to `folder`."""
    path = folder / "study.yaml"
    plan = {key: value if key != "results" else str(folder / value) for key, value in plan.items()}
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def result(
    objective: str, seed: int, *, sampled: float = 0.5, curve: Sequence[float | None] = (), hints: Sequence[str] = ()
) -> CellResult:
    """Return a result of the pair `habit` with one curve, of right rollouts."""
    return CellResult(
        cell=f"habit-{objective}-seed{seed}",
        group="main",
        pair="habit",
        objective=objective,
        variant="",
        seed=seed,
        settings=[],
        config="c.yaml",
        commands=[],
        commit="0123456789",
        modified=False,
        machine={"cpu": "a processor", "cores": "2"},
        finished="2026-01-01",
        steps=len(curve),
        seconds=10.0,
        counts={},
        accuracy=Accuracy(0.9, sampled, {"4": 0.9}, 0.0, "1101", [1, 2, 0, 4], "0" * 64),
        hints=list(hints),
        curves={"verifier/accuracy": list(curve)} if curve else {},
        curve_steps=list(range(len(curve))),
    )
