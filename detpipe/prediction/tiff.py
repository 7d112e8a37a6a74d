"""TIFF files by window: of an image of any size, no more than a few of its tiles or strips are decoded at a time.

Needs tifffile (extra ``tiff``). Strips reach across the whole image: what is held of a file in strips grows with its width.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe.datasets import planes
from detpipe.images import Size
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.windows import ImageWindows, Windows
from detpipe.support.errors import DataError, UsageError
from detpipe.types import PixelType

_SUFFIXES = (".tif", ".tiff")
_HELD = 1 << 27  # bytes of decoded tiles or strips that are kept for the next window
_BITS = (8, 16, 32, 64)
_GRAY, _RGB, _YCBCR, _JPEG = 1, 2, 6, 7  # photometric interpretations, and a compression
_PREMULTIPLIED = 1  # an extra sample: alpha, with which the colors are multiplied


def open_windows(source: ImageInput, pixels: PixelType) -> Windows:
    """Open an image to be read part by part: a TIFF by its tiles or strips, any other format decoded as a whole.

    A DataError names what cannot be read.
    """
    if _is_tiff(source):
        with _named(source):
            windows = TiffWindows(source, pixels)
            if windows.fits:
                return windows
            if source.page:
                raise DataError(
                    f"{source.path}, page {source.page + 1}: only grey and RGB pages of 8 bits and more that are stored upright "
                    "are read behind the first; convert the file"
                )
    return ImageWindows(source.read(pixels))


def split_pages(inputs: Sequence[ImageInput]) -> list[ImageInput]:
    """Put each page of a TIFF in the place of the file, where it has several; smaller copies of a page are none.

    A UsageError where there are TIFF files, and no tifffile to read them.
    """
    split: list[ImageInput] = []
    for source in inputs:
        count = _count_pages(source) if _is_tiff(source) else 1
        split += [replace(source, page=page) for page in range(count)] if count > 1 else [source]
    return split


def _is_tiff(source: ImageInput) -> bool:
    return source.content is None and source.url is None and source.path.suffix.lower() in _SUFFIXES


def _count_pages(source: ImageInput) -> int:
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(source.path) as file:
            return sum(not page.is_reduced for page in file.pages)
    except Exception:  # reading it will say why
        return 1


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UsageError("--tiles reads TIFF files by tifffile: pip install 'detpipe[tiff]'") from error
    return tifffile


class TiffWindows(Windows):
    """A page of a TIFF, of which windows are read.

    Args:
        source: the file, and the page.
        pixels: the channels and values that are wanted.
    """

    def __init__(self, source: ImageInput, pixels: PixelType) -> None:
        self._source, self._pixels = source, pixels
        file = _tifffile().TiffFile(source.path)
        weakref.finalize(self, file.close)
        self._file = file.filehandle
        self._page: Any = [page for page in file.pages if not page.is_reduced][source.page or 0]
        self.size: Size = (self._page.imagelength, self._page.imagewidth)
        self._samples: int = self._page.samplesperpixel
        self._separate = self._page.axes == "SYX"
        tiled = self._page.is_tiled
        rows = self._page.tilelength if tiled else min(self._page.rowsperstrip, self.size[0])
        self._segment: Size = (rows, self._page.tilewidth if tiled else self.size[1])
        self._held: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()

    @property
    def fits(self) -> bool:
        """Whether it can be read so; other kinds are rare, and small, or have their channels in several pages."""
        page = self._page
        orientation = page.tags.get(planes.ORIENTATION)
        colors = (_GRAY, _RGB) + ((_YCBCR,) if page.compression == _JPEG else ())
        upright = orientation is None or orientation.value == 1
        plain = page.bitspersample in _BITS and page.photometric in colors and page.axes in ("YX", "YXS", "SYX")
        return upright and plain and self._pixels.channels in (1, 3, self._samples)

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Decode the tiles or strips of a part; a DataError names a damaged file, and one whose strips are too large."""
        with _named(self._source):
            values = self._window(top, left, height, width)
            color, premultiplied = self._page.photometric != _GRAY, _PREMULTIPLIED in self._page.extrasamples
            values = planes.wanted_samples(values, color, premultiplied, self._pixels)
            converted = planes.convert(values, False, self._pixels)
        return torch.from_numpy(converted).permute(2, 0, 1)

    def _window(self, top: int, left: int, height: int, width: int) -> npt.NDArray[Any]:
        """``[height, width, samples]`` as they are in the file."""
        if self._page.is_memmappable:
            whole = self._page.asarray(out="memmap")
            whole = np.moveaxis(whole, 0, 2) if self._separate else whole.reshape(*self.size, -1)
            return np.array(whole[top : top + height, left : left + width], dtype=whole.dtype.newbyteorder("="))
        high, wide = self._segment
        planes.check_pixels(high, wide)
        values = np.zeros((height, width, self._samples), self._page.dtype)
        down, across = (math.ceil(side / part) for side, part in zip(self.size, self._segment, strict=True))
        rows = range(top // high, (top + height - 1) // high + 1)
        columns = range(left // wide, (left + width - 1) // wide + 1)
        for plane, row, column in product(range(self._samples if self._separate else 1), rows, columns):
            segment = self._decoded((plane * down + row) * across + column)
            if segment is None:  # left out of a sparse file
                continue
            y, x = row * high - top, column * wide - left
            inside = segment[max(0, -y) : height - y, max(0, -x) : width - x]
            target = values[max(0, y) : max(0, y) + inside.shape[0], max(0, x) : max(0, x) + inside.shape[1]]
            if self._separate:
                target[:, :, plane] = inside[:, :, 0]
            else:
                target[:] = inside
        return values

    def _decoded(self, index: int) -> npt.NDArray[Any] | None:
        if index in self._held:
            self._held.move_to_end(index)
            return self._held[index]
        length = self._page.databytecounts[index]
        if not length:
            return None
        self._file.seek(self._page.dataoffsets[index])
        data = self._file.read(length)
        if len(data) < length:
            raise planes.Refused("ends early")
        segment, _, shape = self._page.decode(data, index, jpegtables=self._page.jpegtables)
        values = np.asarray(segment).reshape(*segment.shape[-3:])[: shape[1], : shape[2]]
        self._held[index] = values
        while len(self._held) > 1 and sum(one.nbytes for one in self._held.values()) > _HELD:
            self._held.popitem(last=False)
        return values


@contextmanager
def _named(source: ImageInput) -> Iterator[None]:
    """Let every error name the file."""
    where = f"{source.path}" if source.page is None else f"{source.path}, page {source.page + 1}"
    try:
        yield
    except (DataError, UsageError, MemoryError):
        raise
    except planes.Refused as error:
        raise DataError(f"{where}: {planes.without_advice(error)}") from error
    except Exception as error:  # decoders raise anything on damaged files
        hint = "; pip install imagecodecs" if isinstance(error, ImportError) or "imagecodecs" in str(error) else ""
        raise DataError(f"{where}: cannot be read by window ({error}){hint}") from error
