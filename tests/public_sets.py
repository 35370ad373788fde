"""Small files in the formats in which data sets for mathematics are published; their questions are made up.

`OPEN_THOUGHTS` has a chat with `from` and `value`, an answer in it, and the same question several times. `DAPO` has a
chat with `role` and `content`, and its answer in a column of objects. `AMC` has answers as floating-point numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, Any]]
THOUGHT = "<think>\nAdd them.\n</think>\n\n**Final Answer** \\boxed{5}"


def open_thoughts(questions: list[tuple[str, str]], copies: int = 3) -> Rows:
    """(domain, question) -> `copies` rows each, as they stand behind each other in OpenThoughts3."""
    return [
        {
            "difficulty": None if domain == "math" else 8, "source": "made-up", "domain": domain,
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"{THOUGHT} {copy}"}],
        }
        for domain, question in questions
        for copy in range(copies)
    ]  # fmt: skip


def dapo(questions: list[tuple[str, Any]]) -> Rows:
    """(question, answer) -> rows of DAPO-Math-17k and Skywork-OR1-RL-Data."""
    return [
        {
            "data_source": "math_dapo", "prompt": [{"content": f"Solve the problem.\n\n{question}", "role": "user"}],
            "ability": "MATH", "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n, (question, answer) in enumerate(questions)
    ]  # fmt: skip


AIME24: Rows = [
    {"id": 60 + n, "problem": f"Find the number of ways to seat {n} guests at a round table with one empty chair.",
     "solution": "Count.", "answer": f"0{n}3", "url": "https://example.org", "year": "2024"}
    for n in range(2, 5)
]  # fmt: skip
AIME25: Rows = [
    {"problem": f"Find the sum of all bases b > {n} in which 17 divides 97.", "answer": str(70 + n), "id": str(n)}
    for n in range(3)
]
MATH500: Rows = [
    {"problem": f"Convert the point (0,{n}) to polar coordinates.", "solution": "Draw it.",
     "answer": f"\\left( {n}, \\frac{{\\pi}}{{2}} \\right)", "subject": "Precalculus", "level": 2,
     "unique_id": f"test/precalculus/{n}.json"}
    for n in range(1, 4)
]  # fmt: skip
AMC: Rows = [{"id": n, "question": f"Cities A and B are {n} miles apart.", "answer": 27.0 + n} for n in range(3)]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Rows, **options: Any) -> Path:
    """Needs pyarrow, which the locked environment has."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows, **options), path, write_page_checksum=True)
    return path
