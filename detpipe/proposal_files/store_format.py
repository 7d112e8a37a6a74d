"""The file format of proposal stores, version 1: a safetensors file with an index inside.

Why safetensors: the package depends on it already, reading it runs no code, and its JSON header says where each array
lies, so that a file of gigabytes is mapped into memory and read from any language. Arrow IPC offers the same for one
dependency more; HDF5 is neither mapped nor safe to read in forked data workers.

Layout (I images, T boxes, B bytes of ids; little-endian, as safetensors demands)::

    offsets    [I + 1] int64    boxes of image i are the rows offsets[i]:offsets[i + 1]
    id_offsets [I + 1] int64    the id of image i is id_bytes[id_offsets[i]:id_offsets[i + 1]]
    extents    [I, 4]  float32  least x1, least y1, greatest x2, greatest y2 of the image's boxes; zeros without boxes
    sizes      [I, 2]  int32    height and width of the image that the boxes were made for; 0, 0 where unknown
    boxes      [T, 4]  float32  x1, y1, x2, y2: continuous pixel edges in the frame of the image file
    scores     [T]     float32  descending within an image
    id_bytes   [B]     uint8    UTF-8, ascending by bytes, no id twice

Metadata: ``format`` ("detpipe.proposals"), ``version``, ``source``, ``settings`` (JSON) and ``content_hash``. The hash is
the SHA-256 of version, source, settings and, in the order of the ids, the SHA-256 of each image's id, size, boxes and
scores. Readers ignore arrays and metadata that they do not know; the version rises when they could misread a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError

FORMAT, VERSION = "detpipe.proposals", 1
SUFFIX = ".safetensors"
ITEM_BYTES = {"I64": 8, "F32": 4, "I32": 4, "U8": 1}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Description:
    """What a store says about itself."""

    source: str
    settings: dict[str, Any]
    content_hash: str
    version: int = VERSION


@dataclass(frozen=True)
class Layout:
    """How much a store holds, and where.

    Args:
        images: I.
        boxes: T.
        id_bytes: B.
        starts: name of the array -> its first byte, counted from the start of the file.
    """

    images: int
    boxes: int
    id_bytes: int
    starts: dict[str, int]


def arrays(images: int, boxes: int, id_bytes: int) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each array, in the order of the file: those with the largest numbers first, for alignment."""
    return {
        "offsets": ("I64", [images + 1]),
        "id_offsets": ("I64", [images + 1]),
        "extents": ("F32", [images, 4]),
        "sizes": ("I32", [images, 2]),
        "boxes": ("F32", [boxes, 4]),
        "scores": ("F32", [boxes]),
        "id_bytes": ("U8", [id_bytes]),
    }


def canonical_settings(settings: Any) -> str:
    """Write settings as JSON that is the same for equal settings.

    Args:
        settings: a dict of text, finite numbers, bools, None, lists and dicts with text keys.

    Returns:
        JSON with sorted keys and no spaces.

    Raises:
        ValueError: the settings are not of that kind, or would be read back as something else.
    """
    try:
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
        same = isinstance(settings, dict) and json.loads(text) == _plain(settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"settings must be a dict that JSON can hold, got {settings!r} ({error})") from error
    if not same:
        raise ValueError(f"settings must be a dict with text keys that JSON can hold, got {settings!r}")
    return text


def image_digest(
    name: bytes, size: tuple[int, int], boxes: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]
) -> bytes:
    """Hash one image's entry.

    Args:
        name: the id in UTF-8.
        size: height and width, or 0, 0.
        boxes: ``[P, 4]`` as stored.
        scores: ``[P]`` as stored.

    Returns:
        32 bytes.
    """
    digest = hashlib.sha256(struct.pack("<qqii", len(name), len(boxes), *size) + name)
    digest.update(np.ascontiguousarray(boxes, dtype="<f4").data)
    digest.update(np.ascontiguousarray(scores, dtype="<f4").data)
    return digest.digest()


def content_hash(source: str, settings: dict[str, Any], digests: Iterable[bytes]) -> str:
    """Hash a whole store.

    Args:
        source: the source's name.
        settings: its settings.
        digests: `image_digest` of each image, in the order of the ids.

    Returns:
        64 hexadecimal digits.
    """
    name, text = source.encode(), canonical_settings(settings).encode()
    whole = hashlib.sha256(struct.pack("<qqq", VERSION, len(name), len(text)) + name + text)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def build_header(description: Description, images: int, boxes: int, id_bytes: int) -> bytes:
    """Make what stands before the arrays.

    Args:
        description: source, settings and hash.
        images: I.
        boxes: T.
        id_bytes: B.

    Returns:
        The length of the header and the header, a multiple of 8 bytes.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(description.version),
            "source": description.source,
            "settings": canonical_settings(description.settings),
            "content_hash": description.content_hash,
        }
    }
    start = 0
    for name, (kind, shape) in arrays(images, boxes, id_bytes).items():
        end = start + ITEM_BYTES[kind] * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(file: BinaryIO, path: Path, file_bytes: int) -> tuple[Description, Layout]:
    """Read and check what stands before the arrays.

    Args:
        file: the open store, at its start.
        path: its name, for messages.
        file_bytes: its length.

    Returns:
        What the store says about itself, and where its arrays lie.

    Raises:
        DataError: the file is something else, is cut off or damaged, or was written by a newer version.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= _MAX_HEADER:
        raise _foreign(path, "it does not start like a safetensors file")
    text = file.read(min(length, file_bytes))
    if text[:1] != b"{":
        raise _foreign(path, "it does not start like a safetensors file")
    if len(text) < length:
        raise _cut_off(path, file_bytes, f"more than {8 + length}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f"its header is not valid JSON ({error})") from error
    description = _read_metadata(header, path)
    return description, _read_layout(header, path, 8 + length, file_bytes)


def _read_metadata(header: dict[str, Any], path: Path) -> Description:
    metadata = header.get("__metadata__")
    kind = metadata.get("format") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or kind != FORMAT:
        names = ", ".join(sorted(set(header) - {"__metadata__"})[:5]) or "none"
        raise _foreign(path, f"it is a safetensors file of another kind (format {kind!r}, arrays: {names})")
    version = metadata.get("version", "")
    if not (isinstance(version, str) and version.isascii() and version.isdigit() and int(version) > 0):
        raise _damaged(path, f"its version is {version!r}, not a whole number")
    if int(version) > VERSION:
        raise DataError(
            f"{path}: a proposal store of version {version}, but this program reads versions up to {VERSION}: "
            "update detpipe, or write the store again with this one"
        )
    source, digest = metadata.get("source"), metadata.get("content_hash")
    try:
        settings = json.loads(metadata.get("settings", ""))
    except (TypeError, ValueError, RecursionError):
        settings = None
    if not isinstance(source, str) or not isinstance(settings, dict):
        raise _damaged(path, "its source or settings cannot be read")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise _damaged(path, f"its content_hash is {digest!r}, not 64 hexadecimal digits")
    return Description(source, settings, digest, int(version))


def _read_layout(header: dict[str, Any], path: Path, first: int, file_bytes: int) -> Layout:
    found: dict[str, tuple[str, list[int], list[int]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        parts = entry if isinstance(entry, dict) else {}
        kind, shape, place = parts.get("dtype"), parts.get("shape"), parts.get("data_offsets")
        if not isinstance(kind, str) or not _whole(shape) or not _whole(place) or len(place) != 2:
            raise _damaged(path, f"the header's entry of the array {name!r} cannot be read")
        found[name] = (kind, shape, place)
    end = max([0, *(places[1] for _, _, places in found.values())])
    if file_bytes < first + end:
        raise _cut_off(path, file_bytes, str(first + end))
    if file_bytes > first + end:
        raise _damaged(path, f"it has {file_bytes} bytes, {file_bytes - first - end} more than its header says")
    images, boxes, id_bytes = (
        found[name][1][0] if name in found and found[name][1] else 0 for name in ("sizes", "boxes", "id_bytes")
    )
    starts = {}
    for name, (kind, shape) in arrays(images, boxes, id_bytes).items():
        if name not in found:
            raise _damaged(path, f"the array {name!r} is missing")
        found_kind, found_shape, (start, stop) = found[name]
        if found_kind != kind or found_shape != shape or stop - start != ITEM_BYTES[kind] * prod(shape):
            raise _damaged(path, f"the array {name!r} is {found_kind} {found_shape}, expected {kind} {shape}")
        starts[name] = first + start
    return Layout(images, boxes, id_bytes, starts)


def _whole(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _plain(value: Any) -> Any:
    """Tuples become lists, as in JSON."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _foreign(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: not a proposal store: {reason}; make a store of other formats with 'detpipe proposals convert'"
    )


def _cut_off(path: Path, has: int, needs: str) -> DataError:
    return DataError(f"{path}: cut off: it has {has} bytes of {needs}; copy or write it again")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged: {reason}; copy or write it again")
