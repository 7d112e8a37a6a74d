"""Tables of text that other programs wrote: the records of a CSV file, and the lines where they stand."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from detpipe.support.errors import DataError
from detpipe.support.strict_json import read_text


def read_table(path: Path, delimiters: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The number of the first line and the values of each record; a value in quotes may hold line breaks.

    The delimiter is the one of ``delimiters`` that the first line has most of. A DataError if the file cannot be read, or quotes
    are not closed.
    """
    text = read_text(path, "table", newline="")
    delimiter = max(delimiters, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    line = 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {line}: not a valid table ({error}); check its quotes") from error
        if values is None:
            return
        yield line, values
        line = reader.line_num + 1
