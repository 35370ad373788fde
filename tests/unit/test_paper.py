"""docs/paper.md: its data commands run on small files of the same formats, its rows load, and its means are right."""

from __future__ import annotations

import glob
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.public_sets import AIME24, AIME25, AMC, open_thoughts, write_jsonl, write_parquet
from tests.tiny_models import write_tiny_model
from tropd_mcore.cli.main import main
from tropd_mcore.config.loader import load
from tropd_mcore.data.prompt_file import read_prompt_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", PAGE, flags=re.DOTALL)
P0 = "r1-distill-qwen-1.5b-from-skywork-or1-math-7b-1n8g-tp2.yaml"
QWEN3 = "qwen3-sft-1.7b-from-qwen3-nemotron-4b-1n8g-tp2.yaml"
TABLES = re.findall(r"^\| row of the paper \|.*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)
ROWS = [
    (number, [cell.strip() for cell in line.strip("|").split(" | ")])
    for number, table in enumerate(TABLES)
    for line in table.splitlines()[2:]
]


def commands(word: str) -> list[list[str]]:
    """The commands of the page that begin with `tropd <word>`, split as a shell does, with its variables."""
    text = "\n".join(BLOCKS).replace("\\\n", " ")
    variables = dict(re.findall(r"^(\w+)='([^']*)'$", text, flags=re.MULTILINE))
    variables |= dict(re.findall(r'^(\w+)="([^"]*)"$', text, flags=re.MULTILINE))
    variables |= dict(re.findall(r"^(\w+)=(\S+\.yaml)$", text, flags=re.MULTILINE))
    found = []
    for line in re.findall(rf"^ *tropd {word} (.*)$", text, flags=re.MULTILINE):
        arguments = []
        for part in shlex.split(line):
            name = part.removeprefix("$")
            value = variables.get(name, part) if part.startswith("$") else part
            arguments += value.split() if name == "EVAL" else [value]
        found.append(arguments)
    return found


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of step 1, with small files; one training question is one of AIME."""
    monkeypatch.chdir(tmp_path)
    for name in ("OpenThoughts3-1.2M/data", "aime_2024/data", "aime25", "amc23"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    questions = [("math", f"What is {n} plus {n}?") for n in range(8)] + [("code", "Print a list.")]
    rows = open_thoughts([*questions, ("math", AIME24[0]["problem"])], copies=16)
    for part in range(2):
        write_parquet(tmp_path / "raw" / "OpenThoughts3-1.2M" / "data" / f"train-{part}.parquet", rows[part::2])
    write_parquet(tmp_path / "raw" / "aime_2024" / "data" / "train-00000-of-00001.parquet", AIME24)
    write_jsonl(tmp_path / "raw" / "aime25" / "test.jsonl", AIME25)
    write_parquet(tmp_path / "raw" / "amc23" / "test-00000-of-00001.parquet", AMC)
    for name in ("DeepSeek-R1-Distill-Qwen-1.5B", "Qwen3-SFT-1.7B"):
        write_tiny_model(tmp_path / "models" / name, num_hidden_layers=1)
    return tmp_path


def test_the_data_commands_of_the_page_run_in_order_and_write_what_the_recipes_read(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = commands("prompts")
    assert len(found) == 5
    for arguments in found:
        files = [path for part in arguments for path in (sorted(glob.glob(part)) if "*" in part else [part])]
        assert main(["prompts", *files]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "16 without domain=math" in told and "1 ask a question of aime24.jsonl, aime25.jsonl, amc23.jsonl" in told
    for recipe, count in ((P0, 8), (QWEN3, 9)):
        config, _ = load(str(ROOT / "configs" / recipe), [])
        assert len(read_prompt_file(raw / config.data.prompts)) == count
    for name, rows in (("aime24", AIME24), ("aime25", AIME25), ("amc23", AMC)):
        records = read_prompt_file(raw / "data" / f"{name}.jsonl")
        assert len(records) == len(rows) and all(record.answer for record in records)
        assert str(records[0].prompt[-1]["content"]).endswith("put your final answer within \\boxed{}.")  # type: ignore[index]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1][0]}")
def test_the_mean_of_each_row_is_the_mean_of_its_numbers(row: tuple[int, list[str]]) -> None:
    *numbers, mean = map(float, row[1][1:-1])
    assert abs(sum(numbers) / len(numbers) - mean) < 0.0101, row


@pytest.mark.parametrize("row", [row for row in ROWS if "objective=" in row[1][-1]], ids=lambda row: row[1][0])
def test_each_row_is_a_setting_that_the_recipe_accepts(row: tuple[int, list[str]]) -> None:
    number, cells = row
    (override,) = re.findall(r"`(objective=\{.*\})`", cells[-1])
    config, _ = load(str(ROOT / "configs" / (QWEN3 if number == 2 else P0)), [override])
    assert config.run.steps == 200 and f"kind: {config.objective.kind}" in override


def test_the_settings_of_the_evaluation_and_the_reported_form_are_accepted() -> None:
    found = commands("eval")
    assert len(found) == 2
    for arguments in found:
        overrides = [part for part in arguments if re.match(r"[a-z]+\.[a-z_.]+=", part)]
        config, _ = load(str(ROOT / arguments[0]), overrides)
        assert len(overrides) == 4 and config.verifier.kind == "math_verify"
        assert config.rollout.max_new_tokens == 32768 and config.rollout.temperature == 0.6
    (reported,) = re.findall(r"`(objective=\{kind: tropd, outlier: \{mode: fkl_scalar\}.*?\})`", PAGE)
    load(str(ROOT / "configs" / P0), [reported])
    load(str(ROOT / "configs" / QWEN3), ["verifier.kind=math_verify", *overrides])


@pytest.mark.parametrize("recipe", [P0, QWEN3])
def test_the_recipes_have_the_settings_that_the_paper_states(recipe: str) -> None:
    config, _ = load(str(ROOT / "configs" / recipe), [])
    stated = (config.run.steps, config.rollout.prompts_per_step, config.rollout.samples_per_prompt)
    assert stated == (200, 128, 4) and config.rollout.max_new_tokens == 8096
    assert config.optimizer.learning_rate == 5e-6 and config.optimizer.schedule == "constant"
    assert config.optimizer.warmup_steps == 0 and config.optimizer.weight_decay == 0.1
    objective = json.loads(config.objective.model_dump_json())
    assert objective["kind"] == "tropd" and objective["outlier"]["topk"] == 64
    assert objective["outlier"]["mode"] == "fkl_direct" and objective["trust"]["mode"] == "bernoulli"
    assert objective["guidance"]["beta"] == 1e-3 and objective["guidance"]["schedule"] == "cosine"
    assert config.rollout.temperature == 1.0 and config.rollout.top_p == 1.0
    assert recipe in PAGE
