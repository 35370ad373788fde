"""What all that is started for a while has in common: it is ready inside of a `with` block and stopped after it."""

from __future__ import annotations

from typing import Self


class Started:
    """Base of servers, fleets and routers. As a context manager, it stops what it started, also if the start fails."""

    def start(self) -> None:
        """Start without waiting (see `wait_ready`)."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Wait until requests are answered."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop what was started. Harmless if nothing was."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            # __exit__ is not called when __enter__ fails
            self.stop()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
