"""Distributes requests over servers: the longest first, to the server with the most room, away from slow and lost ones.

This module does not choose servers or weights (see `rollout.policy_server`) and does not build requests (see `wire`).
Invariants:
- Every question gets one answer, or the error of the last server that had it.
- A server that is lost (gone, hung, refused by `Work.refuses`) keeps its answers; its open questions go to the others.
- A sample that is taken from a slow server, or that somebody else has aborted, goes on from the tokens that it has, so
  that this changes no distribution. Only the open samples of a server that does not even answer a request to abort are
  sampled anew.
- With one server nothing is moved or aborted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Generic, TypeVar

from tropd_mcore.errors import AnswerError, ServerDied, ServerError, ServerHung
from tropd_mcore.serving.in_flight import Item, Served
from tropd_mcore.serving.transport import LateError, attended, cancelled
from tropd_mcore.serving.work import Dispatched, Lane, Work

log = logging.getLogger(__name__)

Question = TypeVar("Question")
Answer = TypeVar("Answer")

LOOK_S = 0.25
"""Seconds between two looks for a slow server."""
PATIENCE_S = 2.0
"""Age of a request from which it can be taken from a slow server."""
SLOW = 0.25
"""A server counts as slow if its requests advance at less than this share of the fastest server's rate. Servers that
share a machine differ by a factor of two now and then, and moving their samples would cost more than it saves."""
CLEARLY = 1.5
"""Age of all requests of a server without an answer, in usual times of an answer, from which it is slow for sure."""
LOOK_AGAIN_S = 10.0
"""Seconds until a server that seemed slow and was not is looked at again."""
ABORT_S = 10.0
"""Longest wait until a server has ended the requests that it was told to abort."""
MOVES = 2
"""How often one question may be taken from a slow server."""
CUTS = 3
"""How often one question that somebody else has aborted goes on from its tokens."""
ERRORS = 3
"""Errors without a single answer after which a server is lost, if others are left."""
SLOWEST = 0.02
"""Smallest speed that a server is given, relative to the mean of all."""


def dispatch(
    lanes: Sequence[Lane],
    work: Work[Question, Answer],
    questions: Sequence[Question],
    count: Callable[[Answer | ServerError], None] = lambda _: None,
) -> Dispatched[Answer]:
    """Ask all `questions`, each of one server of `lanes`. `count` gets each final answer as it arrives.

    At most `max_concurrency` requests of each server are in flight. Raises StopRequested; open requests are aborted
    then, because their connections are closed.
    """
    call = _Call(lanes, work, questions, count)
    asyncio.run(call.run())
    return call.result()


class _Call(Generic[Question, Answer]):
    """One call of `dispatch`."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        work: Work[Question, Answer],
        questions: Sequence[Question],
        count: Callable[[Answer | ServerError], None],
    ) -> None:
        self._lanes, self._work, self._count = lanes, work, count
        self._answers: list[Answer | ServerError | None] = [None] * len(questions)
        self._left = len(questions)
        self._waiting = self._in_order(questions)
        self._affinity: dict[object, int] = {}
        self._servers: list[Served[Question, Answer]] = []
        self._found: Dispatched[Answer] = Dispatched([])
        self._helpers: set[asyncio.Task[Any]] = set()
        # as many requests more than another server has are worth a shared prefix
        self._allowance = math.ceil(len(questions) / (8 * max(len(lanes), 1)))

    def result(self) -> Dispatched[Answer]:
        """What is known after `run`."""
        found = self._found
        found.answers = [answer for answer in self._answers if answer is not None]
        assert len(found.answers) == len(self._answers)
        found.speeds = {server.place: server.pace for server in self._servers if server.pace is not None}
        slow = SLOW * max(found.speeds.values(), default=0.0)
        found.slow |= {each.place for each in self._servers if each.seconds >= PATIENCE_S and (each.pace or 0.0) < slow}
        return found

    async def run(self) -> None:
        """Ask everything."""
        if not self._left:
            return
        self._done = asyncio.Event()
        async with AsyncExitStack() as stack:
            for place, lane in enumerate(self._lanes):
                session = await stack.enter_async_context(lane.transport.session())
                self._servers.append(Served(place, lane, session))
            for server in self._servers:
                self._help(self._guard(server))
                if (beside := server.lane.transport.beside) is not None:
                    self._help(self._attend(server, beside()))
            if len(self._servers) > 1:
                self._help(self._look_for_slow_ones())
            try:
                self._assign()
                await attended(self._done.wait(), [], may_stop=True)
            finally:
                tasks = [task for server in self._servers for task in server.open.values()]
                await cancelled([*self._helpers, *tasks])
        for task in [*self._helpers, *tasks]:
            # an error in our own code
            if not task.cancelled() and (bug := task.exception()) is not None:
                raise bug

    def _in_order(self, questions: Sequence[Question]) -> list[Item[Question, Answer]]:
        """The longest first; questions of one group stay together, at the place of their longest."""
        size, group = self._work.size, self._work.group
        items = [Item[Question, Answer](index, question) for index, question in enumerate(questions)]
        largest: dict[object, tuple[int, ...]] = {}
        first: dict[object, int] = {}
        for item in items:
            key = group(item.question)
            largest[key] = max(largest.get(key, ()), size(item.question))
            first.setdefault(key, item.index)

        def order(item: Item[Question, Answer]) -> tuple[list[int], int, list[int], int]:
            key = group(item.question)
            return [-part for part in largest[key]], first[key], [-part for part in size(item.question)], item.index

        return sorted(items, key=order)

    def _help(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._helpers.add(task)
        task.add_done_callback(self._helper_ended)

    def _helper_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._done.set()  # an error in our own code, raised at the end of `run`

    def _alive(self) -> list[Served[Question, Answer]]:
        return [server for server in self._servers if server.lost is None]

    def _assign(self) -> None:
        """Give waiting questions to servers with room."""
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            server = self._choice(item)
            if server is None:
                self._waiting.append(item)
            else:
                self._send(server, item)

    def _choice(self, item: Item[Question, Answer]) -> Served[Question, Answer] | None:
        """The server for a question now; None if it has to wait."""
        alive = self._alive()
        wanted = [server for server in alive if server.place not in item.avoid] or alive
        able = [server for server in wanted if server.room > 0 and not server.relieved]
        if not able:
            return None

        def load(server: Served[Question, Answer]) -> float:
            return (len(server.open) + 1) / max(server.lane.speed, SLOWEST)

        best = min(able, key=lambda server: (load(server), server.place))
        group = self._work.group(item.question)
        before = self._affinity.get(group)
        for server in able:
            if server.place == before and load(server) <= load(best) + self._allowance / server.lane.speed:
                best = server
        self._affinity[group] = best.place
        return best

    def _send(self, server: Served[Question, Answer], item: Item[Question, Answer]) -> None:
        item.rid, item.since, item.taken = uuid.uuid4().hex, time.monotonic(), False
        task = asyncio.ensure_future(self._ask(server, item))
        server.open[item] = task
        task.add_done_callback(lambda ended: self._ended(server, item, ended))

    def _ended(self, server: Served[Question, Answer], item: Item[Question, Answer], task: asyncio.Task[None]) -> None:
        server.open.pop(item, None)
        if not task.cancelled() and task.exception() is not None:
            self._helpers.add(task)  # an error in our own code, raised at the end of `run`
            self._done.set()
            return
        if self._left and not self._done.is_set():
            self._assign()

    async def _ask(self, server: Served[Question, Answer], item: Item[Question, Answer]) -> None:
        """Ask `server` one question and settle it, or put it back."""
        before = server.answered
        try:
            answer = await self._answer(server, item)
        except ServerDied as error:
            self._back(item)
            self._lose(server, error)
        except ServerError as error:
            if isinstance(error.__cause__, LateError) and server.answered == before:
                self._back(item)
                url = server.lane.transport.url
                self._lose(server, ServerHung(f"{error}; no other request was answered meanwhile", url))
            else:
                self._failed(server, item, error)
        else:
            self._arrived(server, item, answer)

    async def _answer(self, server: Served[Question, Answer], item: Item[Question, Answer]) -> Answer:
        """The server's answer; if it makes no sense, its second one."""
        work, transport = self._work, server.lane.transport
        body = work.body(item.question, item.rid)
        try:
            return work.read(await transport.call(server.session, "POST", "/generate", body), item.question)
        except AnswerError as error:
            self._found.nonsense.setdefault(server.place, []).append(str(error))
        item.rid = uuid.uuid4().hex
        body = work.body(item.question, item.rid)
        return work.read(await transport.call(server.session, "POST", "/generate", body), item.question)

    def _arrived(self, server: Served[Question, Answer], item: Item[Question, Answer], answer: Answer) -> None:
        reason = self._work.refuses(answer)
        if reason is not None:
            self._back(item)
            self._found.may_return.add(server.place)
            self._lose(server, ServerError(f"{server.lane.transport.key}: {reason}"))
            return
        now = time.monotonic()
        server.answered += 1
        server.tokens += self._work.tokens(answer)
        server.seconds += now - item.since
        after = self._work.after
        if after is not None and self._work.is_part(answer) and (item.taken or item.cuts < CUTS):
            if self._work.tokens(answer):
                item.question = after(item.question, answer)
                item.parts.append(answer)
            if item.taken:
                self._found.moved += 1
            else:
                item.cuts += 1
                self._found.cut += 1
            self._back(item)
            return
        self._settle(item, self._work.joined([*item.parts, answer]))

    def _failed(self, server: Served[Question, Answer], item: Item[Question, Answer], error: ServerError) -> None:
        """An error that leaves the server alive. Another server may do better, once per question."""
        server.errors += 1
        item.errors += 1
        item.avoid.add(server.place)
        others = [other for other in self._alive() if other is not server]
        if not others or item.errors > 1:
            self._settle(item, error)
            return
        self._found.again += 1
        self._back(item)
        if server.errors >= ERRORS and not server.answered:
            self._lose(server, error)

    def _settle(self, item: Item[Question, Answer], answer: Answer | ServerError) -> None:
        assert self._answers[item.index] is None, "a question with two answers"
        self._answers[item.index] = answer
        self._left -= 1
        self._count(answer)
        if not self._left:
            self._done.set()

    def _back(self, item: Item[Question, Answer]) -> None:
        """Let the question be asked next. What was sampled of it stays."""
        self._waiting.insert(0, item)

    def _lose(self, server: Served[Question, Answer], error: ServerError) -> None:
        """Give up a server. Its open questions go to the others; if it was the last one, they get its error."""
        if server.lost is not None:
            return
        server.lost = error
        self._found.lost[server.place] = error
        for item, task in list(server.open.items()):
            # one that is done has put its question back itself
            if task is not asyncio.current_task() and not task.done():
                task.cancel()
                self._found.again += 1
                self._back(item)
        if self._alive():
            self._assign()
            return
        for item in self._waiting:
            self._settle(item, error)
        self._waiting = []

    async def _guard(self, server: Served[Question, Answer]) -> None:
        """Lose the server when it is found to be hung."""
        self._lose(server, await server.lane.transport.hung(generates=True))

    async def _attend(self, server: Served[Question, Answer], beside: Coroutine[None, None, ServerDied]) -> None:
        self._lose(server, await beside)  # it returns when the server is gone

    async def _look_for_slow_ones(self) -> None:
        """When a server has nothing to do, take the questions of a slow one away."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._waiting or all(server.open for server in self._alive()):
                continue
            for server in self._alive():
                if server.open and self._seems_slow(server, time.monotonic()):
                    await self._relieve(server)

    def _seems_slow(self, server: Served[Question, Answer], now: float) -> bool:
        paces = [other.pace for other in self._alive() if other is not server and other.pace]
        oldest = now - min(item.since for item in server.open)
        if not paces or oldest < PATIENCE_S or now < server.cleared_until:
            return False
        if server.pace is not None:
            return server.pace < SLOW * max(paces)
        # it has answered nothing: suspect if its requests are older than the average answer of the others took
        return oldest > self._usual_s(server)

    def _usual_s(self, server: Served[Question, Answer]) -> float:
        """Seconds that an answer of the other servers took on average."""
        others = [other for other in self._alive() if other is not server and other.answered]
        return sum(other.seconds for other in others) / max(sum(other.answered for other in others), 1)

    async def _relieve(self, server: Served[Question, Answer]) -> None:
        """Take all open questions from a server that seems slow, if a part of one of them shows that it is."""
        items = [item for item, task in server.open.items() if item.moves < MOVES and not task.done()]
        name = server.lane.transport.name
        best = max((other.pace or 0.0 for other in self._alive() if other is not server), default=0.0)
        if self._work.after is None:
            self._take_away(server, items)
            return
        stuck, tokens, seconds = 0, server.tokens, server.seconds
        # without an answer long after others have given all of theirs, no probe is needed
        late = CLEARLY * self._usual_s(server)
        is_clear = not server.answered and all(time.monotonic() - item.since > late for item in items)
        for batch in (items,) if is_clear else (items[:1], items[1:]):
            left = [item for item in batch if item in server.open and not server.open[item].done()]
            stuck += await self._abort(server, left)
            if server.lost is not None:
                return
            if stuck:
                self._found.may_return.add(server.place)
                self._found.slow.add(server.place)
                what = f"{name}: it did not end {stuck} requests within {ABORT_S:g} s when it was told to abort them"
                url = server.lane.transport.url
                self._lose(server, ServerHung(f"{what}, while other servers had nothing to do (at {url})", url))
                return
            pace = (server.tokens - tokens) / max(server.seconds - seconds, 1e-9)
            if not items or pace >= SLOW * best:
                server.cleared_until = time.monotonic() + LOOK_AGAIN_S
                return
        server.lane.speed = max(server.lane.speed * pace / best, SLOWEST)
        log.info(
            "%s: slow, %.1f tokens/s per request where another server has %.1f; %d open samples went on elsewhere from "
            "where they were", name, pace, best, len(items),
        )  # fmt: skip
        self._assign()

    def _take_away(self, server: Served[Question, Answer], items: list[Item[Question, Answer]]) -> None:
        """Let questions whose answers do not depend on chance be asked elsewhere from their beginning."""
        for item in items:
            item.moves += 1
            item.avoid.add(server.place)
            server.open[item].cancel()
            self._found.moved += 1
            self._back(item)
        server.cleared_until = math.inf if not items else 0.0
        self._assign()

    async def _abort(self, server: Served[Question, Answer], items: list[Item[Question, Answer]]) -> int:
        """Have the server end the requests of `items`; returns how many it did not end within ABORT_S."""
        if not items:
            return 0
        transport = server.lane.transport
        tasks, server.relieved = [server.open[item] for item in items], True
        for item in items:
            item.moves += 1
            item.avoid.add(server.place)
            item.taken = True
            call = transport.call(
                server.session, "POST", "/abort_request", {"rid": item.rid}, retry=False, json_answer=False
            )
            tasks.append(asyncio.ensure_future(_ignoring_errors(call)))
        _, late = await asyncio.wait(tasks, timeout=ABORT_S)
        server.relieved = False
        await cancelled([task for task in late if task not in tasks[: len(items)]])
        return sum(task in late for task in tasks[: len(items)])


async def _ignoring_errors(call: Coroutine[None, None, object]) -> None:
    """Await a request whose effect shows elsewhere."""
    with suppress(ServerError):
        await call
