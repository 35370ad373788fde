"""Gets the teacher's top-k for slime_full.py from an SGLang server and puts it into slime's samples. Rewards are 0.

    --custom-rm-path examples.integrations.slime_teacher.ask --rm-url http://HOST:PORT/generate
    --custom-reward-post-process-path examples.integrations.slime_teacher.keep

The numbers are passed in slime's only field for a teacher, as float32 [R, 1 + 2 K], which is exact for ids below 2^24.
R: response tokens of one sample, K: teacher top-k.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import torch

TOP_K = 64


async def ask(args: Any, sample: Any, **_: Any) -> Any:
    """Return the server's answer for one sample."""
    body = {
        "input_ids": sample.tokens,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": TOP_K,
    }
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(args.rm_url, json=body) as answer:
        return await answer.json()


def keep(args: Any, samples: list[Any], **_: Any) -> tuple[list[float], list[float]]:
    """Store in each sample the rows (log q(x), K log-probs, K ids) of its response tokens."""
    for sample in samples:
        found, start = sample.get_reward_value(args)["meta_info"], len(sample.tokens) - sample.response_length
        pairs = zip(found["input_token_logprobs"][start:], found["input_top_logprobs"][start:], strict=True)
        rows = [[x[0], *(each[0] for each in top), *(each[1] for each in top)] for x, top in pairs]
        sample.teacher_log_probs = torch.tensor(rows, dtype=torch.float32)
    return [0.0] * len(samples), [0.0] * len(samples)
