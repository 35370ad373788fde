"""A small run directory with everything that a report shows, and readers of the resulting page. For tests."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from tests.tiny_models import tiny_tokenizer
from tropd_mcore.evaluation.evaluate import EvaluationResult, EvaluationSettings, Score
from tropd_mcore.evaluation.report import ReportOptions, write_report
from tropd_mcore.evaluation.statistics import wilson_interval
from tropd_mcore.monitor.catalogue import METRICS
from tropd_mcore.records.replay import save_rollouts
from tropd_mcore.records.token_file import save_token_sample
from tropd_mcore.types import Rollout, TokenTable

PROMPT, PREFIX, RESPONSE = "two & two", " one", " <b>four"
VOID = {"meta", "br", "input"}
OUTLIERS = {1: [0, 2], 2: [1]}
"""{sample: positions of its outliers in the response}"""
VERDICTS = [True, False, None]


class Tree(HTMLParser):
    """Checks that tags are balanced; collects (class, title, text) of every token span."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
            if "token" in (dict(attributes).get("class") or "").split():
                self.tokens.append((dict(attributes)["class"], dict(attributes).get("title") or "", ""))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        if self.tokens and self.open and "token" in (self.open[-1][1].get("class") or ""):
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = kind, title, text + data


def rollout_of(tokenizer, index: int) -> Rollout:
    prompt, prefix, response = (tokenizer.encode(text) for text in (PROMPT, PREFIX, RESPONSE))
    return Rollout(
        sample_id=f"000000/p/{index}",
        prompt_id="p",
        prompt_ids=np.array(prompt, np.int32),
        prefix_ids=np.array(prefix, np.int32),
        response_ids=np.array(response, np.int32),
        rollout_logp=np.zeros(len(response), np.float32),
        trust_u=np.zeros(len(response), np.float32),
        policy_version="0",
        finish_reason="stop",
        carries_prefix_loss=index == 0,
        answer="4 < 5",
    )


def table_of(rollouts: list[Rollout], outliers: dict[int, list[int]]) -> TokenTable:
    """Prefix rows of the first sample, response rows of all; `outliers`: sample -> positions in the response."""
    rows = []
    for sample, rollout in enumerate(rollouts):
        start = len(rollout.prompt_ids) + len(rollout.prefix_ids)
        if rollout.carries_prefix_loss:
            rows += [(sample, token, False, True, 0.0) for token in range(len(rollout.prompt_ids), start)]
        for position in range(len(rollout.response_ids)):
            trusted = float(position not in outliers.get(sample, []))
            rows.append((sample, start + position, True, False, trusted))
    names = ("sample_index", "token_index", "on", "off", "trusted")
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
    trusted = columns["trusted"]
    columns["epoch"] = np.zeros(len(rows), np.int64)
    columns["old_logp"] = np.full(len(rows), -1.5, np.float32)
    columns["teacher_logp"] = np.where(trusted > 0, -1.25, -9.75).astype(np.float32)
    columns["log_ratio"] = columns["teacher_logp"] - columns["old_logp"]
    return TokenTable(columns)


def result_of(model: str, correct: int, total: int = 40, prompts: str = "same") -> EvaluationResult:
    def score() -> Score:
        return Score(correct, total, correct / total, *wilson_interval(correct, total))

    settings = EvaluationSettings(prompts="heldout.jsonl", max_new_tokens=9)
    right = [index < correct for index in range(total)]
    return EvaluationResult(model, "ab" * 32, prompts, settings, score(), score(), 0.025, 7.5, right)


def write_run(tmp_path: Path, name: str = "run <1>") -> Path:
    """Write a run of three steps with everything that a report shows. The student's folder is next to it."""
    run = tmp_path / name
    student = tmp_path / "student"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(student)
    rollouts = [rollout_of(tokenizer, index) for index in range(3)]
    run.mkdir()
    lines = []
    for step in range(3):
        values = {metric.name: 0.25 + step for metric in METRICS} | {"time/rollout": 1.0, "verifier/accuracy": None}
        lines.append(json.dumps({"step": step, **values}) + "\n")
        save_rollouts(run / "rollouts" / f"step_{step:06d}.npz", rollouts)
        save_token_sample(run / "tokens" / f"step_{step:06d}.npz", table_of(rollouts, OUTLIERS), 3, VERDICTS)
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "config.resolved.yaml").write_text(
        f"run:\n  dir: {run}\n  seed: 0  # default\n  steps: 3\ndata:\n  prompts: p.jsonl\n"
        f"student:\n  path: {student}\n"
        f"teacher:\n  path: {tmp_path / 'teacher'}\nverifier:\n  kind: exact_match\n"
        "objective:\n  kind: tropd\n  guidance:\n    enabled: true\n"
    )
    result_of(str(student), 10).save(run / "evaluation_before.json")
    result_of(str(run / "export"), 30).save(run / "evaluation_after.json")
    result_of(str(tmp_path / "teacher"), 39).save(run / "evaluation" / "teacher.json")
    return run


def page_of(run: Path, **options) -> str:
    """Write the report of a run and return its text."""
    return write_report(run, ReportOptions(**options)).path.read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """The part of a page under a heading."""
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]
