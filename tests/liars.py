"""A lying proxy in front of a real SGLang server. It does what a router, a cache or a broken server could do.

Each lie is a function of the request's JSON and of `forward`, which asks the real server. All other requests and
answers pass through unchanged, so the rest of the conversation is real.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from tests.http_server import serving

NO_END = 9
"""An id that no test has among its end tokens."""
Body = dict[str, Any]
Forward = Callable[[Body], Awaitable[Any]]
Lie = Callable[[Body, Forward], Awaitable[Any]]
Twist = Callable[[Any], None]
"""Changes an answer in place."""


@dataclass
class Liar:
    """The proxy. `lies` may be changed while it runs; a path without one is passed on."""

    upstream: str
    lies: dict[str, Lie] = field(default_factory=dict)
    url: str = ""
    told: int = 0
    """Number of lies so far."""
    asked: list[tuple[str, Body]] = field(default_factory=list)
    """Every request, in order. A body that is not JSON is empty."""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Lie about the request, or pass it on."""
        content = await request.read()
        try:
            body = json.loads(content) if content else {}
        except ValueError:
            body = {}
        path = request.path
        self.asked.append((path, body if len(content) < 2**20 else {}))
        lie = self.lies.get(path)
        async with aiohttp.ClientSession() as session:

            async def forward(changed: Body) -> Any:
                async with session.request(
                    request.method, f"{self.upstream}{path}", json=changed if request.method == "POST" else None
                ) as real:
                    return await real.json(content_type=None)

            if lie is not None:
                answer = await lie(body, forward)
                return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)
            kept = {"Content-Type": request.headers.get("Content-Type", "application/json")}
            async with session.request(request.method, f"{self.upstream}{path}", data=content, headers=kept) as real:
                return web.Response(body=await real.read(), status=real.status, content_type=real.content_type)

    def tell(self, path: str, lie: Lie, *, about: Callable[[Body], bool] = lambda _: True, times: int = 10**9) -> None:
        """Lie about the first `times` requests to `path` that `about` selects. The others are passed on."""
        left = times

        async def counted(body: Body, forward: Forward) -> Any:
            nonlocal left
            if left <= 0 or not about(body):
                return await forward(body)
            left -= 1
            self.told += 1
            return await lie(body, forward)

        self.lies[path] = counted


@contextmanager
def liar(upstream: str) -> Iterator[Liar]:
    """A running proxy on loopback in front of `upstream`, in its own thread."""
    proxy = Liar(upstream)

    def app() -> web.Application:
        made = web.Application(client_max_size=2**30)
        made.router.add_route("*", "/{path:.*}", proxy.answer)
        return made

    with serving(app) as proxy.url:
        yield proxy


def twisted(twist: Twist) -> Lie:
    """The real answer with a change."""

    async def lie(body: Body, forward: Forward) -> Any:
        answer = await forward(body)
        twist(answer)
        return answer

    return lie


async def nothing_done(body: Body, forward: Forward) -> Any:
    """Report success and do nothing."""
    return {"success": True, "message": "Success"}


async def a_web_page(body: Body, forward: Forward) -> Any:
    """A page like a login page or a proxy's error page, with status 200."""
    return web.Response(text="<html><body>Please sign in</body></html>", content_type="text/html")


def _set_id(answer: Body, place: int, token_id: object) -> None:
    """One sampled token becomes another, wherever the answer names it."""
    answer["output_ids"][place] = token_id
    answer["meta_info"]["output_token_logprobs"][place][1] = token_id


def _set_logp(answer: Body, logp: float | None) -> None:
    answer["meta_info"]["output_token_logprobs"][0][0] = logp


def _cut(answer: Body, reason: Body) -> None:
    """One token, which is no end token, and another reason."""
    answer["output_ids"] = answer["output_ids"][:1]
    answer["meta_info"]["output_token_logprobs"] = answer["meta_info"]["output_token_logprobs"][:1]
    answer["meta_info"]["finish_reason"] = reason
    _set_id(answer, 0, NO_END)


def _more_tokens(answer: Body) -> None:
    answer["output_ids"] *= 60
    answer["meta_info"]["output_token_logprobs"] *= 60


def _rename(entries: list[list[Any]], place: int) -> None:
    """The token of one entry becomes a different token, whichever was sampled."""
    entries[place][1] = NO_END if entries[place][1] != NO_END else NO_END + 1


def _go_on_after(answer: Body, end: int) -> None:
    """An end token first, and at least one token after it, however short the true answer is."""
    answer["output_ids"].append(NO_END)
    answer["meta_info"]["output_token_logprobs"].append([-1.0, NO_END, None])
    _set_id(answer, 0, end)


def _set_end(answer: Body, end: int, matched: object) -> None:
    _set_id(answer, -1, end)
    answer["meta_info"]["finish_reason"] = {"type": "stop", "matched": matched}


def _set_meta(answer: Body, **values: Any) -> None:
    answer["meta_info"] |= values


def sampling_lies(*, vocab_size: int, end: int) -> dict[str, Lie]:
    """Lies to a sampler about one sample: name -> lie. `end` is an end token."""
    twists: dict[str, Twist] = {
        "an id outside the vocabulary": lambda a: _set_id(a, 0, vocab_size + 3),
        "the first id of the padding": lambda a: _set_id(a, 0, vocab_size),
        "the id 10^10": lambda a: _set_id(a, 0, 10**10),
        "the id -3": lambda a: _set_id(a, 0, -3),
        "a text as an id": lambda a: _set_id(a, 0, "7"),
        "a log-prob of +3": lambda a: _set_logp(a, 3.0),
        "a log-prob that is null": lambda a: _set_logp(a, None),
        "a log-prob that is NaN": lambda a: _set_logp(a, float("nan")),
        "`stop` without an end token": lambda a: _cut(a, {"type": "stop", "matched": None}),
        "`length` before the limit": lambda a: _cut(a, {"type": "length", "length": 1}),
        "more tokens than were asked for": _more_tokens,
        "tokens after an end token": lambda a: _go_on_after(a, end),
        "an end token over logits that are NaN": lambda a: _set_end(a, end, "NaN happened"),
        "a prompt that was cut": lambda a: _set_meta(a, prompt_tokens=1),
        "log-probs of other tokens": lambda a: _rename(a["meta_info"]["output_token_logprobs"], 0),
        "one log-prob too few": lambda a: a["meta_info"]["output_token_logprobs"].pop(),
        "no tokens": lambda a: (a.update(output_ids=[]), _set_meta(a, output_token_logprobs=[])),
        "no meta_info": lambda a: a.pop("meta_info"),
    }
    return {name: twisted(twist) for name, twist in twists.items()} | {"a web page": a_web_page}


def _candidates(answer: Body, change: Callable[[np.ndarray, np.ndarray], object]) -> None:
    """Change ids and log-probs of the top-k, both [rows, K], in place."""
    meta = answer["meta_info"]
    shape = meta["input_top_logprobs_shape"]
    names = ("input_top_logprobs_idx_flat_b64", "input_top_logprobs_val_flat_b64")
    arrays = [
        np.frombuffer(base64.b64decode(meta[name]), dtype).reshape(shape).copy()
        for name, dtype in zip(names, ("<i4", "<f4"), strict=True)
    ]
    change(*arrays)
    for name, array in zip(names, arrays, strict=True):
        meta[name] = base64.b64encode(array.tobytes()).decode()


def _set_score(answer: Body, value: float | None) -> None:
    answer["meta_info"]["input_token_logprobs"][-1][0] = value


def _contradict(answer: Body) -> None:
    """Almost certain where the token is not, and half a nat where it is."""
    entry = answer["meta_info"]["input_token_logprobs"][-1]
    entry[0] = -1e-3 if entry[0] < -0.1 else -0.5


def scoring_lies(*, vocab_size: int) -> dict[str, Lie]:
    """Lies to a teacher about one sample: name -> lie."""
    twists: dict[str, Twist] = {
        "candidates of log-prob +2": lambda a: _candidates(a, lambda ids, logp: logp.fill(2.0)),
        "candidates of mass 1.3": lambda a: _candidates(a, lambda ids, logp: logp.fill(np.log(1.3 / logp.shape[1]))),
        "a candidate twice": lambda a: _candidates(a, lambda ids, logp: ids[-1].__setitem__(1, ids[-1, 0])),
        "a negative candidate": lambda a: _candidates(a, lambda ids, logp: ids[-1].__setitem__(0, -1)),
        "a candidate outside the vocabulary": lambda a: _candidates(
            a, lambda ids, logp: ids[-1].__setitem__(0, vocab_size)
        ),
        "candidates that are NaN": lambda a: _candidates(a, lambda ids, logp: logp.fill(np.nan)),
        "a score of +3": lambda a: _set_score(a, 3.0),
        "a score that is null": lambda a: _set_score(a, None),
        "a score that contradicts its candidates": _contradict,
        "scores of other tokens": lambda a: _rename(a["meta_info"]["input_token_logprobs"], -1),
        "one score too few": lambda a: a["meta_info"]["input_token_logprobs"].pop(),
        "candidates of another shape": lambda a: _set_meta(a, input_top_logprobs_shape=[1, 1]),
        "candidates cut short": lambda a: _set_meta(a, input_top_logprobs_val_flat_b64="AAAA"),
        "no meta_info": lambda a: a.pop("meta_info"),
    }
    return {name: twisted(twist) for name, twist in twists.items()} | {"a web page": a_web_page}


def is_sampling(body: Body) -> bool:
    """Whether a body of /generate asks for new tokens."""
    return bool(body.get("sampling_params", {}).get("max_new_tokens", 0))


def is_scoring(body: Body) -> bool:
    """Whether a body of /generate asks for the scores of given tokens."""
    return not is_sampling(body)
