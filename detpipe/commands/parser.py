"""What the commands share: a parser whose errors are one line, checks of numbers, bars of progress, and how a data set is named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean

OVERLAP = 0.2  # share of a tile that the next one has too


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; an empty text is no value, or ``""`` would stand for the current folder."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse arguments that are empty, as a variable of the shell that is not set."""
        if "" in (args or ()):
            self.error("an argument is empty; is a variable of the shell not set?")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Turn a parser's error into a `UsageError`; a misspelt option gets a suggestion."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if message.startswith("unrecognized arguments: -"):
            message += did_you_mean(unknown, self._option_string_actions)
        raise UsageError(f"{message}; see '{self.prog} --help'")


def check_least(options: Any, least: int, *names: str) -> None:
    """Refuse options, named as they are given, that are less than a number; those that were not given, None, are left out."""
    for name in names:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < least:
            option = f"-{name}" if len(name) == 1 else f"--{name}"
            raise UsageError(f"{option} must be {least} or more, got {value}")


def check_tiles(options: Any) -> None:
    """Refuse ``--tiles`` and ``--overlap`` outside of their ranges, and an overlap, or a way to merge, of no tiles."""
    check_least(options, 1, "tiles")
    if not 0 <= options.overlap <= 0.9:
        raise UsageError(f"--overlap must be in 0 to .9, got {options.overlap}")
    for name, usual in (("overlap", OVERLAP), ("merge", "nms")):
        if options.tiles is None and getattr(options, name, usual) != usual:
            raise UsageError(f"--{name} is about tiles: add --tiles SIDE, or leave it out")


def output_folder(path: str) -> Path:
    """A folder to write to, which need not exist; a UsageError if it is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--output {path}: is a file: name a folder")
    return Path(path)


def distinct(stem: str, taken: set[str]) -> str:
    """A name that no other file of a command has: ``a``, or ``a_2`` where ``a`` is taken."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name


def listed(messages: Sequence[str], most: int) -> list[str]:
    """Lines of the first messages, and how many more there are; none at all where none are to be shown."""
    lines = [f"    {' '.join(message.split())}" for message in messages[:most]]
    return [*lines, f"    and {len(messages) - most} more"] if 0 < most < len(messages) else lines


def left_out(counts: Mapping[str, int]) -> list[str]:
    """What of the counts of a data set was skipped or clipped, such as ``boxes clipped: 3``."""
    return [f"{key}: {n}" for key, n in counts.items() if n and ("skipped" in key or "clipped" in key)]


@contextmanager
def progress(
    total: int | None, name: str | None = None, unit: str = "image", logged: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of long work, and yield what moves it to the number done, of a total; ``logged``: not on terminals alone."""
    terminal = sys.stderr.isatty()
    shown: dict[str, Any] = (
        {"smoothing": 0.05, "mininterval": 0.1 if terminal else 30}
        if logged
        else {"leave": False, "disable": not terminal}
    )
    with tqdm(total=total, desc=name, unit=unit, **shown) as bar:

        def move(done: int, of: int) -> None:
            bar.total = of
            if not bar.n and done > 1:
                bar.initial = done  # done by an earlier run: not counted for the time left
            bar.update(done - bar.n)

        yield move
