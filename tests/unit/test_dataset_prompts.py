"""`tropd prompts` turns published data sets into prompt files. Nothing disappears without a number, and no question of
a held-out set slips in."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.public_sets import AIME24, AIME25, AMC, MATH500, dapo, open_thoughts, write_jsonl, write_parquet
from tests.tiny_models import write_tiny_model
from tropd_mcore.cli.main import main
from tropd_mcore.config.schema import DataConfig, VerifierConfig
from tropd_mcore.data.chat import Renderer
from tropd_mcore.data.dataset_prompts import Columns, Counts, candidates, lines
from tropd_mcore.data.dataset_rows import read_rows
from tropd_mcore.data.prompt_file import read_prompt_file
from tropd_mcore.data.prompts import PromptNeeds, load_prompts
from tropd_mcore.data.verify import answer_problem

QUESTIONS = [("math", "What is 2 plus 3?"), ("math", "What is 2 plus 4?"), ("code", "Print a list."), ("math", "  ")]
TEMPLATE = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
BOXED = TEMPLATE.removeprefix("{prompt}")
FORMS = {"jsonl": write_jsonl, "parquet": write_parquet}


class Command:
    """`tropd prompts` in a folder."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.out = folder / "out.jsonl"

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, output, error lines without the log."""
        code = main(["prompts", *map(str, arguments), *([] if "--out" in arguments else ["--out", str(self.out)])])
        captured = self.capsys.readouterr()
        log = re.compile(r"^\d\d:\d\d:\d\d ")
        told = [line for line in captured.err.splitlines() if not log.match(line)]
        return code, captured.out, "\n".join(told).removeprefix("error: ").replace(str(self.folder), "DIR")

    def refused(self, *arguments: str | Path) -> str:
        code, out, err = self(*arguments)
        assert code == 2 and not out and not self.out.exists(), (code, out, err)
        assert "Traceback" not in err
        return err

    def written(self, *arguments: str | Path) -> tuple[list[dict[str, Any]], str]:
        code, out, err = self(*arguments)
        assert code == 0, err
        return [json.loads(line) for line in self.out.read_text().splitlines()], out


@pytest.fixture
def prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.mark.parametrize("form", FORMS)
def test_a_set_with_many_answers_per_question_gives_one_prompt_each_and_no_answer_in_it(
    prompts: Command, form: str
) -> None:
    source = FORMS[form](prompts.folder / f"set.{form}", open_thoughts(QUESTIONS))
    chosen = ["--prompt-field", "conversations", "--where", "domain=math", "--template", TEMPLATE]
    found, told = prompts.written(source, *chosen, "--name", "ot3")
    assert found == [
        {"id": "ot3-0", "messages": [{"role": "user", "content": "What is 2 plus 3?" + BOXED}]},
        {"id": "ot3-3", "messages": [{"role": "user", "content": "What is 2 plus 4?" + BOXED}]},
    ]
    for line in (
        "12 rows in 1 files", "3 without domain=math", "3 without a question", "4 repeat the prompt of an earlier row",
        "9 had an answer after the question, which was cut off", "not compared with an evaluation set",
    ):  # fmt: skip
        assert line in told
    assert [record.prompt_id for record in read_prompt_file(prompts.out)] == ["ot3-0", "ot3-3"]


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_is_found_in_a_column_of_objects_and_in_a_list_of_one(prompts: Command, form: str) -> None:
    source = FORMS[form](prompts.folder / f"set.{form}", dapo([("A?", "34"), ("B?", '["7"]'), ("C?", "[0, 1]")]))
    found, _ = prompts.written(source, "--prompt-field", "prompt", "--answer-field", "reward_model.ground_truth")
    assert [line["answer"] for line in found] == ["34", "7", "[0, 1]"]
    assert found[0]["messages"] == [{"role": "user", "content": "Solve the problem.\n\nA?"}]


def test_rows_without_an_answer_with_several_or_with_contradicting_ones_are_counted(prompts: Command) -> None:
    rows = dapo([("A?", "1"), ("A?", "1"), ("B?", "2"), ("B?", "3"), ("C?", None), ("D?", ' ["4", "5"]'), ("E?", " ")])
    source = write_jsonl(prompts.folder / "set.jsonl", rows)
    found, told = prompts.written(source, "--prompt-field", "prompt", "--answer-field", "reward_model.ground_truth")
    assert [line["answer"] for line in found] == ["1"]
    for line in ("2 without an answer in", "1 with several answers in", "2 repeat", "1 prompts have rows with diff"):
        assert line in told
    record = json.loads(prompts.out.with_name("out.jsonl.source.json").read_text())
    counts = record["counts"]
    kept = {"rows", "written", "answer_turns"}
    assert counts["rows"] == 7 == counts["written"] + sum(n for name, n in counts.items() if name not in kept)


@pytest.mark.parametrize(
    ("form", "rows", "answers"),
    [
        ("parquet", AIME24, ["023", "033", "043"]),
        ("jsonl", AIME25, ["70", "71", "72"]),
        ("jsonl", MATH500, [row["answer"] for row in MATH500]),
        ("parquet", AMC, ["27", "28", "29"]),
    ],
    ids=["AIME 2024", "AIME 2025", "MATH-500", "AMC 2023"],
)
def test_evaluation_sets_become_prompts_whose_answers_the_verifier_can_read(
    prompts: Command, form: str, rows: list[dict[str, Any]], answers: list[str]
) -> None:
    source = FORMS[form](prompts.folder / f"set.{form}", rows)
    ids = "unique_id" if "unique_id" in rows[0] else "id"
    question = "problem" if "problem" in rows[0] else "question"
    found, _ = prompts.written(source, "--prompt-field", question, "--answer-field", "answer", "--id-field", ids)
    assert [line["answer"] for line in found] == answers
    assert [line["id"] for line in found] == [str(row[ids]) for row in rows]
    verifier = VerifierConfig(kind="math_verify")
    assert [answer_problem(verifier, answer) for answer in answers] == [None] * len(answers)


def held_out(prompts: Command, rows: list[dict[str, Any]], *arguments: str) -> Path:
    path = prompts.folder / "held.jsonl"
    source = write_jsonl(prompts.folder / "held-source.jsonl", rows)
    wanted = ["--prompt-field", "problem", "--answer-field", "answer"]
    assert prompts(source, *wanted, *arguments, "--out", path)[0] == 0
    return path


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_question_of_a_held_out_set_is_refused_removed_or_kept_as_the_user_says(
    prompts: Command, template: str | None
) -> None:
    """It stands in other instructions, with other white space and case. The held-out file has its own template."""
    held = held_out(prompts, AIME24, *([] if template is None else ["--template", template]))
    disguised = AIME24[1]["problem"].upper().replace(" ", "  ")
    source = write_jsonl(prompts.folder / "set.jsonl", dapo([("A?", "1"), (disguised, "2")]))
    arguments = [source, "--prompt-field", "prompt", "--held-out", held]
    err = prompts.refused(*arguments)
    assert err.startswith("1 prompts ask a question of a held-out file; give --overlap remove (or keep, if accuracy on")
    assert "DIR/set.jsonl:2: 'Find the number of ways to seat 3 guests" in err
    found, told = prompts.written(*arguments, "--overlap", "remove")
    assert len(found) == 1 and "1 ask a question of held.jsonl" in told
    prompts.out.unlink()
    found, told = prompts.written(*arguments, "--overlap", "keep")
    assert len(found) == 2 and "0 ask a question of held.jsonl (kept, not counted)" in told


def test_a_short_held_out_question_inside_a_longer_one_is_no_overlap_but_an_equal_one_is(prompts: Command) -> None:
    held = held_out(prompts, [{"problem": "What is 2 plus 3?", "answer": "5"}])
    longer = {"problem": "If what is 2 plus 3? is a question, who asks?"}
    source = write_jsonl(prompts.folder / "set.jsonl", [longer])
    assert len(prompts.written(source, "--prompt-field", "problem", "--held-out", held)[0]) == 1
    prompts.out.unlink()
    write_jsonl(source, [longer, {"problem": "what is 2  plus 3"}])
    assert "1 prompts ask" in prompts.refused(source, "--prompt-field", "problem", "--held-out", held)


def test_training_accepts_the_written_prompts(prompts: Command) -> None:
    write_tiny_model(prompts.folder / "model", num_hidden_layers=1)
    source = write_jsonl(prompts.folder / "set.jsonl", dapo([("two pears", "2"), ("five apples", '["5"]')]))
    prompts.written(source, "--prompt-field", "prompt", "--answer-field", "reward_model.ground_truth")
    verifier = VerifierConfig(kind="math_verify")
    loaded = load_prompts(
        DataConfig(prompts=prompts.out), Renderer(prompts.folder / "model"), seed=0,
        needs=PromptNeeds(answers="for the test", verifier=verifier),
    )  # fmt: skip
    assert [(prompt.prompt_id, prompt.answer) for prompt in loaded.prompts] == [("out-0", "2"), ("out-1", "5")]


def test_prompts_beyond_the_limit_and_the_token_budget_are_counted_and_a_seed_draws_them(prompts: Command) -> None:
    write_tiny_model(prompts.folder / "model", num_hidden_layers=1)
    rows = [{"question": " ".join(["two"] * (n + 1))} for n in range(20)]
    source = write_jsonl(prompts.folder / "set.jsonl", rows)
    budget = ["--model", prompts.folder / "model", "--max-prompt-tokens", "30"]
    found, told = prompts.written(source, "--prompt-field", "question", *budget)
    assert 0 < len(found) < 20 and f"{20 - len(found)} longer than 30 tokens" in told
    prompts.out.unlink()
    first, told = prompts.written(source, "--prompt-field", "question", "--limit", "5")
    assert [line["id"] for line in first] == [f"out-{n}" for n in range(5)] and "15 beyond --limit 5" in told
    prompts.out.unlink()
    drawn, _ = prompts.written(source, "--prompt-field", "question", "--limit", "5", "--seed", "7")
    assert [line["id"] for line in drawn] == [f"out-{n}" for n in sorted(random.Random(7).sample(range(20), 5))]


def test_several_files_are_one_set_and_the_record_says_what_the_prompts_were_made_from(prompts: Command) -> None:
    one = write_jsonl(prompts.folder / "a.jsonl", [{"q": "one"}, {"q": "two"}])
    two = write_jsonl(prompts.folder / "b.jsonl", [{"q": "two"}, {"q": "three"}])
    found, told = prompts.written(one, two, "--prompt-field", "q")
    assert [line["id"] for line in found] == ["out-0", "out-1", "out-3"] and "4 rows in 2 files" in told
    record = json.loads(prompts.out.with_name("out.jsonl.source.json").read_text())
    assert list(record["sources"]) == [str(one), str(two)] and len(record["sources"][str(one)]) == 64
    assert record["options"]["prompt_field"] == "q" and record["counts"]["written"] == 3


def test_an_equal_file_may_be_written_again_and_one_that_differs_is_kept(prompts: Command) -> None:
    source = write_jsonl(prompts.folder / "set.jsonl", [{"q": "one"}])
    prompts.written(source, "--prompt-field", "q")
    prompts.written(source, "--prompt-field", "q")
    before = prompts.out.read_bytes()
    code, _, err = prompts(source, "--prompt-field", "q", "--template", "Say {prompt}")
    assert code == 2 and err == "--out DIR/out.jsonl: exists and differs; remove it, or choose another name"
    assert prompts.out.read_bytes() == before


GOOD = [{"q": "one", "a": "1", "chat": [{"role": "user", "content": "x"}]}]
BAD_ROWS: list[tuple[Any, str]] = [
    ({"q": 12}, "set.jsonl:2: expected a text or a chat as `q`, found '12'"),
    ({"q": ["a"]}, "set.jsonl:2: expected turns with `role` and `content`, or `from` and `value`, in `q`, found 'a'"),
    ({"q": [{"role": "user"}]}, "set.jsonl:2: expected turns with `role` and `content`"),
    ({"q": [{"role": "judge", "content": "x"}]}, "set.jsonl:2: unknown role 'judge' in `q`; expected system, user, "),
    ({"q": [{"role": "assistant", "content": "x"}]}, "set.jsonl:2: expected a question before the answer in `q`"),
    ({"q": [{"role": "system", "content": "x"}]}, "set.jsonl:2: expected `q` to end with a question"),
    ({"q": "x", "a": True}, "set.jsonl:2: expected a text or a number as `a`, found 'True'"),
    ({"q": "x", "a": {"value": 1}}, "set.jsonl:2: expected a text or a number as `a`, found"),
    ({"q": "x\ud835", "a": "1"}, "set.jsonl:2: holds \\ud835, half of a surrogate pair and no character; remove it"),
    (["q"], "set.jsonl:2: expected a JSON object, found"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=lambda value: str(value)[:40].encode("ascii", "replace"))
def test_a_row_of_a_wrong_type_is_refused_with_its_line(prompts: Command, row: Any, message: str) -> None:
    source = prompts.folder / "set.jsonl"
    source.write_text("".join(json.dumps(value) + "\n" for value in [*GOOD, row]))
    err = prompts.refused(source, "--prompt-field", "q", "--answer-field", "a")
    assert err.startswith(f"DIR/{message}") and err.count("\n") == 0


def test_an_id_that_cannot_be_written_is_refused_with_its_line(prompts: Command) -> None:
    source = write_jsonl(prompts.folder / "set.jsonl", [{"q": "one", "name": "a\ud835"}])
    err = prompts.refused(source, "--prompt-field", "q", "--id-field", "name")
    assert err == "DIR/set.jsonl:1: holds \\ud835, half of a surrogate pair and no character; remove it"


def test_all_wrong_rows_are_counted_and_the_first_ten_shown(prompts: Command) -> None:
    source = write_jsonl(prompts.folder / "set.jsonl", [{"q": n} for n in range(25)])
    err = prompts.refused(source, "--prompt-field", "q")
    assert len(err.splitlines()) == 11 and err.endswith("... and 15 more")


LIARS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "set: expected JSONL or parquet; found an empty file; write it or fetch it again"),
    "gzip": (gzip.compress(b'{"q": "x"}\n'), "set: expected JSONL or parquet; found a gzip archive; unpack it"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a Git LFS pointer;"),
    "a web page": (b"<!DOCTYPE html><html></html>", "found a web page; fetch the file itself"),
    "UTF-16": ('{"q": "x"}\n'.encode("utf-16"), "found text in UTF-16; save it as UTF-8"),
    "latin-1": ('{"q": "\xe9"}\n'.encode("latin-1"), "line 1 is not UTF-8 text"),
    "an array": (b'[{"q": "x"}]', "expected JSONL, one object per line; found a JSON array; write its elements"),
    "CSV": (b"q,a\nx,1\n", "found CSV with the columns q, a; write each row as a JSON object"),
    "cut": (b'{"q": "x"}\n{"q": "y', "set:2: expected a JSON object, found"),
    "blank lines": (b"\n\n", "no rows in DIR/set"),
    "parquet in name only": (b"PAR1" + b"\0" * 64, "set: cannot be read as parquet: "),
}


@pytest.mark.parametrize("kind", LIARS)
def test_a_file_of_another_kind_is_refused_with_its_cure(prompts: Command, kind: str) -> None:
    if kind.startswith("parquet"):
        pytest.importorskip("pyarrow")
    content, message = LIARS[kind]
    source = prompts.folder / "set"
    source.write_bytes(content)
    err = prompts.refused(source, "--prompt-field", "q")
    assert message in err and err.count("\n") == 0


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_parquet_file_is_refused(prompts: Command, kept: float) -> None:
    source = write_parquet(prompts.folder / "set.parquet", open_thoughts(QUESTIONS, copies=50))
    content = source.read_bytes()
    source.write_bytes(content[: int(kept * len(content))])
    err = prompts.refused(source, "--prompt-field", "conversations")
    assert err.startswith("DIR/set.parquet: cannot be read as parquet: ") and err.endswith("fetch the file again")


def test_a_parquet_file_with_a_damaged_page_or_without_rows_is_refused(prompts: Command) -> None:
    source = write_parquet(prompts.folder / "set.parquet", open_thoughts(QUESTIONS, copies=200))
    content = bytearray(source.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    source.write_bytes(bytes(content))
    assert "cannot be read as parquet" in prompts.refused(source, "--prompt-field", "conversations")
    pyarrow = pytest.importorskip("pyarrow")
    empty = write_parquet(source, [], schema=pyarrow.schema([("q", pyarrow.string())]))
    assert prompts.refused(empty, "--prompt-field", "q") == "no rows in DIR/set.parquet"


def test_without_pyarrow_a_parquet_file_is_refused_with_what_to_install(
    prompts: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompts.folder / "set.parquet").write_bytes(b"PAR1 and so on")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    err = prompts.refused(prompts.folder / "set.parquet", "--prompt-field", "q")
    assert err == (
        "DIR/set.parquet: reading parquet needs the package pyarrow, which is not installed; run `pip install "
        "'tropd-mcore[data]'` (of a checkout: '.[data]'), or convert the file to JSONL"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-field", "promt"], "no column 'promt'; did you mean prompt? (it has data_source, prompt, ability,"),
        (["--prompt-field", "prompt", "--answer-field", "answer"], "no column 'answer' (it has data_source, prompt"),
        (["--prompt-field", "prompt", "--where", "domain=math"], "no column 'domain' (it has data_source"),
        (["--prompt-field", "prompt", "--where", "ability=math"], "no row has ability=math; the column has MATH"),
        (
            ["--prompt-field", "prompt", "--answer-field", "reward_model.truth"],
            "no prompt is left; nothing was written",
        ),
        (["--prompt-field", "prompt", "--id-field", "ability"], "id 'MATH' stands at DIR/set."),
        (["--prompt-field", "prompt", "--id-field", "reward_model"], "expected a text or a number as `reward_model`"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_wrong_column_or_value_is_refused_with_the_right_ones(
    prompts: Command, form: str, arguments: list[str], message: str
) -> None:
    source = FORMS[form](prompts.folder / f"set.{form}", dapo([("A?", "1"), ("B?", "2")]))
    assert message in prompts.refused(source, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "Solve it."], "--template: expected {prompt} once, found it 0 times"),
        (["--template", "{prompt} {prompt}"], "--template: expected {prompt} once, found it 2 times"),
        (["--max-prompt-tokens", "9"], "--max-prompt-tokens and --model belong together; give both or neither"),
        (["--seed", "1"], "--seed draws --limit prompts; give --limit too"),
        (["--overlap", "remove"], "--overlap remove has nothing to compare with; give --held-out"),
        (["--held-out", "DIR/nope"], "--held-out DIR/nope: not found; expected a file that `tropd prompts` wrote"),
        (["--held-out", "DIR/set.jsonl"], "a file is named twice; name each file once"),
        (["--held-out", "DIR/raw.jsonl"], "DIR/raw.jsonl:1: unknown key 'q'"),
        (["--held-out", "DIR/text"], "--held-out=DIR/text: line 1 is not UTF-8"),
        (["--model", "DIR", "--max-prompt-tokens", "9"], "--model DIR: config.json not found there"),
        (["--out", "DIR/set.jsonl"], "--out DIR/set.jsonl: is one of the files to read; choose another name"),
        (["--out", "DIR"], "--out DIR: is a folder; expected the name of a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused_before_anything_is_written(
    prompts: Command, arguments: list[str], message: str
) -> None:
    source = write_jsonl(prompts.folder / "set.jsonl", [{"q": "one"}])
    write_jsonl(prompts.folder / "raw.jsonl", [{"q": "one"}])
    (prompts.folder / "text").write_bytes(b"\xff\n")
    places = [argument.replace("DIR", str(prompts.folder)) for argument in arguments]
    assert message in prompts.refused(source, "--prompt-field", "q", *places)
    err = prompts.refused(source, prompts.folder / "nope.parquet", "--prompt-field", "q")
    assert err == "DIR/nope.parquet: not found; expected a JSONL or parquet file"
    assert source.read_text() == '{"q": "one"}\n'


def test_a_damaged_record_beside_a_held_out_file_is_refused(prompts: Command) -> None:
    held = held_out(prompts, AIME25)
    held.with_name("held.jsonl.source.json").write_text("{}")
    source = write_jsonl(prompts.folder / "set.jsonl", [{"q": "one"}])
    err = prompts.refused(source, "--prompt-field", "q", "--held-out", held)
    assert err == "DIR/held.jsonl.source.json: not a record of `tropd prompts`; make held.jsonl again"


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_the_written_lines_and_all_counts_together_for_random_sets(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = [
        {
            "q": draw.choice(["", "a", "b", "c d", "c  d", None]),
            "a": draw.choice([None, "1", 1, 1.0, ["1"], ["1", "2"]]),
            "d": draw.choice("xy"),
        }
        for _ in range(draw.randrange(1, 60))
    ]
    source, counts = write_jsonl(tmp_path / "set.jsonl", [{"q": "z", "a": "1", "d": "x"}, *rows]), Counts()
    columns = Columns("q", "a", where=(("d", "x"),))
    found = candidates(read_rows(source, columns.names()), columns, counts)
    text = lines(found, "set", counts)
    assert counts.rows == len(rows) + 1 == counts.written + counts.left_out
    assert len(text.splitlines()) == counts.written and counts.disputed == 0, "1, 1.0 and [1] are the same answer"
