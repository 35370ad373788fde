"""What `dispatch` is given and what it returns: servers as lanes, how questions are asked, and their answers.

Nothing here sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.transport import Transport
from tropd_mcore.serving.wire import Json

Question = TypeVar("Question")
Answer = TypeVar("Answer")

NEAR_MEAN = (0.5, 2.0)
"""Speeds between these bounds count as 1."""


@dataclass(frozen=True)
class Work(Generic[Question, Answer]):
    """What is asked. Every function is pure."""

    body: Callable[[Question, str], Json]
    """The request's body; the text is its id, by which it can be aborted"""
    read: Callable[[object, Question], Answer]
    """Decodes an answer. Raises AnswerError"""
    tokens: Callable[[Answer], int]
    """Tokens that the server computed for an answer"""
    size: Callable[[Question], tuple[int, ...]]
    """Sort key: the largest is asked first"""
    group: Callable[[Question], object] = id
    """Questions of one group share a prefix, so they go to one server if that leaves no other idle"""
    is_part: Callable[[Answer], bool] = lambda _: False
    """Whether an answer was cut by an abort"""
    after: Callable[[Question, Answer], Question] | None = None
    """The question that continues after a part; None = a question that is moved is asked anew, with the same result"""
    joined: Callable[[Sequence[Answer]], Answer] = lambda answers: answers[-1]
    """One answer from its parts in order"""
    refuses: Callable[[Answer], str | None] = lambda _: None
    """Why a server whose answer is well formed must not be used, for example for its weights; None = it may be"""


@dataclass
class Lane:
    """One server. `speed` is its share of what is asked, relative to the other servers."""

    transport: Transport
    speed: float = 1.0


@dataclass
class Dispatched(Generic[Answer]):
    """The answers in the order of the questions, and what happened to the servers, by their place in the lanes."""

    answers: list[Answer | ServerError]
    lost: dict[int, ServerError] = field(default_factory=dict)
    """Servers that answer no more in this call -> why"""
    may_return: set[int] = field(default_factory=set)
    """Those of `lost` that need no new start: very slow ones, and those that `Work.refuses`"""
    speeds: dict[int, float] = field(default_factory=dict)
    """Tokens per second and request of the servers that computed any"""
    slow: set[int] = field(default_factory=set)
    """Servers that the others had to wait for, or to relieve"""
    moved: int = 0
    """Questions that went on elsewhere, from their tokens so far"""
    cut: int = 0
    """Times that somebody else has aborted a question, which went on from its tokens"""
    again: int = 0
    """Questions that were asked again from their beginning, because their server was lost"""
    nonsense: dict[int, list[str]] = field(default_factory=dict)
    """Of each server, its answers that made no sense, so that the request was sent once more"""


class Speeds:
    """The speeds of servers over several calls, each relative to their mean; `Lane.speed` of the next call.

    Small differences are noise, so a speed near the mean counts as the mean. A server that has become slow counts so at
    once, because the next call would wait for it; one that is fast again is believed step by step.
    """

    def __init__(self) -> None:
        self._known: dict[str, float] = {}

    def of(self, key: str) -> float:
        """Return the speed of a server, 1 if it is about that of the others or unknown."""
        speed = self._known.get(key, 1.0)
        return 1.0 if NEAR_MEAN[0] <= speed <= NEAR_MEAN[1] else speed

    def note(self, measured: Mapping[str, float]) -> None:
        """Add the rates of one call, in any unit."""
        mean = sum(measured.values()) / max(len(measured), 1)
        for key, rate in measured.items():
            before, now = self._known.get(key, 1.0), rate / mean if mean else 1.0
            self._known[key] = now if now < before / 2 else (before + now) / 2
