"""The errors that a user can cause or see, each one line: what was expected, what was found, which key to change.

Internal invariants use `assert` instead. A `TropdError` ends the run with its message only (no traceback) and exit code
2. Any other exception is a bug and keeps its traceback.
"""


class TropdError(Exception):
    """Base of every error that the user can act upon."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConfigError(TropdError):
    """The configuration is wrong; `problems` holds every problem found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Pickle by `problems`, so that the error can be sent to all ranks of a job."""
        return type(self), (self.problems,)


class DataError(TropdError):
    """A prompt file, a stored response or a tokenizer does not fit."""


class ModelError(TropdError):
    """A model folder, a weight file or a checkpoint is missing, damaged or of another shape."""


class ServerError(TropdError):
    """An inference server did not start, died, or gave an unusable answer."""


class ServerDied(ServerError):
    """A server that answered before does not answer any more. The caller may restart it and ask again.

    `url` is its address, if that is known; it tells a router from the servers behind it.
    """

    def __init__(self, message: str, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class ServerHung(ServerDied):
    """A server whose process runs but has not answered for long. It must be killed and restarted before a retry."""


class GroupBroken(ServerError):
    """A healthy server missed an update because another one failed in the same broadcast. It may be sent again."""


class AnswerError(ServerError):
    """A server's answer for one sample cannot be used. The caller may ask once more, then leaves the sample out."""


class TeacherError(TropdError):
    """The teacher could not score its input."""


class GateError(TropdError):
    """A check before the first step or at a later step failed; training would use wrong numbers."""


class LossInputError(TropdError, ValueError):
    """The loss was called, or differentiated, in a way whose gradient would be wrong."""


class TrainingError(TropdError):
    """The optimisation itself went wrong (non-finite loss or gradient)."""


class StopRequested(TropdError):
    """The run was asked to stop (a signal of the scheduler). This is no failure; whatever can be kept is kept."""
