"""What is printed: names of strangers may hold control characters, which a terminal obeys; they are shown escaped."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TextIO


def printable(text: str, kept: str = "") -> str:
    r"""Escape what cannot be printed, such as the escape character, line breaks, and marks that turn the direction of text.

    Example:
        >>> printable("cat\x1b[2J")
        'cat\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(text: str, file: TextIO | None = None, flush: bool = False) -> None:
    """Print lines that may hold names of strangers."""
    print(printable(text, "\n"), file=file, flush=flush)


def package_version() -> str:
    """The version of this package, "unknown" of a checkout that is not installed."""
    try:
        return version("detpipe")
    except PackageNotFoundError:
        return "unknown"
