"""What `dispatch` is given and what it returns: servers as lanes, how questions are asked, and their answers.

Nothing here sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.transport import Transport
from tropd_mcore.serving.wire import Json

Question = TypeVar("Question")
Answer = TypeVar("Answer")


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
    """Tokens per second of the servers that computed any"""
    moved: int = 0
    """Questions that went on elsewhere, from their tokens so far"""
    again: int = 0
    """Questions that were asked again from their beginning, because their server was lost"""
    nonsense: list[str] = field(default_factory=list)
    """Answers that made no sense, so that the request was sent once more"""
