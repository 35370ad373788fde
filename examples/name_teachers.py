"""Names the teacher of each prompt by a word of its text: writes the field `teacher` into a copy of a prompt file.

    python examples/name_teachers.py PROMPTS.jsonl OUT.jsonl --where "Add=plain" --otherwise carries

The first `--where TEXT=NAME` whose TEXT is in the prompt names the teacher; `--otherwise` names that of the rest.
docs/teachers.md tells what a run does with the field.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path


def main() -> None:
    """Write the copy and print how many prompts each teacher has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", type=Path, help="JSONL file of prompts (data.prompts)")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--where", action="append", default=[], metavar="TEXT=NAME", help="may be repeated")
    parser.add_argument("--otherwise", metavar="NAME", help="teacher of all other prompts (default: no field)")
    options = parser.parse_args()
    rules = [rule.partition("=") for rule in options.where]
    if wrong := [rule for rule, (text, _, name) in zip(options.where, rules, strict=True) if not (text and name)]:
        parser.error(f"--where {wrong[0]}: expected TEXT=NAME")
    lines, counts = [], Counter[str]()
    for line in options.prompts.read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        text = prompt.get("prompt") or " ".join(message["content"] for message in prompt["messages"])
        name = next((name for word, _, name in rules if word in text), options.otherwise)
        if name is not None:
            prompt["teacher"] = name
        counts[name or "no field"] += 1
        lines.append(json.dumps(prompt, ensure_ascii=False) + "\n")
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {', '.join(f'{name} {count}' for name, count in sorted(counts.items()))}")


if __name__ == "__main__":
    main()
