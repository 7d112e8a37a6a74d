"""Image files to 3 x 8-bit RGB by one written rule, whichever library decodes them.

JPEGs are decoded by torchvision (twice as fast as Pillow at 640 x 480, pixels identical); everything else by Pillow.

The rules, the same for every format:

1. EXIF orientation is applied, so that boxes belong to the picture as it is looked at. `image_size` agrees with it.
2. Grey becomes three equal channels, CMYK and palette colors are converted, an alpha channel is dropped.
3. 16-bit values are scaled to 8 bits (the high byte is kept), never clipped. Formats without a fixed white point
   (32-bit integers, floating point) are refused.
4. The first frame of an animation is taken.
5. A header that announces more than `MAX_PIXELS` pixels is refused before anything is decoded.
6. A file that ends early is refused: no half-grey pictures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io
from PIL import Image
from torch import Tensor

from detpipe.errors import DataError

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
)  # of files found by looking
_ORIENTATION = 0x0112  # EXIF tag
_ADVICE = "replace the file, or set on_bad to 'skip' to leave it out and count it"


def read_image(path: str | Path, content: bytes | None = None) -> Tensor:
    """Decode an image file.

    Args:
        path: a JPEG, PNG, or any other format that Pillow reads.
        content: the bytes of the file, where they lie elsewhere, such as in a shard; messages name the path all the same.

    Returns:
        ``[3, H, W]`` uint8 RGB, upright (EXIF orientation applied).

    Raises:
        DataError: if the file is missing, is not an image, ends early, is too large, or has pixels without a fixed
            range; the message names the path.
    """
    try:
        data = Path(path).read_bytes() if content is None else content
        with _quiet(), Image.open(io.BytesIO(data)) as image:
            _check_pixels(image, path)
            orientation = image.getexif().get(_ORIENTATION, 1)
            fast = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _has_torchvision_jpeg()
            pixels = _decode_jpeg(data) if fast else torch.from_numpy(_to_rgb(image, path)).permute(2, 0, 1)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; check the image folder and the file name") from error
    except Exception as error:  # decoders raise anything from struct.error to SyntaxError on damaged files
        raise DataError(f"{path}: cannot be decoded as an image ({_reason(error)}); {_ADVICE}") from error
    return _upright(pixels, orientation).contiguous()


def image_size(path: str | Path, content: bytes | None = None) -> tuple[int, int]:
    """Read height and width of the upright picture from the header.

    Only a PNG is read to its end, where its orientation may stand.

    Args:
        path: an image file.
        content: its bytes, as for `read_image`.

    Returns:
        Height and width in pixels after the EXIF orientation, as `read_image` will give them.

    Raises:
        DataError: if the file is missing, is not an image or is too large; the message names the path.
    """
    try:
        with _quiet(), Image.open(path if content is None else io.BytesIO(content)) as image:
            _check_pixels(image, path)
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else (height, width)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; check the image folder and the file name") from error
    except Exception as error:  # as above
        raise DataError(f"{path}: cannot be read as an image ({_reason(error)}); {_ADVICE}") from error


def image_format(content: bytes) -> str:
    """The format of an image file, as Pillow calls it: ``"JPEG"``, ``"PNG"``.

    Args:
        content: of a file that `image_size` could read.
    """
    with _quiet(), Image.open(io.BytesIO(content)) as image:
        return image.format or "img"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the decoders' remarks (deprecation, odd metadata, large pictures) out of the output: we judge the pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_pixels(image: Image.Image, path: str | Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: the header announces {width} x {height} = {width * height} pixels, more than the limit of "
            f"{MAX_PIXELS}; {_ADVICE}"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a known image format, or empty"
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _has_torchvision_jpeg() -> bool:
    # torchvision 0.29 announces the removal of its decoders; without them Pillow gives the same pixels, only slower
    return hasattr(torchvision.io, "decode_jpeg")


def _decode_jpeg(data: bytes) -> Tensor:
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return cast(Tensor, torchvision.io.decode_jpeg(raw, mode=torchvision.io.ImageReadMode.RGB))


def _to_rgb(image: Image.Image, path: str | Path) -> npt.NDArray[np.uint8]:
    """[H, W, 3]; decoding happens here, so that a file that ends early raises here."""
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if sixteen_bit:
        grey = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DataError(
            f"{path}: pixel mode {image.mode!r} has no fixed white point; convert the file to 8 or 16 bits a channel"
        )
    return np.array(image.convert("RGB"))


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo how the camera was held (EXIF tag 274); values outside 2..8 mean upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels.flip(2)
    return pixels
