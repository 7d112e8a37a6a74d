"""The file format of proposal stores, version 1, and what writes it: a safetensors file with an index inside.

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

The bytes of a store depend on its content alone, neither on the order of adding nor on time or machine.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from detpipe.proposal_files.box_checks import read_entry
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write

FORMAT, VERSION = "detpipe.proposals", 1
SUFFIX = ".safetensors"
_DTYPES = {kind: np.dtype(name) for kind, name in (("I64", "<i8"), ("F32", "<f4"), ("I32", "<i4"), ("U8", "u1"))}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Description:
    """What a store says about itself."""

    source: str
    settings: dict[str, Any]
    content_hash: str
    version: int = VERSION


class _Versioned(msgspec.Struct):
    version: Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{0,8}$")]


class _Metadata(msgspec.Struct):
    source: str
    settings: str
    content_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class Place(NamedTuple):
    """Where an array lies in a file."""

    start: int  # its first byte
    dtype: np.dtype[Any]
    shape: list[int]

    def view(self, content: mmap.mmap) -> npt.NDArray[Any]:
        """The array in a file that is mapped into memory, read-only."""
        return np.frombuffer(content, self.dtype, prod(self.shape), self.start).reshape(self.shape)


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
    """Write settings as JSON that is the same for equal settings; a ValueError where they would be read back as something else."""
    try:
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
        same = isinstance(settings, dict) and json.loads(text) == msgspec.to_builtins(settings)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"settings must be a dict that JSON can hold, got {settings!r} ({error})") from error
    if not same:
        raise ValueError(f"settings must be a dict with text keys that JSON can hold, got {settings!r}")
    return text


def extent(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Least x1, y1 and greatest x2, y2 of boxes ``[P, 4]``: ``[4]``; zeros without boxes."""
    if not len(boxes):
        return np.zeros(4, dtype="<f4")
    return np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])


def image_digest(
    name: bytes, size: Sequence[int], boxes: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]
) -> bytes:
    """Hash one image's entry: its id in UTF-8, height and width or 0, 0, boxes ``[P, 4]`` and scores ``[P]`` as stored."""
    digest = hashlib.sha256(struct.pack("<qqii", len(name), len(boxes), *size) + name)
    digest.update(np.ascontiguousarray(boxes, dtype="<f4").data)
    digest.update(np.ascontiguousarray(scores, dtype="<f4").data)
    return digest.digest()


def content_hash(source: str, settings: dict[str, Any], digests: Iterable[bytes]) -> str:
    """Hash a whole store, of whose images `image_digest` gave the digests in the order of the ids."""
    name, text = source.encode(), canonical_settings(settings).encode()
    whole = hashlib.sha256(struct.pack("<qqq", VERSION, len(name), len(text)) + name + text)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def build_header(description: Description, images: int, boxes: int, id_bytes: int) -> bytes:
    """Make what stands before the arrays of I images, T boxes and B bytes of ids: its length and itself, a multiple of 8 bytes."""
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
        end = start + _DTYPES[kind].itemsize * prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(file: BinaryIO, path: Path, file_bytes: int) -> tuple[Description, dict[str, Place]]:
    """Read and check what stands before the arrays of an open store: what it says about itself, and where its arrays lie.

    A DataError if the file is something else, is cut off or damaged, or was written by a newer version.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    text = file.read(min(length, file_bytes)) if len(start) == 8 and 2 <= length <= _MAX_HEADER else b""
    if text[:1] != b"{":
        raise _foreign(path, "it does not start like a safetensors file")
    if len(text) < length:
        raise _cut_off(path, file_bytes, f"more than {8 + length}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, f"its header is not valid JSON ({error})") from error
    description = _read_metadata(header.pop("__metadata__", None), header, path)
    return description, _read_layout(header, path, 8 + length, file_bytes)


def _read_metadata(values: Any, arrays: Iterable[str], path: Path) -> Description:
    kind = values.get("format") if isinstance(values, dict) else None
    if kind != FORMAT:
        names = ", ".join(sorted(arrays)[:5]) or "none"
        raise _foreign(path, f"it is a safetensors file of another kind (format {kind!r}, arrays: {names})")
    try:
        version = int(msgspec.convert(values, _Versioned).version)
        if version > VERSION:
            raise DataError(
                f"{path}: a proposal store of version {version}, but this program reads versions up to {VERSION}: "
                "update detpipe, or write the store again with this one"
            )
        metadata = msgspec.convert(values, _Metadata)
        settings = msgspec.json.decode(metadata.settings, type=dict)
    except (msgspec.DecodeError, RecursionError) as error:
        raise damaged(path, f"its metadata cannot be read ({error})") from error
    return Description(metadata.source, settings, metadata.content_hash, version)


def _read_layout(header: dict[str, Any], path: Path, first: int, file_bytes: int) -> dict[str, Place]:
    found: dict[str, _Entry] = {}
    for name, entry in header.items():
        try:
            found[name] = msgspec.convert(entry, _Entry)
        except msgspec.ValidationError as error:
            raise damaged(path, f"the header's entry of the array {name!r} cannot be read ({error})") from error
    end = max((entry.data_offsets[1] for entry in found.values()), default=0)
    if file_bytes < first + end:
        raise _cut_off(path, file_bytes, str(first + end))
    if file_bytes > first + end:
        raise damaged(path, f"it has {file_bytes} bytes, {file_bytes - first - end} more than its header says")
    images, boxes, id_bytes = (
        found[name].shape[0] if name in found and found[name].shape else 0 for name in ("sizes", "boxes", "id_bytes")
    )
    places = {}
    for name, (kind, shape) in arrays(images, boxes, id_bytes).items():
        if name not in found:
            raise damaged(path, f"the array {name!r} is missing")
        entry, length = found[name], _DTYPES[kind].itemsize * prod(shape)
        if (entry.dtype, entry.shape) != (kind, shape) or entry.data_offsets[1] - entry.data_offsets[0] != length:
            raise damaged(path, f"the array {name!r} is {entry.dtype} {entry.shape}, expected {kind} {shape}")
        places[name] = Place(first + entry.data_offsets[0], _DTYPES[kind], shape)
    return places


def _foreign(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: not a proposal store: {reason}; make a store of other formats with 'detpipe proposals convert'"
    )


def _cut_off(path: Path, has: int, needs: str) -> DataError:
    return DataError(f"{path}: cut off: it has {has} bytes of {needs}; copy or write it again")


def damaged(path: Path, reason: str) -> DataError:
    """The error for content that is not as the format demands."""
    return DataError(f"{path}: damaged: {reason}; copy or write it again")


class _Added(NamedTuple):
    start: int  # first byte of its boxes in the temporary file; its scores follow
    count: int
    size: tuple[int, int]
    extent: bytes
    digest: bytes


class ProposalWriter:
    """Writes a proposal store image by image, in any order; nothing appears under its name before `close`.

    The boxes go to a nameless temporary file beside the target, of which nothing is left when the process dies; `close` copies
    them in the order of the ids. The index that stays in memory is about 500 bytes an image.

    As a context manager it closes at the end of the block, and drops everything after an exception.

    Args:
        path: the store to write, ``*.safetensors``; an existing one is replaced.
        source: the name of what made the boxes, such as ``"selective_search"``.
        settings: its settings, as JSON can hold them.

    Raises:
        ValueError: another suffix, an empty source, or settings that JSON cannot hold.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "boxes.safetensors"
        >>> with ProposalWriter(path, source="by hand", settings={}) as writer:
        ...     writer.add("139", [[0, 0, 10, 20]], [0.5])
        >>> path.is_file()
        True
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, source: str, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise ValueError(f"{self.path}: the name of a proposal store must end in {SUFFIX}")
        if not isinstance(source, str) or not source or not _is_utf8(source):
            raise ValueError(f"{self.path}: source must name what made the boxes, got {source!r}")
        canonical_settings(settings)
        self.source, self.settings = source, settings
        self._entries: dict[bytes, _Added] = {}
        self._end = 0
        self._boxes: BinaryIO | None = None
        self._done = False

    def __enter__(self) -> ProposalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image_id: str) -> bool:
        return encode_id(image_id, self.path) in self._entries

    def add(self, image_id: str, boxes: Any, scores: Any, size: tuple[int, int] | None = None) -> None:
        """Add the boxes of one image.

        Args:
            image_id: COCO's number in decimal, or VOC's file stem.
            boxes: ``[P, 4]`` xyxy, continuous pixel edges in the frame of the image file.
            scores: ``[P]``; boxes are sorted by descending score, those with equal scores keep their order.
            size: height and width of the image in pixels, None where unknown; with it, use of the store for other
                images or a resized frame is found out, and boxes that reach beyond the image are refused.

        Raises:
            DataError: an id twice, a wrong shape, a number that is not finite, or a box of negative size; the store,
                the image, the box and its value are named, and the image is not added.
            ValueError: the writer was closed before.
        """
        if self._done:
            raise ValueError(f"{self.path}: the writer is closed; make another one for another store")
        name = encode_id(image_id, self.path)
        where = f"{self.path}: image {image_id!r}"
        if name in self._entries:
            raise DataError(f"{where}: added twice; a store has one entry for each image")
        known = _read_size(size, where)
        numbers, values = read_entry(boxes, scores, where, known)
        stored_scores = values.astype("<f4") + np.float32(0)  # no negative zeros, which hash differently
        order = np.argsort(-stored_scores, kind="stable")
        stored, stored_scores = numbers.astype("<f4")[order] + np.float32(0), stored_scores[order]
        digest = image_digest(name, known or (0, 0), stored, stored_scores)
        file = self._open()
        file.write(stored.tobytes())
        file.write(stored_scores.tobytes())
        self._entries[name] = _Added(self._end, len(stored), known or (0, 0), extent(stored).tobytes(), digest)
        self._end += 20 * len(stored)

    def close(self) -> None:
        """Write the store under its name; nothing happens if that was done or given up before.

        Raises:
            OSError: the disk is full or the folder cannot be written to; what was under the name stays.
        """
        if self._done:
            return
        names = sorted(self._entries)
        digest = content_hash(self.source, self.settings, (self._entries[name].digest for name in names))
        description = Description(self.source, self.settings, digest)
        try:
            with atomic_write(self.path) as temporary, temporary.open("wb") as file:
                file.write(build_header(description, len(names), self._end // 20, sum(map(len, names))))
                for part in self._parts(names):
                    file.write(part)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was added; the store is not written."""
        if self._boxes is not None:
            self._boxes.close()
        self._boxes = None
        self._entries, self._end, self._done = {}, 0, True

    def _open(self) -> BinaryIO:
        if self._boxes is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._boxes = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 (closed by close and abort)
        return self._boxes

    def _parts(self, names: list[bytes]) -> Iterator[bytes]:
        """The arrays in the order of `arrays`, piece by piece."""
        entries = [self._entries[name] for name in names]
        yield np.fromiter(accumulate((e.count for e in entries), initial=0), dtype="<i8").tobytes()
        yield np.fromiter(accumulate(map(len, names), initial=0), dtype="<i8").tobytes()
        yield b"".join(entry.extent for entry in entries)
        yield b"".join(struct.pack("<ii", *entry.size) for entry in entries)
        for first, length in ((0, 16), (16, 4)):  # bytes of a box, then of a score
            for entry in entries:
                if entry.count:
                    file = self._open()
                    file.seek(entry.start + first * entry.count)
                    yield file.read(length * entry.count)
        yield b"".join(names)


def encode_id(image_id: Any, path: Path) -> bytes:
    """Turn an image id into the bytes that a store holds; a DataError, which starts with ``path``, where that cannot be."""
    if not isinstance(image_id, str) or not image_id or not _is_utf8(image_id):
        raise DataError(f"{path}: an image id must be text (UTF-8) that is not empty, such as '139', got {image_id!r}")
    return image_id.encode()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_size(size: Any, where: str) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2 or not all(isinstance(side, int | np.integer) and 0 < side < 2**31 for side in size):
        raise DataError(f"{where}: size must be height and width in pixels, got {size!r}")
    return int(size[0]), int(size[1])
