"""The launcher as the README shows it: by bash, inside torchrun, and for every recipe."""

from __future__ import annotations

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


def test_torchrun_starts_the_same_script(tmp_path: Path) -> None:
    recipe, run_dir = str(jobs.CONFIG), tmp_path / "run"
    arguments = ["examples/tropd_pretrain.sh", recipe, "--dry-run", f"run.dir={run_dir}"]
    code, plan = printed([*TORCHRUN, *arguments])
    assert code == 0
    assert plan == printed(["bash", *arguments])[1]
    assert "= 2 ranks" in plan
    assert not run_dir.exists()
