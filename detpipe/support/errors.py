"""Errors that users see as one line: what is wrong, where, and what to do about it.

Each takes a single string, so that it survives the trip from a data worker to the main process.
"""

from __future__ import annotations


class DetpipeError(Exception):
    """Base of the errors that end a command with exit status 1 and one line instead of a traceback."""


class DataError(DetpipeError, ValueError):
    """A fault in images or annotations: names the file, the record, the field and the value."""


class DownloadError(DetpipeError, RuntimeError):
    """A file that cannot be fetched or unpacked: names its address or path and what was expected of it."""


class CheckpointError(DetpipeError, ValueError):
    """A checkpoint or weights file that is missing, damaged, or belongs to another model or data set."""


class TrainingError(DetpipeError, RuntimeError):
    """Training cannot go on: names the step and the images of the batch."""


class NonFiniteStepError(TrainingError):
    """A step of training met a NaN or an infinity before it had a loss.

    Args:
        message: what is wrong and what to do.
        what: what is not finite, for who adds the step and the batch; None: the message.
    """

    def __init__(self, message: str, what: str | None = None) -> None:
        super().__init__(message)
        self.what = what or message


class StoppedBySignal(DetpipeError):
    """A training that a signal ended between two steps.

    Args:
        message: what was saved, and how to go on.
        status: the exit status of the command.
    """

    def __init__(self, message: str, status: int = 143) -> None:
        super().__init__(message)
        self.status = status


class UsageError(DetpipeError, ValueError):
    """A wrong command line or configuration: ends a command with exit status 2."""
