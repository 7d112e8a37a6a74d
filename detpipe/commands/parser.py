"""What plain commands share: a parser whose errors are one line, and commands that are groups of others, as ``data check``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Turn a parser's error into a `UsageError`."""
        raise UsageError(f"{message}; see '{self.prog} --help'")


def run_one_of(commands: Mapping[str, tuple[str, str]], group: str, text: str, arguments: Sequence[str]) -> int:
    """Run a command of a group.

    Args:
        commands: name -> module and function.
        group: what comes before the name, such as ``data``.
        text: the help of the group.
        arguments: the command and its arguments.

    Returns:
        The exit status.

    Raises:
        UsageError: there is no such command.
    """
    command, *rest = arguments or [""]
    if command in ("", "-h", "--help"):
        print(text, end="")
        return 0 if command else 2
    if command not in commands:
        raise UsageError(
            f"unknown command {command!r}: expected {', '.join(commands)}{did_you_mean(command, commands)}; "
            f"see 'detpipe {group} --help'"
        )
    module, function = commands[command]
    return getattr(import_module(module), function)(rest)
