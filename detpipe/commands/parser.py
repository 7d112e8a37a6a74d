"""The parser of plain commands: its errors are one line, as all errors are that users can mend."""

from __future__ import annotations

import argparse
from typing import NoReturn

from detpipe.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Turn a parser's error into a `UsageError`."""
        raise UsageError(f"{message}; see '{self.prog} --help'")
