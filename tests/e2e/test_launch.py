"""The launcher as the README shows it: by bash, inside torchrun, and for every recipe.

Signals, hung ranks and two launchers on one machine are faults of tests/faults.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

RECIPES = sorted((jobs.REPOSITORY / "configs").glob("*.yaml"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def printed(command: list[str]) -> tuple[int, str]:
    """(exit code, standard output) of a command in the repository."""
    done = subprocess.run(
        command, cwd=jobs.REPOSITORY, env=jobs.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_and_at_most_60_lines(recipe: Path) -> None:
    assert len(recipe.read_text().splitlines()) <= 60
    code, plan = printed(["bash", "examples/tropd_pretrain.sh", str(recipe), "--dry-run"])
    assert code == 0
    assert str(yaml.safe_load(recipe.read_text())["student"]["path"]) in plan


def test_the_launch_script_prints_the_help_of_tropd_train() -> None:
    code, text = printed(["bash", "examples/tropd_pretrain.sh", "--help"])
    assert code == 0 and text.startswith("usage: tropd train") and "--dry-run" in text


def test_the_dry_run_of_a_recipe_for_several_nodes_needs_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    recipe = next(path for path in RECIPES if "4n8g" in path.stem)
    code, plan = printed(["bash", "examples/tropd_pretrain.sh", str(recipe), "--dry-run"])
    assert code == 0 and "= 32 ranks" in plan
    assert "--nnodes 4 --node-rank R --master-addr 127.0.0.1 --master-port 29500" in plan.splitlines()[-1]


def test_torchrun_can_start_the_launch_script(tmp_path: Path) -> None:
    recipe, run_dir = str(jobs.CONFIG), tmp_path / "run"
    arguments = ["examples/tropd_pretrain.sh", recipe, "--dry-run", f"run.dir={run_dir}"]
    code, plan = printed([*TORCHRUN, *arguments])
    assert code == 0
    alone = printed(["bash", *arguments])[1]
    differs = ("launch ", "ports ")  # torchrun has its own command and its own port
    rows, rows_alone = ([line for line in text.splitlines() if not line.startswith(differs)] for text in (plan, alone))
    assert rows == rows_alone
    assert re.search(r"^ports +ranks meet at \S+, port \d+; rollout.server on a free port", plan, re.MULTILINE)
    assert "= 2 ranks" in plan
    assert not run_dir.exists()
