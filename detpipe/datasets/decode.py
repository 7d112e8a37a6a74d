"""Image files to tensors by one written rule, whichever library decodes them: 3 x 8-bit RGB, unless other pixels are asked for.

JPEGs are decoded by simplejpeg where it is installed (extra ``fast``), else by torchvision, both quicker than Pillow and with the
same pixels; everything else by Pillow.

Where a small image is wanted, a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale: the inverse cosine transform of a block of 8 x 8
then gives 4 x 4, 2 x 2 or 1 pixel. The other scales of libjpeg (7/8, 3/4, ...) have no vector code and are slower than the
whole picture.

The rules, the same for every format and scale:

1. EXIF orientation is applied, so that boxes belong to the picture as it is looked at. `image_size` agrees with it. What Pillow
   has turned already (TIFF) is not turned again.
2. Grey becomes three equal channels, CMYK and palette colors are converted, an alpha channel is dropped. Where one channel is
   wanted, colors become grey (ITU-R 601); any other number of channels must be that of the file.
3. 16-bit values are scaled to 8 bits (the high byte is kept), never clipped, or with a ``range`` to 0..1 at full depth. Formats
   without a fixed white point (32-bit integers, floating point) are refused unless there is a range of two values.
4. The first frame of an animation is taken; grey pages of a TIFF are channels where neither one nor three are wanted.
5. A header that announces more than `MAX_PIXELS` pixels is refused before anything is decoded.
6. A file that ends early is refused: no half-grey pictures.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io
from PIL import Image
from torch import Tensor

import detpipe.datasets.planes as planes
from detpipe.datasets.planes import Planes, Refused
from detpipe.images import Size
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.types import RGB, PixelType

# of files found by looking, as Pillow knows them; a format that this Pillow was built without is an error when it is read
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif", ".avifs"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    ".npy",
)
_TURNED = (5, 6, 7, 8)  # orientations that exchange height and width
_LEAST_REDUCED = 16  # pixels: below it, two scales of libjpeg may give pictures of one size


class Reduced(NamedTuple):
    """A picture decoded at a part of its scale."""

    pixels: Tensor  # [C, ceil(H / factor), ceil(W / factor)], upright; in memory the channels come last
    size: Size  # H, W: height and width of the upright picture in its file
    factor: int  # 1, 2, 4 or 8: pixel (x, y) covers [x * factor, (x + 1) * factor) x [y * factor, ...) of the file


def read_image(path: str | Path, content: bytes | None = None, pixels: PixelType = RGB) -> Tensor:
    """Decode an image file: ``[C, H, W]``, upright (EXIF), uint8, or float32 in 0..1 where ``pixels``, what is wanted, has a range.

    ``content`` is the bytes of the file, where they lie elsewhere, such as in a shard; messages name the path all the same. A
    DataError if the file is missing, is not an image, ends early, is too large, has pixels without a fixed range, or other channels
    than are wanted.
    """
    return read_reduced(path, None, content, pixels).pixels.contiguous()


def read_reduced(
    path: str | Path, least: Size | None, content: bytes | None = None, pixels: PixelType | None = RGB
) -> Reduced:
    """Decode an image file at the smallest scale at which the upright picture has at least a height and width; None: whole.

    Only a JPEG in grey or in YCbCr has smaller scales; a picture that EXIF turns or mirrors has those that divide its sides,
    since a part of a pixel would come to lie at its left or top. ``pixels=None`` takes any channels that it has, at 8 bits. Other
    arguments and errors are those of `read_image`.
    """
    with naming(path, content, "decoded"):
        data = Path(path).read_bytes() if content is None else content
        wide = planes.read_planes(data, pixels or RGB)
        found, size, factor = (wide, wide.values.shape[:2], 1) if wide else _decode(data, least, pixels or RGB)
        height, width = size[::-1] if found.orientation in _TURNED else size
        values = planes.convert(found.values, found.alpha, pixels or PixelType(found.values.shape[2]))
        image = _upright(torch.from_numpy(values).permute(2, 0, 1), found.orientation)
        return Reduced(image, (height, width), factor)


def _decode(data: bytes, least: Size | None, pixels: PixelType) -> tuple[Planes, Size, int]:
    """What Pillow reads, a JPEG at the smallest scale that is large enough; the size as stored, and the factor of the scale."""
    with Image.open(io.BytesIO(data)) as image:
        planes.check_pixels(image.height, image.width)
        size, factor = (image.height, image.width), 1
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            factor = _factor(size, least, image.getexif().get(planes.ORIENTATION, 1)) if least else 1
            values = _decode_jpeg(data, image, factor)
            found = Planes(values[:, :, :1] if image.mode == "L" and pixels.channels != 3 else values)
        else:
            found = planes.pillow_planes(image, pixels)
            size = (image.height, image.width)  # Pillow turns a TIFF when it is loaded, and forgets its orientation
        return found._replace(orientation=image.getexif().get(planes.ORIENTATION, 1)), size, factor


def image_size(path: str | Path, content: bytes | None = None) -> Size:
    """Read height and width of the upright picture from the header, as `read_image` will give them.

    Only a PNG is read to its end, where its orientation may stand. ``content`` is the bytes of the file, if they lie elsewhere. A
    DataError names the path if the file is missing, is not an image or is too large.
    """
    with naming(path, content, "read"), open(path, "rb") if content is None else io.BytesIO(content) as stream:
        if (stored := planes.stored_size(stream)) is not None:
            height, width, orientation = stored
            planes.check_pixels(height, width)
        else:
            stream.seek(0)
            with Image.open(stream) as image:
                planes.check_pixels(image.height, image.width)  # looking for EXIF may decode a PNG
                (width, height), orientation = image.size, image.getexif().get(planes.ORIENTATION, 1)
        return (width, height) if orientation in _TURNED else (height, width)


def image_names(names: Iterable[str]) -> list[str]:
    """Choose the images among the files of a folder, in order, by the suffixes of `IMAGE_SUFFIXES`.

    An ``.npy`` beside another image of the same stem is none: a program that keeps decoded images leaves it.

    Example:
        >>> image_names(["a.JPG", "a.npy", "b.npy", "b.txt"])
        ['a.JPG', 'b.npy']
    """
    found = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    arrays = {name for name in found if name.lower().endswith(".npy")}
    if not arrays:
        return found
    others = {os.path.splitext(name)[0] for name in found if name not in arrays}
    return [name for name in found if name not in arrays or os.path.splitext(name)[0] not in others]


def image_format(content: bytes) -> str:
    """The format of an image file that `image_size` could read, as Pillow calls it: ``"JPEG"``, ``"PNG"``."""
    if planes.is_npy(content):
        return "NPY"
    if planes.is_tiff(content):
        return "TIFF"
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        return image.format or "img"


@contextmanager
def naming(path: str | Path, content: bytes | None, done: str) -> Iterator[None]:
    """Make what decoders raise a DataError that names the file, which cannot be ``done`` to; they may say nothing else."""
    if content is None:
        refuse_special(path)
    try:
        # the decoders' remarks (deprecation, odd metadata, large pictures) stay out of the output: we judge the pixels
        with warnings.catch_warnings(action="ignore"):
            yield
    except (DataError, MemoryError):
        raise
    except Refused as error:
        raise DataError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; check the image folder and the file name") from error
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on damaged files
        raise DataError(f"{path}: cannot be {done} as an image ({_reason(error)}); {planes.ADVICE}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a known image format, or empty"
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _factor(stored: Size, least: Size, orientation: int) -> int:
    """The largest factor that leaves the wanted pixels; ``stored`` is the size before EXIF is applied."""
    if min(stored) < _LEAST_REDUCED:
        return 1
    wanted = least[::-1] if orientation in _TURNED else least
    for factor in (8, 4, 2):
        enough = all(side // factor >= need for side, need in zip(stored, wanted, strict=True))
        divides = not any(side % factor for side in stored)
        if enough and (divides or orientation not in range(2, 9)):
            return factor
    return 1


@cache
def _jpeg_decoder() -> Literal["simplejpeg", "torchvision", "pillow"]:
    # torchvision 0.29 announces the removal of its decoders; Pillow gives the same pixels, only slower
    if find_spec("simplejpeg") is not None:
        return "simplejpeg"
    return "torchvision" if hasattr(torchvision.io, "decode_jpeg") else "pillow"


def _decode_jpeg(data: bytes, image: Image.Image, factor: int) -> npt.NDArray[np.uint8]:
    """[ceil(H / factor), ceil(W / factor), 3]; the bytes, and Pillow's look at them."""
    decoder = _jpeg_decoder()
    if decoder == "simplejpeg":
        import simplejpeg

        least = {"min_height": -(-image.height // factor), "min_width": -(-image.width // factor), "min_factor": 1.0}
        try:
            return simplejpeg.decode_jpeg(
                data, "RGB", fastdct=False, fastupsample=False, **(least if factor > 1 else {})
            )
        except ValueError:  # it is strict about harmless remarks of libjpeg too: the verdict is Pillow's
            decoder = "pillow"
    if decoder == "torchvision" and factor == 1:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels = cast(Tensor, torchvision.io.decode_jpeg(raw, mode=torchvision.io.ImageReadMode.RGB))
        return pixels.permute(1, 2, 0).numpy()
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return np.array(image.convert("RGB"))


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo how the camera was held (EXIF tag 274); values outside 2..8 mean upright."""
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    return pixels
