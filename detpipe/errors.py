"""Errors that users see as one line: what is wrong, where, and what to do about it.

Each takes a single string, so that it survives the trip from a data worker to the main process.
"""


class DetpipeError(Exception):
    """Base of the errors that end a command with exit status 1 and one line instead of a traceback."""


class DataError(DetpipeError, ValueError):
    """A fault in images or annotations: names the file, the record, the field and the value."""


class CheckpointError(DetpipeError, ValueError):
    """A checkpoint or weights file that is missing, damaged, or belongs to another model or data set."""


class TrainingError(DetpipeError, RuntimeError):
    """Training cannot go on: names the step and the images of the batch."""


class UsageError(DetpipeError, ValueError):
    """A wrong command line or configuration: ends a command with exit status 2."""
