"""Answers of a teacher server about tokens, for tests that run other stacks' code."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def sglang_answer(ids: list[int], log_q: Tensor, count: int) -> dict[str, Any]:
    """`meta_info` of an SGLang server for a request of the log-probs of its input, and of `count` others, if any."""
    each = [(None if p == 0 else float(log_q[p, x]), x, None) for p, x in enumerate(ids)]
    if not count:
        return {"input_token_logprobs": each}
    tops = [log_q[p].topk(count) for p in range(len(ids))]
    rows = [[(v, i, None) for v, i in zip(t.values.tolist(), t.indices.tolist(), strict=True)] for t in tops]
    return {"input_token_logprobs": each, "input_top_logprobs": [None, *rows[1:]]}
