"""The committed result of the soak: long enough, of a known commit, and nothing in it grows beyond its bound."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults.results import places_in

RESULT = Path(__file__).with_name("results") / "soak.json"
STEPS = 1500
RANK_BYTES = 2048.0
"""Bytes per step of a process of ours. Without the release after a checkpoint a rank has 3,000 to 9,000."""
SERVER_BYTES = 4096.0
"""The same for a process of SGLang, which keeps some memory for each of about 25 requests per step."""
DISK_BYTES = 4096.0
"""Bytes per step of the run directory if every key that bounds a part of it is set: a line of metrics.jsonl."""
LITTLE = 0.01
"""Handles, threads and names per step: one in a hundred steps."""
ROLES = {"launcher", "rank 0", "rank 1", "rollout server", "rollout server > sglang::scheduler"}


@cache
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def problems(result: dict[str, Any]) -> list[str]:
    """Everything in a result that grows beyond its bound, or is missing."""
    found = [f"no {role}" for role in sorted(ROLES - {row["role"] for row in result["processes"]})]
    for row in result["processes"]:
        bound = SERVER_BYTES if "server" in row["role"] else RANK_BYTES
        bounds = {"anonymous": bound, "rss": bound, "handles": LITTLE, "threads": LITTLE}
        found += [f"{row['role']}: {name}" for name, most in bounds.items() if row["growth"][name]["slope"] > most]
    shared = result["shared_memory"]
    found += [f"/dev/shm: {name}" for name in ("bytes", "names", "names_ever") if shared[name]["slope"] > LITTLE]
    if result["folders"]["run.dir"]["all"]["bytes"]["slope"] > DISK_BYTES:
        found.append("run.dir")
    if result["folders"]["TMPDIR"]["all"]["files"]["slope"] > LITTLE:
        found.append("TMPDIR")
    return found + [name for name in ("processes", "shared_memory", "temporary") if result[f"left_{name}"]]


def test_the_soak_is_long_enough_and_of_a_known_commit() -> None:
    result = content()
    assert result["steps"] >= STEPS and result["ranks"] == 2
    assert len(result["commit"]) == 40 and result["changed_files"] == 0
    assert places_in(result) == []


def test_in_the_soak_nothing_grows_beyond_its_bound_and_nothing_is_left_behind() -> None:
    assert problems(content()) == []


def flat(**slopes: float) -> dict[str, Any]:
    """Quantities that do not grow, except those given."""
    names = ("anonymous", "rss", "handles", "threads", "bytes", "files", "names", "names_ever")
    return {name: {"slope": slopes.get(name, 0.0)} for name in names}


def made_up(rank_0: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """A result without a problem, except for the given changes."""
    grown = {"rank 0": rank_0 or flat()}
    left: dict[str, list[str]] = {f"left_{name}": [] for name in ("processes", "shared_memory", "temporary")}
    return {
        "processes": [{"role": role, "growth": grown.get(role, flat())} for role in ROLES],
        "shared_memory": flat(),
        "folders": {"run.dir": {"all": flat()}, "TMPDIR": {"all": flat()}},
        **left,
        **parts,
    }


@pytest.mark.parametrize("name", ["anonymous", "rss", "handles", "threads"])
def test_growing_memory_of_a_process_is_a_problem(name: str) -> None:
    assert problems(made_up()) == []
    assert problems(made_up(flat(**{name: 9000.0}))) == [f"rank 0: {name}"]


def test_growing_shared_memory_or_disk_use_is_a_problem() -> None:
    folders = {"run.dir": {"all": flat(bytes=22_000.0)}, "TMPDIR": {"all": flat(files=1.0)}}
    assert problems(made_up(folders=folders)) == ["run.dir", "TMPDIR"]
    assert problems(made_up(shared_memory=flat(names=1.0))) == ["/dev/shm: names"]


def test_shared_memory_left_behind_and_an_unseen_process_are_problems() -> None:
    rows = [row for row in made_up()["processes"] if row["role"] != "rank 1"]
    assert problems(made_up(processes=rows, left_shared_memory=["torch_1"])) == ["no rank 1", "shared_memory"]
