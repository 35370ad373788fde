"""What `dispatch` remembers of each question and of each server during one call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import aiohttp

from tropd_mcore.errors import ServerError
from tropd_mcore.serving.work import Lane

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class Item(Generic[Question, Answer]):
    """One question on its way."""

    index: int
    question: Question
    parts: list[Answer] = field(default_factory=list)
    moves: int = 0
    """How often it was taken from a slow server"""
    cuts: int = 0
    """How often somebody else has aborted it"""
    errors: int = 0
    avoid: set[int] = field(default_factory=set)
    """Places of servers that must not get it if another is left"""
    rid: str = ""
    since: float = 0.0
    """Time at which the server got it"""
    taken: bool = False
    """Whether the server was told to abort it"""


@dataclass(eq=False)
class Served(Generic[Question, Answer]):
    """A server during the call."""

    place: int
    lane: Lane
    session: aiohttp.ClientSession
    open: dict[Item[Question, Answer], asyncio.Task[None]] = field(default_factory=dict)
    lost: ServerError | None = None
    answered: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Sum of the times of all answers and parts"""
    cleared_until: float = 0.0
    """Time until which it counts as not slow"""
    relieved: bool = False
    """Its questions are being taken away, so it gets no others"""

    @property
    def room(self) -> int:
        return self.lane.transport.max_concurrency - len(self.open)

    @property
    def pace(self) -> float | None:
        """Tokens per second of one request; None if nothing is known."""
        return self.tokens / self.seconds if self.seconds > 0 else None
