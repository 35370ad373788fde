"""The errors a user can cause or meet, each one line: what was expected, what was found, which key to change.

Not for our own invariants: those are `assert`. A `TropdError` ends the run with its message alone (no traceback)
and exit code 2; any other exception is a bug and keeps its traceback.
"""


class TropdError(Exception):
    """Base of every error that the user can act upon."""


def first_line(error: Exception) -> str:
    """Return the first line of what another library says, its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class ConfigError(TropdError):
    """The configuration is wrong; `problems` holds every problem found, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Pickled by its problems, so that it can be met on all ranks of a job."""
        return type(self), (self.problems,)


class DataError(TropdError):
    """A prompt file, a stored response or a tokenizer does not fit."""


class ModelError(TropdError):
    """A model folder, a weight file or a checkpoint is missing, damaged or of another shape."""


class ServerError(TropdError):
    """An inference server did not start, died, or answered something that cannot be used."""


class ServerDied(ServerError):
    """A server that answered before does not answer any more: the caller may restart it and ask again."""


class ServerHung(ServerDied):
    """A server whose process runs but that has not answered for long: to be killed and restarted, not asked again."""


class AnswerError(ServerError):
    """What a server answered about one sample cannot be used: the caller may ask once more, then leaves it out."""


class TeacherError(TropdError):
    """The teacher could not score what it was given."""


class GateError(TropdError):
    """A check before the first step, or at a later one, failed: training would run on wrong numbers."""


class LossInputError(TropdError, ValueError):
    """The loss was called, or differentiated, in a way whose gradient would be wrong."""


class TrainingError(TropdError):
    """The optimisation itself went wrong (non-finite loss or gradient)."""


class StopRequested(TropdError):
    """Somebody asked the run to stop (a signal of the scheduler): not a failure; what can be kept is kept."""
