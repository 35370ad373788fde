"""Calls that run in daemon threads while this thread goes on or waits, with a limit on every wait.

This module does not stop a call: a thread ends when its call ends. Invariant: an error of a call is kept until somebody
asks for its result, and no thread of this module keeps the process alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from tropd_mcore.errors import ServerError

Result = TypeVar("Result")
Key = TypeVar("Key")

POLL_S = 0.005
"""Seconds between two looks at a call."""


class Background(Generic[Result]):
    """A call that runs in a thread."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="weights", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Result]) -> None:
        try:
            self._result = call()
        except BaseException as error:  # raised again in the thread that asks for the result
            self._error = error

    @property
    def ended(self) -> bool:
        """Whether the call has ended, well or with an error."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """The error of a call that has ended with one."""
        return self._error if self.ended else None

    def wait(self, limit_s: float | None = None) -> bool:
        """Wait at most `limit_s`, by default until the call ends. Returns whether it has ended."""
        self._thread.join(limit_s)
        return self.ended

    def result(self) -> Result:
        """Wait for the call, then return its result or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


def wait_until(happened: Callable[[], bool], limit_s: float) -> bool:
    """Wait until `happened`, at most `limit_s`. Returns whether it has happened."""
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def at_once(calls: Mapping[Key, Callable[[], Result]]) -> tuple[dict[Key, Result], dict[Key, ServerError]]:
    """Run all calls at the same time and wait for all of them: (results, errors of those that failed).

    Each call must have a limit. Raises the first error that is no ServerError.
    """
    if len(calls) == 1:  # in this thread, which a signal can interrupt
        ((key, call),) = calls.items()
        try:
            return {key: call()}, {}
        except ServerError as error:
            return {}, {key: error}
    running = {key: Background(call) for key, call in calls.items()}
    results: dict[Key, Result] = {}
    errors: dict[Key, ServerError] = {}
    other: BaseException | None = None
    for key, thread in running.items():
        try:
            results[key] = thread.result()
        except ServerError as error:
            errors[key] = error
        except BaseException as error:
            other = other or error
    if other is not None:
        raise other
    return results, errors
