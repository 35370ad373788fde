"""docs/extending.md works: its code, placed as the page says, passes the checks that the page names.

The tests use a copy of the repository, in processes that import the copy. Invariant: a block without a place, or with
one that does not exist, is an error. No block is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
COPIED = ("tropd_mcore", "tests", "docs", "configs", "examples", "README.md", "pyproject.toml")
INVENTED = {"my_objectives.py", "check_my_objective.py", "weights/FAMILY.py", "teacher/NEW.py"}
"""Files that only the reader has."""
FOLDERS = ("tropd_mcore", ".", "tests/unit")
"""Folders of files that the page names by a shortened path."""
FENCE = "```"
BEGINNINGS = (f"{FENCE}python", f"{FENCE}text")
"""Fences of blocks that go into a file. A bare fence starts commands. `text` marks partial Python, to skip ruff."""
NEW = re.compile(r"New file `(?P<path>[^`]+)`:")
END = re.compile(r"At the end of `(?P<path>[^`]+)`, after two empty lines:")
BELOW = re.compile(r"In `(?P<path>[^`]+)`, below the line `(?P<line>.+)`:")
INSTEAD = re.compile(r"In `(?P<path>[^`]+)`, instead of the line `(?P<line>.+)`:")
COPY = re.compile(r"Copy `(?P<source>[^`]+)` to `(?P<path>[^`]+)`\.")


@dataclass(frozen=True)
class Edit:
    """One change to a file that the page describes."""

    label: str
    """The line above the block, or the line that says what to copy."""
    code: str = ""

    def apply(self, root: Path) -> None:
        """Apply the change. An AssertionError says what is wrong with the page."""
        found = next((match for kind in (NEW, END, BELOW, INSTEAD, COPY) if (match := kind.match(self.label))), None)
        assert found is not None, f"a block has to stand under a line that says where it goes, not {self.label!r}"
        path = root / found["path"]
        if found.re in (NEW, COPY):
            assert not path.exists(), f"{found['path']} is there already"
            path.write_text(self.code if found.re is NEW else (root / found["source"]).read_text())
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        if found.re is END:
            lines += ["", ""]
            at = len(lines)
        else:
            places = [number for number, line in enumerate(lines) if line.strip() == found["line"]]
            assert len(places) == 1, f"{found['path']} has {len(places)} lines {found['line']}"
            at = places[0] + (found.re is BELOW)
        rest = lines[at + (found.re is INSTEAD) :]
        path.write_text("\n".join([*lines[:at], *self.code.splitlines(), *rest, ""]), encoding="utf-8")


def edits(text: str) -> Iterator[Edit]:
    """The changes that the page describes, in order."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if COPY.match(line):
            yield Edit(line)
        elif line in BEGINNINGS:
            end = lines.index(FENCE, number)
            yield Edit(lines[number - 1], "\n".join(lines[number + 1 : end]) + "\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository after a reader has followed sections 1 to 3."""
    root = tmp_path_factory.mktemp("extending")
    for name in COPIED:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / name, root / name)
    for edit in edits(PAGE):
        edit.apply(root)
    return root


def run(root: Path, *arguments: str, code: int = 0) -> str:
    """Run Python in the copy and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tropd(root: Path, *arguments: str) -> str:
    assert f"tropd {arguments[0]} " in PAGE
    return run(root, "-m", "tropd_mcore.cli.main", *arguments)


def test_every_file_function_and_test_named_on_the_page_exists(copy: Path) -> None:
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|sh))(?:: (\w+))?`", PAGE)
    assert len(named) > 80
    for name, function in named:
        if name in INVENTED:
            continue
        found = [path for folder in FOLDERS if (path := copy / folder / name).is_file()]
        assert found, name
        assert not function or re.search(rf"^ *def {function}\(", found[0].read_text(), re.MULTILINE), function
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (copy / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name


def test_the_files_named_in_the_commands_exist(copy: Path) -> None:
    for line in re.findall(r"^pytest (.+)$", PAGE, re.MULTILINE):
        for name in line.split():
            group = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
            files = [f"{group[1]}{part}{group[3]}" for part in group[2].split(",")] if group else [name]
            assert all((copy / file).is_file() for file in files), line


def test_the_custom_objective_of_the_page_passes_its_check(copy: Path) -> None:
    assert run(copy, "check_my_objective.py") == "loss and gradient are right\n"


def test_the_code_of_the_page_passes_ruff(copy: Path) -> None:
    written = sorted({match[1] for match in re.finditer(r"`((?:tropd_mcore|tests)/\S+\.py)`(?=[,:.])", PAGE)})
    files = [name for name in written if any(name in edit.label for edit in edits(PAGE))]
    assert len(files) == 7
    run(copy, "-m", "ruff", "check", *files, "my_objectives.py")
    run(copy, "-m", "ruff", "format", "--check", *files, "my_objectives.py", "check_my_objective.py")


def test_the_new_objective_is_known_to_the_configuration(copy: Path) -> None:
    explained = tropd(copy, "config", "--explain", "objective.bound")
    assert "objective.kind: tanh_opd" in explained and "number > 0; default 5.0" in explained
    resolved = tropd(copy, "config", "configs/quickstart-cpu.yaml", "objective={kind: tanh_opd, bound: 3.0}")
    assert "kind: tanh_opd  # command line" in resolved and "bound: 3.0  # command line" in resolved


def test_the_new_objective_equals_its_oracle(copy: Path) -> None:
    """On two ranks, in float64, from hidden states: two cells of those that the page runs."""
    part = ("--quick", "--dtype", "float64", "--form", "fused", "--tp", "2", "--json", "-")
    found = json.loads(tropd(copy, "conformance", "--objective", "tanh_opd", *part))
    assert [cell["status"] for cell in found["cells"]] == ["ok"] * 2


MEASURE = """
import sys
from pathlib import Path

import numpy as np

from tests.objective_batch import Batch
from tests.unit.test_monitor_metrics import make_record, make_rollout
from tropd_mcore.config.loader import load
from tropd_mcore.config.objectives.squashed import TanhOpdObjective
from tropd_mcore.monitor.monitor import Monitor
from tropd_mcore.objectives.registry import bind_objective
from tropd_mcore.types import TokenTable

inputs = Batch(moved=0.5).inputs()
columns = {n: c.numpy() for n, c in bind_objective(TanhOpdObjective(bound=0.5))(inputs).columns.items()}
here = np.arange(len(inputs.target_ids_T))
columns |= {"on": inputs.student_mask_T.numpy(), "off": inputs.prefix_mask_T.numpy(), "sample_index": here * 0}
columns |= {"token_index": here, "epoch": here * 0, "excluded": here * 0.0, "impossible": here < 0}
columns |= {"old_logp": inputs.old_logp_T.numpy(), "rollout_logp": inputs.rollout_logp_T.numpy()}
record = make_record(table=TokenTable(columns), rollouts=[make_rollout(0, 1, 0, len(here), "stop")])
config, _ = load("configs/quickstart-cpu.yaml", [])
Monitor(config, Path(sys.argv[1]), rank=0).log(0, record)
on_T, log_ratio_T = columns["on"], columns["log_ratio"]
print(np.abs(log_ratio_T[on_T]).mean(), np.abs(log_ratio_T - 0.5 * np.tanh(log_ratio_T / 0.5))[on_T].mean())
"""


def test_the_new_metrics_are_documented_and_computed(copy: Path, tmp_path: Path) -> None:
    printed = tropd(copy, "metrics", "log_ratio/")
    assert "log_ratio/absolute  [nats, over student tokens]\n    mean |r|\n" in printed and "log_ratio/lost" in printed
    expected = [float(number) for number in run(copy, "-c", MEASURE, str(tmp_path)).splitlines()[-1].split()]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)[f"log_ratio/{name}"] for name in ("absolute", "lost")]
    assert found == pytest.approx(expected, rel=1e-6) and 0.1 < found[1] < found[0]


@pytest.mark.slow
def test_the_tests_named_on_the_page_pass_except_those_that_wait_for_documentation(copy: Path) -> None:
    (objective,) = re.findall(r"^pytest tests/unit/test_\{(.+)\}\.py$", PAGE, re.MULTILINE)
    files = [f"tests/unit/test_{name}.py" for name in objective.split(",")] + ["tests/unit/test_monitor_metrics.py"]
    chosen = ("-m", "not slow", "-k", "not test_row_constants or tanh_opd")  # of each kind, the one that is new
    told = run(copy, "-m", "pytest", "-q", *chosen, "-p", "no:cacheprovider", "-rf", "--tb=no", *files, code=1)
    failed = re.findall(r"^FAILED (\S+?)::(\w+)", told, re.MULTILINE)
    assert sorted(Path(file).stem for file, _ in failed) == [
        "test_conformance_plan", *3 * ["test_objective_docs"], *2 * ["test_objective_settings"],
    ]  # fmt: skip
    assert all(name in PAGE for _, name in failed[2:])
    assert "6 failed" in told and "error" not in told
