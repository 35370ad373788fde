"""docs/own-data.md works as it is written: its files are read, its programs run, and its run trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e import jobs
from tests.tiny_models import write_tiny_model
from tropd_mcore.data.responses import read_responses

PAGE = (jobs.REPOSITORY / "docs" / "own-data.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.e2e


def blocks(language: str) -> list[str]:
    """The blocks of the page in one language, in order."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands(word: str) -> list[str]:
    """The lines of the page that begin with `word`, without their comments."""
    lines = [line.partition("  #")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith(word)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and the prompts and configuration of the page."""
    root = tmp_path_factory.mktemp("mine")
    for seed, name in enumerate(("student", "teacher")):
        write_tiny_model(root / "models" / name, seed=seed, num_hidden_layers=2)
    (root / "prompts.jsonl").write_text(blocks("json")[0])
    (root / "mine.yaml").write_text(blocks("yaml")[0])
    return root


def run(folder: Path, *command: str) -> str:
    """Output of a command of the page; fails with it."""
    done = subprocess.run(
        command, cwd=folder, env=jobs.environment(), capture_output=True, text=True, timeout=jobs.LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tropd(folder: Path, line: str) -> str:
    return run(folder, sys.executable, "-m", "tropd_mcore.cli.main", *line.split()[1:])


def program(folder: Path, part: str) -> str:
    """Output of the program of the page that has `part` in it, over the replayed run."""
    (found,) = [text for text in blocks("python") if part in text]
    return run(folder, sys.executable, "-c", found.replace("runs/mine", "runs/replayed"))


def test_the_converter_in_own_data_writes_lines_that_doctor_accepts(folder: Path) -> None:
    turns = [{"from": "human", "value": "how many apples"}, {"from": "gpt", "value": "five"}]
    (folder / "converted").mkdir()
    (folder / "converted" / "sharegpt.json").write_text(json.dumps([{"conversations": turns}]))
    program(folder / "converted", "sharegpt")
    found = tropd(folder, "tropd doctor mine.yaml data.prompts=converted/prompts.jsonl")
    assert "doctor: no FAIL" in found, found


def test_doctor_finds_no_problem_in_the_example_prompts_and_configuration_of_own_data(folder: Path) -> None:
    assert "doctor: no FAIL" in (found := tropd(folder, commands("tropd doctor")[0])), found
    assert "student" in (plan := tropd(folder, commands("tropd train mine.yaml --dry-run")[0])), plan


def test_the_example_responses_in_own_data_can_be_read(folder: Path) -> None:
    path = folder / "responses.jsonl"
    path.write_text(blocks("json")[1])
    end = AutoTokenizer.from_pretrained(folder / "models" / "student").eos_token_id
    found = read_responses(path, [end], vocab_size=307)
    assert {name: ids.tolist() for name, ids in found.items()} == {"sum-1": [12, 15, 9], "sum-2": [11, 8]}


def test_a_run_on_the_example_rollouts_of_own_data_writes_the_files_that_its_programs_read(folder: Path) -> None:
    assert "4 rollouts of step 0" in program(folder, "save_rollouts")
    tropd(folder, commands("tropd train mine.yaml run.dir")[0])
    assert program(folder, "metrics.jsonl").splitlines()[0].startswith("0 ")
    assert re.search(r"\d+ tokens, \d+ outliers, \[.*'log_ratio'", program(folder, "tokens/step_000000.npz"))
    assert (folder / "runs" / "replayed" / "export" / "config.json").is_file()
