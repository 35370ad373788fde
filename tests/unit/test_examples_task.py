"""The arithmetic example: a correct task, separate training and held-out sums, and an unambiguous tokenizer."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.arithmetic.settings import FULL, TINY, ExampleSettings, PretrainSettings
from examples.arithmetic.task import (
    QUESTIONS,
    Problem,
    draw_problem,
    forgotten_carries,
    make_splits,
    problem_stream,
    random_slips,
    work,
    worked_answer,
)
from examples.arithmetic.tokenizer import TURN_END, train_tokenizer

OPERANDS = st.integers(min_value=0, max_value=99999)
BRIEF = PretrainSettings(max_steps=2, learning_rate=1e-3)
MICRO = replace(
    TINY, train_prompts=5, heldout_prompts=3, tokenizer_texts=200, teacher_training=BRIEF, student_training=BRIEF
)
"""The tiny example with models that have learnt nothing."""


_STEP = re.compile(r"(\d)\+(\d)\+([01])=(\d\d)")


def parse_steps(text: str) -> list[tuple[int, int, int, int]]:
    """The column lines of a worked answer as (x, y, carry, sum).

    Raises ValueError if a line before the last is not a column line.
    """
    steps = []
    for line in text.split("\n")[:-1]:
        match = _STEP.fullmatch(line)
        if match is None:
            raise ValueError(f"expected a line like 7+5+1=13, found {line!r}")
        x, y, carry, total = (int(group) for group in match.groups())
        steps.append((x, y, carry, total))
    return steps


@pytest.fixture(scope="module")
def tokenizer():
    random = Random(3)
    problems = [draw_problem(random, FULL.min_digits, FULL.max_digits) for _ in range(500)]
    texts = [f"user\n{problem.text}\nassistant\n{worked_answer(problem.a, problem.b)}" for problem in problems]
    return train_tokenizer(texts, max_positions=128)


@given(OPERANDS, OPERANDS)
def test_the_worked_answer_of_the_example_ends_with_the_sum(a, b):
    assert worked_answer(a, b).split("\n")[-1] == f"#### {a + b}"


@given(OPERANDS, OPERANDS)
def test_every_column_line_adds_its_digits_and_the_carry_of_the_line_before(a, b):
    columns = max(len(str(a)), len(str(b)))
    digits = zip(reversed(str(a).zfill(columns)), reversed(str(b).zfill(columns)), strict=True)
    carry = 0
    steps = parse_steps(worked_answer(a, b))
    for (x, y, written_carry, total), (digit_a, digit_b) in zip(steps, digits, strict=True):
        assert (x, y, written_carry) == (int(digit_a), int(digit_b), carry)
        assert total == x + y + carry
        carry = 1 if total > 9 else 0


def test_a_line_that_is_not_a_column_is_refused():
    with pytest.raises(ValueError, match="expected a line like"):
        parse_steps("7+5+1=13\n7+5=12\n#### 12")


@given(OPERANDS, OPERANDS, st.integers(0, 10**6))
def test_after_a_slip_the_right_answer_continues_from_the_written_digits(a, b, seed):
    answer = work(a, b, random_slips(Random(seed), 0.3))
    assert re.sub(r"\d", "0", answer.written) == re.sub(r"\d", "0", answer.right)
    written, right = parse_steps(answer.written), parse_steps(answer.right)
    carry = 0
    for (x, y, written_carry, total), (_, _, right_carry, right_total) in zip(written, right, strict=True):
        assert right_carry == carry
        assert right_total // 10 == (x + y + written_carry) // 10
        assert right_total % 10 == (x + y + written_carry) % 10
        carry = total // 10
    digits = [str(total % 10) for *_, total in written[:-1]]
    assert answer.written.split("\n")[-1] == f"#### {written[-1][-1]}{''.join(reversed(digits))}"
    assert answer.right.split("\n")[-1] == answer.written.split("\n")[-1]


def test_the_students_slips_forget_only_carries_of_large_sums_and_at_the_configured_rate():
    random = Random(8)
    habit = forgotten_carries(random, from_sum=12, probability=0.85)
    forgotten = kept = 0
    for _ in range(3000):
        a, b = random.randint(100, 9999), random.randint(100, 9999)
        before = 0
        for x, y, carry, total in parse_steps(work(a, b, habit).written):
            assert total == x + y + carry
            if before >= 12:
                forgotten, kept = forgotten + (carry == 0), kept + (carry == 1)
            else:
                assert carry == before // 10
            before = total
    assert abs(forgotten / (forgotten + kept) - 0.85) < 0.02


@given(st.integers(0, 10**6))
def test_no_sum_is_in_both_splits_or_twice_in_either(seed):
    splits = make_splits(Random(seed), min_digits=1, max_digits=2, train=60, heldout=40)
    keys = [frozenset((problem.a, problem.b)) for problem in splits.train + splits.heldout]
    assert len(set(keys)) == len(keys) == 100
    assert (len(splits.train), len(splits.heldout)) == (60, 40)


def test_the_same_seed_gives_the_same_prompts():
    first, second = (make_splits(Random(5), min_digits=3, max_digits=4, train=20, heldout=10) for _ in range(2))
    assert first == second


def test_supervised_training_never_sees_a_held_out_sum():
    splits = make_splits(Random(1), min_digits=1, max_digits=1, train=5, heldout=20)
    held_out = {frozenset((problem.a, problem.b)) for problem in splits.heldout}
    stream = problem_stream(Random(2), min_digits=1, max_digits=1, exclude=splits)
    assert not held_out & {frozenset((problem.a, problem.b)) for problem in islice(stream, 2000)}


def test_each_question_names_the_operands_in_order():
    for question in QUESTIONS:
        text = Problem(a=12, b=345, question=question).text
        assert re.findall(r"\d+", text) == ["12", "345"]


def test_the_example_tokenizer_decodes_every_text_unchanged(tokenizer):
    for text in ("What is 731 + 882?", worked_answer(9876, 8765), "größer\n\t≥ 3", "#### 18641"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_separate_token(tokenizer):
    ids = tokenizer.encode("Add 1234567890 and 17.")
    digits = [token for token in tokenizer.convert_ids_to_tokens(ids) if any(char.isdigit() for char in token)]
    assert digits == list("123456789017")


def test_a_prompt_and_its_answer_tokenize_separately_as_they_do_together(tokenizer):
    random = Random(4)
    for _ in range(200):
        problem = draw_problem(random, 1, 5)
        prompt = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, tokenize=False)
        answer = worked_answer(problem.a, problem.b) + TURN_END
        assert tokenizer.encode(prompt) + tokenizer.encode(answer) == tokenizer.encode(prompt + answer)


def test_the_example_vocabulary_is_not_a_multiple_of_128_and_fits_both_paddings(tokenizer):
    assert len(tokenizer) % 128
    for settings in (FULL, TINY):
        assert len(tokenizer) < settings.student.vocab_size < settings.teacher.vocab_size


@pytest.mark.parametrize("settings", [FULL, TINY])
def test_the_longest_answer_has_at_most_48_tokens(tokenizer, settings: ExampleSettings):
    largest = 10**settings.max_digits - 1
    assert len(tokenizer.encode(worked_answer(largest, largest) + TURN_END)) <= 48 <= settings.max_response_tokens


@given(OPERANDS, OPERANDS, st.lists(st.booleans(), min_size=5, max_size=5))
def test_operands_in_the_other_order_change_neither_the_sums_nor_the_answer(a: int, b: int, swaps: list[bool]) -> None:
    order = iter(swaps)
    written = work(a, b, swap=lambda: next(order)).written
    assert written.rpartition("#### ")[2] == worked_answer(a, b).rpartition("#### ")[2]
    for swapped, mine, usual in zip(swaps, parse_steps(written), parse_steps(worked_answer(a, b)), strict=False):
        x, y, *rest = usual
        assert list(mine) == ([y, x, *rest] if swapped else [x, y, *rest])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from examples.make_models import make_example

    out = tmp_path_factory.mktemp("example") / "arithmetic"
    make_example(out, MICRO)
    return out


def test_the_example_files_are_read_by_the_library(made):
    from tropd_mcore.config.schema import DataConfig
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.prompt_file import read_prompt_file
    from tropd_mcore.data.prompts import load_prompts
    from tropd_mcore.teacher.vocabulary import check_same_vocabulary
    from tropd_mcore.weights.architecture import read_architecture

    student, teacher = read_architecture(made / "student"), read_architecture(made / "teacher")
    assert (student.vocab_size, student.tied_embeddings) == (320, True)
    assert (teacher.vocab_size, teacher.tied_embeddings) == (384, False)
    check_same_vocabulary(made / "student", made / "teacher")
    config = DataConfig(prompts=made / "train.jsonl")
    prompts = load_prompts(config, Renderer(made / "student"), seed=1).prompts
    assert len(prompts) == 5
    assert len(read_prompt_file(made / "heldout.jsonl")) == 3


def test_a_second_call_of_make_example_changes_nothing(made):
    from examples.make_models import make_example

    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_example(made, MICRO)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_settings_rebuild_the_example(made, tmp_path, monkeypatch: pytest.MonkeyPatch):
    from examples import make_models

    monkeypatch.setattr(make_models, "_build", lambda folder, settings, threads: {"made": settings.seed})
    out = tmp_path / "example"
    assert [make_models.make_example(out, replace(MICRO, seed=seed))["made"] for seed in (1, 2, 2)] == [1, 2, 2]
    assert json.loads((out / "example.json").read_text())["settings"]["seed"] == 2


def test_an_interrupted_call_of_make_example_leaves_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch):
    from examples import make_models

    def fail(folder: Path, settings: ExampleSettings, threads: int) -> dict:
        (folder / "student").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(make_models, "_build", fail)
    with pytest.raises(KeyboardInterrupt):
        make_models.make_example(tmp_path / "example", MICRO)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_left_alone(tmp_path, capsys):
    from examples.make_models import main

    (tmp_path / "mine.txt").write_text("precious")
    assert main([str(tmp_path), "--tiny"]) == 2
    assert "expected an example made by this script" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_make_example_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The next call also removes files that a killed process left behind."""
    code = (
        "import sys, time; from pathlib import Path; from examples import make_models\n"
        "def build(folder, settings, threads):\n"
        "    (folder / 'weights').touch(); print('begun', flush=True); time.sleep(300)\n"
        "make_models._build = build\n"
        "sys.exit(make_models.main([sys.argv[1], '--tiny']))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "example")]
    for sent, left in ((signal.SIGKILL, 1), (number, 0)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(sent)
        _, err = process.communicate(timeout=120)
        assert len(list(tmp_path.iterdir())) == left, sent
    assert process.returncode == 128 + number
    assert f"stopped while making {tmp_path / 'example'}; nothing is left" in err and "Traceback" not in err
