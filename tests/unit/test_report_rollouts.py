"""The rollouts of the report: an unbiased choice, their text with any place of the tokenizer, and the verdicts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.report_run import OUTLIERS, PREFIX, PROMPT, RESPONSE, Tree, page_of, rollout_of, section, table_of, write_run
from tests.tiny_models import tiny_tokenizer
from tropd_mcore.cli.main import main
from tropd_mcore.errors import DataError
from tropd_mcore.evaluation import rollout_view, rollouts_section
from tropd_mcore.evaluation.rollout_choice import choose
from tropd_mcore.evaluation.rollout_texts import Answer
from tropd_mcore.evaluation.rollout_view import verdict_of
from tropd_mcore.evaluation.run_records import StepTokens
from tropd_mcore.files import file_digest
from tropd_mcore.records.replay import save_rollouts
from tropd_mcore.records.token_file import save_token_sample


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def figure_of(page: str, sample: int) -> str:
    return re.search(rf'<figure class="rollout"><figcaption><b>000000/p/{sample}</b>.*?</figure>', page, re.DOTALL)[0]


def step_tokens(count: int = 9, prompts: int = 3, outliers: dict[int, list[int]] | None = None) -> StepTokens:
    tokenizer = tiny_tokenizer()
    rollouts = [replace(rollout_of(tokenizer, index), prompt_id=f"p{index % prompts}") for index in range(count)]
    return StepTokens(4, table_of(rollouts, outliers or {}), rollouts)


def test_tokens_are_marked_as_prefix_trusted_or_outlier(run_dir):
    page = page_of(run_dir)
    tree = Tree(figure_of(page, 1))
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer.encode(text)) for text in (PREFIX, RESPONSE)]
    prompt, *tokens = tree.tokens
    assert prompt == ("token prompt", "", PROMPT)
    expected = ["prefix"] * sizes[0] + ["trusted"] * sizes[1]
    for position in OUTLIERS[1]:
        expected[sizes[0] + position] = "outlier"
    assert [kind.split()[1] for kind, _, _ in tokens] == expected
    assert "".join(text for _, _, text in tokens) == PREFIX + RESPONSE
    outlier = tokens[sizes[0]]
    assert "log-ratio -8.250, log p -1.500, log q -9.750" in outlier[1] and "trust 0" in outlier[1]
    assert outlier[0] == "token outlier s9" and "no loss here" in tokens[0][1]
    legend = [kind.split()[1] for kind, _, _ in Tree(section(page, "Rollouts")).tokens[:6]]
    assert legend == ["prompt", "prefix", "trusted", "outlier", "unscored", "part"]


def test_a_sample_that_the_teacher_could_not_score_is_marked(run_dir):
    for path in (run_dir / "tokens").iterdir():
        table = dict(np.load(path))
        table["on"] = np.where(table["sample_index"] == 1, False, table["on"])
        table["off"] = np.where(table["sample_index"] == 1, table["token_index"] == 3, table["off"])
        np.savez(path, **table)
    assert "not scored by the teacher" in figure_of(page_of(run_dir), 1)


def test_the_middle_of_a_long_rollout_is_folded_and_its_end_is_visible(run_dir, monkeypatch):
    monkeypatch.setattr(rollout_view, "OPEN_TOKENS", 4)
    total = sum(len(tiny_tokenizer().encode(text)) for text in (PROMPT, PREFIX, RESPONSE))
    figure = figure_of(page_of(run_dir), 1)
    assert f"<summary>{total - 4} tokens in between</summary>" in figure
    assert "".join(Tree(figure).text).replace(f"{total - 4} tokens in between", "").endswith(PROMPT + PREFIX + RESPONSE)


def test_a_rollout_that_is_too_long_for_the_report_says_how_much_is_omitted(run_dir, monkeypatch):
    monkeypatch.setattr(rollouts_section, "MOST_TOKENS", 0)
    monkeypatch.setattr(rollouts_section, "LEAST_TOKENS", 4)
    total = sum(len(tiny_tokenizer().encode(text)) for text in (PROMPT, PREFIX, RESPONSE))
    figure = figure_of(page_of(run_dir), 1)
    assert f"… {total - 4} tokens are not on this page …" in figure
    assert "".join(Tree(figure).text).endswith(tiny_tokenizer().decode(tiny_tokenizer().encode(RESPONSE)[-1:]))


def test_the_drawn_rollouts_do_not_depend_on_their_content_and_cover_several_prompts():
    plain, rich = step_tokens(), step_tokens(outliers={0: [0], 7: [0, 1, 2]})
    choice = choose(plain)
    assert choose(rich).drawn == choice.drawn and choice.richest is None
    assert len({plain.rollouts[sample].prompt_id for sample in choice.drawn}) == 2
    draws = {tuple(choose(replace(plain, step=step)).drawn) for step in range(40)}
    assert len({sample for draw in draws for sample in draw}) == 9, "every sample can be drawn"


def test_every_rollout_of_a_step_is_in_exactly_one_list():
    tokens = step_tokens(outliers={3: [0, 1, 2], 5: [0]})
    kept = np.isin(tokens.table["sample_index"], [0, 3, 5, 8])
    columns = {name: values[kept] for name, values in tokens.table.columns.items()}
    choice = choose(replace(tokens, table=replace(tokens.table, columns=columns)), drawn=1)
    assert choice.richest in (3, None) and 3 in {*choice.drawn, choice.richest}
    richest = [] if choice.richest is None else [choice.richest]
    assert sorted([*choice.drawn, *richest, *choice.others, *choice.plain]) == list(range(9))
    assert choice.plain == [1, 2, 4, 6, 7]


def test_the_report_says_which_steps_and_samples_it_shows(run_dir):
    text = section(page_of(run_dir, rollout_steps=2), "Rollouts")
    assert "Shown: 2 of 3 steps with token values (0, 2)" in text
    assert ">drawn<" in text and "3 rollouts, 1 of 2 judged right" in text
    assert text.count('<details class="step"') == 2


def test_the_stored_samples_are_spread_over_the_step(tmp_path):
    tokens = step_tokens(9)
    save_token_sample(tmp_path / "t.npz", tokens.table, 3)
    with np.load(tmp_path / "t.npz") as stored:
        assert sorted(set(stored["sample_index"].tolist())) == [0, 4, 8]


@pytest.mark.parametrize(
    ("stored", "answer", "reason", "verdict"),
    [
        (True, Answer("42", True), "stop", "right"),
        (True, None, "stop", "right"),
        (False, Answer("41", False), "stop", "wrong"),
        (False, Answer(None, False), "stop", "no answer"),
        (False, Answer(None, False), "length", "cut"),
        (False, Answer("42", False), "length", "wrong"),
        (False, None, "stop", "wrong"),
        (None, None, "stop", "not judged"),
        (None, Answer("42", True), "stop", "right"),
        (True, Answer("41", False), "stop", "right"),
    ],
)
def test_the_stored_verdict_is_shown_and_distinguishes_wrong_missing_and_truncated_answers(
    stored, answer, reason, verdict
):
    tokens = step_tokens(1)
    tokens = replace(tokens, rollouts=[replace(tokens.rollouts[0], finish_reason=reason)], verdicts=[stored])
    assert verdict_of(tokens, 0, answer) == verdict


def test_a_rollout_shows_its_verdict_and_its_answer_next_to_the_expected_one(run_dir):
    page = page_of(run_dir)
    assert '<span class="verdict right">right</span>' in figure_of(page, 0)
    figure = figure_of(page, 1)
    assert '<span class="verdict no-answer">no answer</span>' in figure
    assert "no answer found · expected <q>4 &lt; 5</q>" in figure and "weights 0" in figure
    assert "ended by itself" in figure and "right answer" not in page


def test_an_older_run_is_judged_by_its_own_verifier_and_the_report_says_so(run_dir, tmp_path):
    tokenizer = tiny_tokenizer()
    response = np.array(tokenizer.encode(" four\n#### 4 < 5"), np.int32)
    size = len(response)
    rollouts = [
        replace(
            rollout_of(tokenizer, index),
            response_ids=response,
            rollout_logp=np.zeros(size, np.float32),
            trust_u=np.zeros(size, np.float32),
        )
        for index in range(3)
    ]
    for step in range(3):
        save_rollouts(run_dir / "rollouts" / f"step_{step:06d}.npz", rollouts)
        save_token_sample(run_dir / "tokens" / f"step_{step:06d}.npz", table_of(rollouts, {}), 3)
    page = page_of(run_dir)
    assert "The run did not store its verdicts" in page
    said = tokenizer.decode(response.tolist()).partition("#### ")[2]
    assert said.strip() == "4 < 5", "the tokenizer of the tests keeps the answer"
    assert '<span class="verdict right">right</span>' in figure_of(page, 0)
    assert "answered <q>4 &lt; 5</q>" in figure_of(page, 0)


def move_to_relative_paths(run_dir: Path, tmp_path: Path) -> Path:
    """As a launch in tmp_path/project with relative paths would have left it."""
    project = tmp_path / "project"
    shutil.copytree(tmp_path / "student", project / "models" / "student")
    shutil.copytree(run_dir, project / "runs" / "one")
    config = project / "runs" / "one" / "config.resolved.yaml"
    text = re.sub(r"path: .*student\n", "path: models/student\n", config.read_text())
    config.write_text(re.sub(r"  dir: .*\n", "  dir: runs/one\n", text))
    return project / "runs" / "one"


def test_a_relative_student_path_is_found_from_any_folder(run_dir, tmp_path, monkeypatch):
    run = move_to_relative_paths(run_dir, tmp_path)
    monkeypatch.chdir("/")
    assert "Token ids in place of text" not in page_of(run)
    assert "".join(text for _, _, text in Tree(figure_of(page_of(run), 0)).tokens) == PROMPT + PREFIX + RESPONSE


def test_the_tokenizer_of_a_moved_run_is_read_from_its_export(run_dir, tmp_path):
    run = move_to_relative_paths(run_dir, tmp_path)
    shutil.move(run, tmp_path / "moved")
    shutil.rmtree(tmp_path / "project")
    assert "Token ids in place of text" in page_of(tmp_path / "moved")
    shutil.copytree(tmp_path / "student", tmp_path / "moved" / "export")
    assert "Token ids in place of text" not in page_of(tmp_path / "moved")


def test_without_a_tokenizer_the_ids_are_shown_and_report_and_console_say_why(run_dir, capsys):
    config = run_dir / "config.resolved.yaml"
    config.write_text(re.sub(r"path: .*student\n", "path: /nowhere\n", config.read_text()))
    assert main(["report", str(run_dir)]) == 0
    words = "token ids in place of text: no tokenizer at /nowhere; give --tokenizer FOLDER"
    assert f"note: {words}" in capsys.readouterr().err
    page = (run_dir / "report.html").read_text()
    assert f"{words[0].upper()}{words[1:]}" in page
    ids = tiny_tokenizer().encode(RESPONSE)
    assert f">{ids[0]} </span>" in section(page, "Rollouts")


def test_a_tokenizer_given_by_option_is_used_and_reported_if_it_differs_from_the_runs(run_dir, tmp_path, capsys):
    config = run_dir / "config.resolved.yaml"
    config.write_text(re.sub(r"path: .*student\n", "path: /nowhere\n", config.read_text()))
    assert "Token ids in place of text" not in page_of(run_dir, tokenizer=tmp_path / "student")
    with pytest.raises(DataError, match="expected a tokenizer there"):
        page_of(run_dir, tokenizer=tmp_path / "none")
    recorded = {"models": {"student.path": {"files": {"tokenizer.json": "0" * 64}}}}
    (run_dir / "inputs.json").write_text(json.dumps(recorded))
    assert "is not the file that the run used" in page_of(run_dir, tokenizer=tmp_path / "student")


def test_a_tokenizer_that_the_run_did_not_read_is_not_used_by_default(run_dir, tmp_path):
    recorded = {"models": {"student.path": {"files": {"tokenizer.json": "0" * 64}}}}
    (run_dir / "inputs.json").write_text(json.dumps(recorded))
    assert "is not the file that the run used; give --tokenizer FOLDER" in page_of(run_dir)
    recorded["models"]["student.path"]["files"]["tokenizer.json"] = file_digest(tmp_path / "student" / "tokenizer.json")
    (run_dir / "inputs.json").write_text(json.dumps(recorded))
    assert "is not the file" not in page_of(run_dir)


@pytest.mark.parametrize("name", ["tokens", "rollouts"])
def test_damaged_arrays_are_an_error_with_the_file(run_dir, name):
    (run_dir / name / "step_000000.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"step_000000\.npz"):
        page_of(run_dir)


def test_token_values_of_other_rollouts_are_an_error_with_the_file(run_dir):
    save_rollouts(run_dir / "rollouts" / "step_000000.npz", [rollout_of(tiny_tokenizer(), 0)])
    with pytest.raises(DataError, match=r"step_000000\.npz: not the token values of the rollouts"):
        page_of(run_dir)
    table = dict(np.load(run_dir / "tokens" / "step_000001.npz"))
    del table["trusted"]
    (run_dir / "tokens" / "step_000000.npz").unlink()
    np.savez(run_dir / "tokens" / "step_000001.npz", **table)
    with pytest.raises(DataError, match="column trusted is missing"):
        page_of(run_dir)


def test_rollouts_that_a_running_job_just_removed_are_skipped(run_dir, monkeypatch):
    from tropd_mcore.evaluation import run_records
    from tropd_mcore.evaluation.report import ReportOptions, write_report

    load_rollouts = run_records.load_rollouts

    def load(path: Path):
        if path.name == "step_000001.npz":
            path.unlink()
            raise DataError(f"cannot read {path}")
        return load_rollouts(path)

    monkeypatch.setattr(run_records, "load_rollouts", load)
    page = write_report(run_dir, ReportOptions()).path.read_text()
    assert section(page, "Rollouts").count('<details class="step"') == 2
