"""Streams of the student's weights that every rank runs to their end, whoever reads them.

This module does not gather weights (see `mcore.weights_io`) and does not send them (see `fleet_publisher`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

MakeStream = Callable[[], Iterator[tuple[str, Tensor]]]


class Streams:
    """A fixed number of weight streams. Every rank runs each of them to its end, even if the reader fails.

    Each stream is collective, so a rank that stopped early would block the others.
    """

    def __init__(self, make: MakeStream, expected: int) -> None:
        self._make = make
        self._left = expected
        self._current: Iterator[tuple[str, Tensor]] = iter(())

    def next(self) -> Iterator[tuple[str, Tensor]]:
        """Finish the current stream and return the next one."""
        self._drain()
        assert self._left > 0, "more streams were asked for than the other ranks take part in"
        self._left -= 1
        self._current = self._make()
        return self._current

    def exhaust(self) -> None:
        """Run all remaining streams to their end."""
        self._drain()
        while self._left:
            self.next()
            self._drain()

    def _drain(self) -> None:
        for _ in self._current:
            pass
