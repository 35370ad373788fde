"""Sampled accuracy on held-out prompts, with one program for the weights of both trainers.

    python -m benchmarks.versus.evaluate PROMPTS.jsonl FOLDER... [--target 0.8]

A folder is a Hugging Face folder or a Megatron checkpoint of ours, which is exported first. The folders are read in
order until one reaches the target, or all without one. Prints one JSON line per folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples.arithmetic.models import generate, load
from tropd_mcore.config.schema import ParallelConfig, VerifierConfig
from tropd_mcore.data.verify import is_correct
from tropd_mcore.mcore.conversion import Job, mcore_to_hf, open_job

ROWS = 512
"""Responses that are sampled at once."""


def sampled_accuracy(
    folder: Path, prompts: Sequence[dict[str, Any]], *, samples: int, seed: int, max_new_tokens: int
) -> tuple[int, int]:
    """Return (right, all) of `samples` responses per prompt at temperature 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    verifier = VerifierConfig(kind="exact_match")
    torch.manual_seed(seed)
    right = 0
    rows = [prompt for prompt in prompts for _ in range(samples)]
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        ids = tokenizer.apply_chat_template(
            [row["messages"] for row in part], add_generation_prompt=True, return_dict=False
        )
        responses = generate(model, tokenizer, ids, max_new_tokens, sample=True)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        right += sum(
            is_correct(verifier, text, row["answer"], finished=response[-1] == tokenizer.eos_token_id)
            for text, row, response in zip(texts, part, responses, strict=True)
        )
    return right, len(rows)


@contextmanager
def as_hugging_face(folder: Path, job: Job) -> Iterator[Path]:
    """Give the Hugging Face folder of a checkpoint; a folder that is one already is given as it is."""
    if not (folder / "tropd.json").exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "exported"
        mcore_to_hf(folder, out, job)
        yield out


def main() -> None:
    """Evaluate until the target is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--target", type=float)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    prompts = [json.loads(line) for line in options.prompts.read_text().splitlines()]
    with open_job(ParallelConfig(), "cpu", {}) as job:
        for folder in options.folders:
            with as_hugging_face(folder, job) as exported:
                right, count = sampled_accuracy(
                    exported, prompts, samples=options.samples, seed=options.seed,
                    max_new_tokens=options.max_new_tokens,
                )  # fmt: skip
            print(json.dumps({"folder": folder.name, "right": right, "count": count}), flush=True)
            if options.target is not None and right >= options.target * count:
                return


if __name__ == "__main__":
    main()
