"""Limits for files of strangers, looked at before their content is built: directories of zip files, pickles, nested containers.

Each limit grows with the size of the file, so that what a program has honestly written is never near it.
"""

from __future__ import annotations

import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DEEPEST = 100  # levels of nesting
_ENTRIES = 2_000_000  # of a zip file
_UNPACKED, _RATIO = 2**26, 100  # bytes of a zip file may become so many, and so many times more
_OBJECTS, _BYTES_EACH = 500_000, 8  # so many in any pickle, and another for each so many bytes
_BITS = 512  # of an integer
_MARK = pickletools.markobject
_MADE = "EMPTY_LIST EMPTY_DICT LIST DICT TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE NEWOBJ OBJ INST"
# what it takes beyond its bytes in the file; a set takes that of four lists
_MEMORY = dict.fromkeys(_MADE.split(), 1) | {"EMPTY_SET": 4, "FROZENSET": 4}
_KINDS = {"get": "GET BINGET LONG_BINGET", "put": "PUT BINPUT LONG_BINPUT MEMOIZE", "mark": "MARK"}
_KINDS["grow"] = "APPEND APPENDS SETITEM SETITEMS ADDITEMS BUILD"
_OPCODES = {  # name -> what it takes besides all above the mark, whether it takes that, what it gives, memory, kind
    op.name: (
        (op.stack_before.index(_MARK) if _MARK in op.stack_before else len(op.stack_before)),
        _MARK in op.stack_before,
        2 if op.name == "DUP" else bool(op.stack_after),
        _MEMORY.get(op.name, 0),
        next((kind for kind, names in _KINDS.items() if op.name in names.split()), None),
    )
    for op in pickletools.opcodes
}


def check_zip(archive: zipfile.ZipFile, size: int, stored: bool = False) -> None:
    """Refuse a zip file of ``size`` bytes that is larger when unpacked than any honest one, by its directory.

    Raises:
        ValueError: it is compressed though it must be ``stored``, as PyTorch writes them; or its parts overlap, are too many, or
            unpack to too much.
    """
    parts = archive.infolist()
    unpacked, packed = sum(part.file_size for part in parts), sum(part.compress_size for part in parts)
    if stored and any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("its parts are compressed, which those of PyTorch never are")
    if len(parts) > _ENTRIES or packed > size or (stored and unpacked > size):
        raise ValueError(f"its directory names {len(parts)} parts of {packed} bytes in a file of {size}")
    if unpacked > _UNPACKED + _RATIO * size:
        raise ValueError(f"{size} bytes would unpack to {unpacked}")


def check_saved(path: Path) -> None:
    """Refuse a file of ``torch.save`` that would take much more memory than its size, or whose parts have other check sums.

    Raises:
        ValueError: see :func:`check_zip` and :func:`check_pickle`.
        zipfile.BadZipFile: it is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] != b"PK\x03\x04":  # what PyTorch goes by
            for _ in range(5):  # pickles, before the tensors
                check_pickle(content, min(size, _UNPACKED))
            return
    with zipfile.ZipFile(path) as archive:
        check_zip(archive, size, stored=True)
        for part in archive.infolist():
            if part.filename.endswith(".pkl"):
                check_pickle(archive.read(part), part.file_size)
        bad = archive.testzip()  # torch.load does not look at the sums of tensors
    if bad is not None:
        raise ValueError(f"{bad} does not match its check sum")


def check_pickle(content: Any, size: int) -> None:
    """Refuse a pickle, bytes or an open map of a file, that would take much more memory than its file, without building anything.

    Raises:
        ValueError: it is cut off, holds too many containers or levels, very long integers, or numbers no file needs.
    """
    made = 0
    stack: list[int] = []  # levels of each object; those of tuples are exact, which are what is hashed by recursion
    marks: list[int] = []
    memo: dict[int, int] = {}
    for count, (op, argument, _) in enumerate(pickletools.genops(content), start=1):
        take, to_mark, gives, memory, kind = _OPCODES[op.name]
        if kind == "mark":
            marks.append(len(stack))
        elif kind == "get":
            stack.append(memo.get(argument, 0))  # pyright: ignore
        elif kind == "put":
            number = len(memo) if argument is None else argument
            if number > count:
                raise ValueError(f"it numbers an object {number}, of {count} so far")
            memo[number] = stack[-1] if stack else 0
        else:
            if isinstance(argument, int) and (
                argument.bit_length() > _BITS or (op.name == "FRAME" and argument > size)
            ):
                raise ValueError(f"it holds an integer of {argument.bit_length()} bits")
            taken: list[int] = []
            if take or to_mark:
                start = max((marks.pop() if to_mark and marks else len(stack)) - take, 0)
                taken = stack[start:]
                del stack[start:]
            levels = 1 + max(taken) if taken else 0
            if kind == "grow" and taken:
                levels = max(taken[0], 1 + max(taken[1:], default=0))
            stack += [levels] * gives
            made += memory
            if levels > DEEPEST:
                raise ValueError(f"it nests more than {DEEPEST} levels")
            if made > _OBJECTS + size // _BYTES_EACH:
                raise ValueError(f"it makes more than {made - 1} objects of {size} bytes")


def plain_parts(value: Any) -> Iterable[Any]:
    """What a plain container holds; nothing for what is none."""
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def check_tree(value: Any, most: int, parts: Callable[[Any], Iterable[Any]] = plain_parts) -> None:
    """Refuse containers that are too deep, or hold more than ``most`` objects, counted as often as they are reached; a ValueError.

    ``parts`` tells what an object holds.
    """
    pending, count = [(value, 0)], 1
    while pending:
        item, depth = pending.pop()
        inner = parts(item)
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} levels")
        for part in inner:
            count += 1
            if count > most:
                raise ValueError(f"it holds more than {most} objects, those that are shared counted each time")
            pending.append((part, depth + 1))
