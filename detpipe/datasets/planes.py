"""Image files at the depth and with the channels that they have: 16 bits, floating point, TIFF and NPY of any number of planes.

Grey, RGB and alpha of 8 bits, and grey of 16, are read by Pillow, with every compression. RGB of 16 bits and floating point, which
Pillow cuts down to 8 bits, are read by OpenCV; TIFF of other numbers of samples a pixel, and what those two mix up, such as 16 bits
plane by plane, by tifffile (extra ``tiff``).

NPY: ``[H, W]`` or ``[H, W, C]``. Nothing is unpickled: the header is read, and the rest are numbers.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, PpmImagePlugin, TiffImagePlugin

from detpipe.types import MOST_CHANNELS, PixelType

Values = npt.NDArray[Any]  # [H, W, C] of one numeric type

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
ADVICE = "replace the file, or set on_bad to 'skip' to leave it out and count it"
ORIENTATION = 0x0112  # EXIF tag
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}  # color type -> samples a pixel
_WIDTH, _LENGTH, _BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 256, 257, 258, 262, 277, 339  # tags of a TIFF
_COMPRESSION, _PLANAR, _EXTRA = 259, 284, 338
_PLACES = ((273, 279), (324, 325))  # offsets and lengths of strips, of tiles
_XMP, _XMP_ORIENTATION = 700, re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_MIN_IS_WHITE, _IS_RGB = 0, 2  # photometric interpretations
_SEPARATE = 2  # planar configuration
_PREMULTIPLIED = 1  # extra sample: alpha, with which the colors are multiplied
_UNSIGNED, _FLOATS = 1, 3  # sample formats
_HEADER = 4096  # bytes: an NPY header of plain numbers is far shorter
_MODES = {"int32": "I", "float32": "F"}  # as Pillow calls them
_LUMINANCE = (19595, 38470, 7471)  # of R, G, B in 65536ths: ITU-R 601, as Pillow's


def without_advice(error: Exception) -> str:
    """What an error says, less what is advised for data sets: for images that belong to none."""
    return str(error).removesuffix(f"; {ADVICE}")


class Refused(Exception):
    """A file that cannot be used, without the path."""


class Planes(NamedTuple):
    """Decoded pixels, and what is still to be done."""

    values: Values  # [H, W, C]
    alpha: bool = False  # whether the last channel is how opaque a pixel is
    orientation: int = 1  # EXIF, to be applied


def is_npy(start: bytes) -> bool:
    """Whether a file that begins so is an NPY array."""
    return start.startswith(_NPY)


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return start[:4] in _TIFF


def stored_size(stream: BinaryIO) -> tuple[int, int, int] | None:
    """Height, width and EXIF orientation of a TIFF or NPY file, from its start; None for others.

    `Refused` for an NPY that is no image; for a damaged file whatever the readers raise.
    """
    start = stream.read(16)
    if is_npy(start):
        (height, width, _), _, _ = _npy_header(start + stream.read(_HEADER - len(start)))
        return height, width, 1
    return _stored_size(_tiff_tags(stream, start)) if is_tiff(start) else None


def read_planes(data: bytes, pixels: PixelType) -> Planes | None:
    """Read a file at the depth that it has, by other means than Pillow's conversion to RGB.

    None where Pillow has all that is in it. ``pixels`` decides whether pages are planes, and whether more than 8 bits are needed.
    `Refused` for an array that is no image, pages of unequal sizes, a missing library; for a damaged file whatever the readers
    raise.
    """
    if is_npy(data):
        return _npy(data)
    if is_tiff(data):
        return _tiff(data, pixels)
    # of 16 bits Pillow has the high byte, and takes grey with alpha for RGB with alpha
    deep = data.startswith(_PNG) and data[24:25] == b"\x10" and data[25:26] != b"\0"
    if deep and (pixels.range is not None or data[25:26] == b"\4"):
        samples = _PNG_SAMPLES.get(data[25], 3)
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image.height, image.width)
            image.load()  # stricter than OpenCV about a file that ends early
            return Planes(_opencv(data, samples), samples in (2, 4), image.getexif().get(ORIENTATION, 1))
    return None


def pillow_planes(image: Image.Image, pixels: PixelType) -> Planes:
    """The bands of an image that Pillow opened, uint8 but for grey of 16 bits and numbers without a white point.

    Decoding happens here, so that a file that ends early raises here. Neither one nor three channels keep the inks of CMYK, and
    how opaque a palette's colors are.
    """
    image = image.convert("LA") if image.mode == "La" else image
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values, alpha = _deep_grey(image, pixels), False
    elif mode in ("I", "F", "L", "LA", "RGB", "RGBA", "RGBX") or (mode == "CMYK" and pixels.channels not in (1, 3)):
        values, alpha = np.array(image), mode in ("LA", "RGBA", "RGBX")
    elif mode == "1":
        values, alpha = np.array(image.convert("L")), False
    elif mode in ("P", "PA") and pixels.channels not in (1, 3):
        values, alpha = np.array(image.convert("RGBA")), True
    else:
        values, alpha = np.array(image.convert("RGB")), False
    return Planes(values.reshape(*values.shape[:2], -1), alpha)


def _deep_grey(image: Image.Image, pixels: PixelType) -> Values:
    """Grey of more than 8 bits, white at 65535; where there is a range of two values, as the file counts."""
    options = image.tile[0].args if isinstance(image, PpmImagePlugin.PpmImageFile) else None
    values = np.asarray(image).astype(np.uint16)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        zero_is_white = image.tag_v2[_PHOTOMETRIC] == _MIN_IS_WHITE
        return _in_16_bits(values, image.tag_v2[_BITS][0], zero_is_white, pixels)
    if isinstance(options, tuple) and isinstance(pixels.range, tuple):  # the mode, and the white of the file
        return np.rint(values * (options[1] / 65535)).astype(np.uint16)
    return values


def _in_16_bits(values: Values, bits: int, zero_is_white: bool, pixels: PixelType) -> Values:
    """Samples of a TIFF in their usual order; of 9 to 15 bits the high ones of 16, but with a range of two values as they are."""
    if values.dtype.kind == "u" and zero_is_white:
        values = (1 << bits) - 1 - values
    narrow = 8 < bits < 16 and not isinstance(pixels.range, tuple)
    return values << (16 - bits) if narrow else values


def convert(planes: Values, alpha: bool, pixels: PixelType) -> Values:
    """Bring decoded pixels ``[H, W, c]`` to what is wanted: ``[H, W, C]``, uint8, or float32 in 0..1.

    Grey becomes three equal channels, RGB becomes grey (ITU-R 601), an alpha channel, the last, is dropped; nothing else is
    converted. `Refused` for other channels, values without a fixed white point, or a range that the file cannot fill.
    """
    count = planes.shape[2]
    if count != pixels.channels:
        colors = planes[:, :, : count - alpha]
        if pixels.channels not in (1, 3) or colors.shape[2] not in (1, 3):
            raise Refused(
                f"has {count} channels, but channels is {pixels.channels}; convert the file, or set channels to {count}"
            )
        if colors.shape[2] == pixels.channels:
            planes = np.ascontiguousarray(colors)
        else:
            planes = np.broadcast_to(colors, (*colors.shape[:2], 3)).copy() if pixels.channels == 3 else _grey(colors)
    return _scaled(planes, pixels)


def _grey(colors: Values) -> Values:
    if colors.dtype.kind not in "ui":
        return (colors @ (np.array(_LUMINANCE) / 65536))[:, :, None].astype(colors.dtype)
    # exact for 8 bits in int32, as wide as is needed for 16
    kind = np.int32 if colors.dtype == np.uint8 else np.int64
    return ((colors.astype(kind) @ np.array(_LUMINANCE, dtype=kind) + 0x8000) >> 16)[:, :, None].astype(colors.dtype)


def _scaled(values: Values, pixels: PixelType) -> Values:
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * np.uint8(255)
    kind, limits = values.dtype, pixels.range
    if limits is None and kind == np.uint8:
        return values
    if limits is None and kind == np.uint16:
        return (values >> 8).astype(np.uint8)
    if limits is None or limits == "dtype":
        if kind not in (np.uint8, np.uint16):
            raise Refused(
                f"pixel mode {_MODES.get(kind.name, kind.name)!r} has no fixed white point; convert the file to 8 or 16 bits a "
                "channel, or set range to its values of black and white"
            )
        limits = (0.0, float(np.iinfo(kind).max))
    if kind.kind not in "uif":
        raise Refused(f"pixels of {kind} are no numbers of an image; expected whole or floating point ones")
    if kind.kind in "ui" and limits[1] > np.iinfo(kind).max:
        raise Refused(
            f"pixels of {kind} end at {np.iinfo(kind).max}, but range is [{limits[0]:g}, {limits[1]:g}]; convert the file, or "
            "set range to 'dtype'"
        )
    scaled = (values.astype(np.float64 if kind.itemsize > 2 else np.float32) - limits[0]) / (limits[1] - limits[0])
    if np.isnan(scaled).any():
        raise Refused("has pixels that are not a number (NaN); fill them")
    return scaled.clip(0, 1).astype(np.float32)


def _npy_header(start: bytes) -> tuple[tuple[int, int, int], np.dtype[Any], int]:
    """H, W, C, the type, and where the numbers begin."""
    stream, formats = io.BytesIO(start), np.lib.format
    old = formats.read_magic(stream) == (1, 0)
    shape, fortran, dtype = (formats.read_array_header_1_0 if old else formats.read_array_header_2_0)(stream)
    if dtype.hasobject or dtype.kind not in "buif":
        raise Refused(f"is an array of {dtype}; expected whole or floating point numbers")
    if fortran and len(shape) > 1:
        raise Refused("is stored column by column; save it after numpy.ascontiguousarray")
    if len(shape) not in (2, 3) or min(shape) < 1 or (len(shape) == 3 and shape[2] > MOST_CHANNELS):
        raise Refused(f"is an array of shape {list(shape)}; expected [H, W] or [H, W, C], C up to {MOST_CHANNELS}")
    height, width, channels = (*shape, 1)[:3]
    return (height, width, channels), dtype, stream.tell()


def _npy(data: bytes) -> Planes:
    shape, dtype, offset = _npy_header(data[:_HEADER])
    check_pixels(*shape)
    count = shape[0] * shape[1] * shape[2]
    if len(data) - offset < count * dtype.itemsize:
        raise Refused(f"ends early: {len(data) - offset} bytes of {count * dtype.itemsize}")
    values = np.frombuffer(data, dtype, count, offset).reshape(shape)
    return Planes(values.astype(dtype.newbyteorder("=")))


def check_pixels(height: int, width: int, channels: int = 1) -> None:
    """Refuse, before anything is decoded, more than `MAX_PIXELS` pixels, or more than eight times as many values."""
    if width * height > MAX_PIXELS:
        raise Refused(
            f"the header announces {width} x {height} = {width * height} pixels, more than the limit of {MAX_PIXELS}; {ADVICE}"
        )
    if width * height * channels > 8 * MAX_PIXELS:
        raise Refused(
            f"the header announces {width} x {height} x {channels} = {width * height * channels} values, more than the limit of "
            f"{8 * MAX_PIXELS}; {ADVICE}"
        )


def _tiff_tags(stream: BinaryIO, start: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The first directory of a TIFF, also of one that Pillow has no mode for."""
    big = start[2] in b"+" or start[3] in b"+"
    tags = TiffImagePlugin.ImageFileDirectory_v2(start if big else start[:8])
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _stored_size(tags: Any) -> tuple[int, int, int]:
    """Height and width as stored, and EXIF orientation, of the first directory of a TIFF."""
    orientation = tags.get(ORIENTATION)
    if orientation is None and (found := _XMP_ORIENTATION.search(bytes(tags.get(_XMP, b"")))):
        orientation = int(found[1])  # where Pillow looks too
    return int(tags[_LENGTH]), int(tags[_WIDTH]), orientation if isinstance(orientation, int) else 1


def _tiff(data: bytes, pixels: PixelType) -> Planes | None:
    tags: Any = _tiff_tags(io.BytesIO(data), data[:16])
    samples, photometric = int(tags.get(_SAMPLES, 1)), tags.get(_PHOTOMETRIC)
    bits, formats = int(np.max(tags.get(_BITS, 1))), np.ravel(tags.get(_FORMAT, _UNSIGNED))
    floats, color = _FLOATS in formats, photometric == _IS_RGB
    height, width, orientation = _stored_size(tags)
    check_pixels(height, width, samples)
    separate = samples > 1 and tags.get(_PLANAR) == _SEPARATE
    premultiplied = _PREMULTIPLIED in tags.get(_EXTRA, ())
    # libtiff has brought the bytes of a number into the order of the machine, and Pillow does it again
    swapped = data[:1] == b"M" and tags.get(_COMPRESSION, 1) != 1 and bits > 8 and (formats != _UNSIGNED).any()
    # of planes Pillow reads RGB of 8 bits; of 16 bits it divides the high bytes by that of alpha
    mixed_up = separate and (samples not in (3, 4) or premultiplied)
    mixed_up |= bits > 8 and (separate or premultiplied)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if samples == 1 and pixels.channels not in (1, 3):
                return _pages(image, pixels)
            # of several samples of more than 8 bits Pillow has the high byte, or the first sample
            deep = bits > (8 if samples > 1 else 32 if floats else 16)
            whole = samples == len(image.getbands()) and not deep
            shown = _shows_colors(samples, color, pixels)
            if not (swapped or mixed_up) and (whole or (shown and not (deep and pixels.range))):
                return None
    except Image.UnidentifiedImageError:
        pass
    ends = (a + b for places in _PLACES for a, b in zip(*(tags.get(tag, ()) for tag in places), strict=False))
    if (end := max(ends, default=0)) > len(data):
        raise Refused(f"ends early: {len(data)} bytes of {end}")
    if color and samples in (3, 4) and bits > 8 and not separate and not (floats and bits == 16):
        values = _opencv(data, samples)  # turned, and of 9 to 15 bits the high ones of 16
        exact, orientation = bits < 16 and isinstance(pixels.range, tuple), 1
        values = values >> (16 - bits) if exact else values
    else:
        values = _in_16_bits(_tifffile(data), bits, photometric == _MIN_IS_WHITE, pixels)
    return Planes(wanted_samples(values, color, premultiplied, pixels), False, orientation)


def wanted_samples(values: Values, color: bool, premultiplied: bool, pixels: PixelType) -> Values:
    """Of the samples ``[H, W, S]`` of a TIFF those that are wanted, where alpha is the last of two or four.

    Colors that are multiplied with alpha are divided by it; where one or three channels are wanted, what is no color is left out.
    """
    if premultiplied and values.shape[2] in (2, 4):
        whole = values.dtype.kind in "ui"
        white, alpha = np.iinfo(values.dtype).max if whole else 1, values[:, :, -1:]
        colors = values[:, :, :-1].astype(np.float64) * white / np.where(alpha > 0, alpha, white)
        values = np.concatenate([(colors.clip(0, white) if whole else colors).astype(values.dtype), alpha], axis=2)
    return values[:, :, : 3 if color else 1] if _shows_colors(values.shape[2], color, pixels) else values


def _shows_colors(samples: int, color: bool, pixels: PixelType) -> bool:
    """Whether what was not said to be a color is left out, as in any program that shows pictures."""
    return pixels.channels in (1, 3) and (color or samples == 2)


def _pages(image: Image.Image, pixels: PixelType) -> Planes:
    """Grey pages as planes, each turned by Pillow as its tag says."""
    found, count = getattr(image, "n_frames", 1), pixels.channels
    if found != count:
        raise Refused(f"has {found} channels (pages), but channels is {count}; convert the file, or set channels")
    planes = []
    for page in range(count):
        image.seek(page)
        check_pixels(image.height, image.width)
        image.load()
        planes.append(pillow_planes(image, replace(pixels, channels=1)).values)
    if len({(plane.shape, plane.dtype) for plane in planes}) > 1 or planes[0].shape[2] > 1:
        kinds = sorted({f"{plane.shape[1]} x {plane.shape[0]} x {plane.shape[2]} {plane.dtype}" for plane in planes})
        raise Refused(f"its {count} pages cannot be channels: expected grey ones of one size, got {', '.join(kinds)}")
    return Planes(np.concatenate(planes, axis=2))


def _opencv(data: bytes, samples: int) -> Values:
    """PNG and TIFF of 16 bits and floating point: ``[H, W, samples]``, RGB."""
    import cv2

    logging: Any = cv2.utils.logging
    before = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # it remarks on odd tags
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    finally:
        logging.setLogLevel(before)
    if found is None:
        raise Refused("is damaged, or ends early")
    values = np.asarray(found)
    values = values.reshape(*values.shape[:2], -1)
    if values.shape[2] == 4 and samples == 2:  # grey and alpha
        return values[:, :, [0, 3]]
    if (values.shape[2], samples) != (4, 3) and values.shape[2] != samples:  # a color of a PNG may be transparent
        raise Refused(f"has {samples} channels, of which OpenCV reads {values.shape[2]}; convert the file")
    return values[:, :, [2, 1, 0, 3][:samples]]


def _tifffile(data: bytes) -> Values:
    """TIFF of any number of samples: the first page, ``[H, W, C]``."""
    try:
        import tifffile
    except ImportError as error:
        raise Refused("TIFF of these channels needs tifffile: pip install 'detpipe[tiff]'") from error
    with warnings.catch_warnings(action="ignore"), tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        if not all(page.databytecounts):
            raise Refused("ends early: it lacks rows")
        if page.axes not in ("YX", "YXS", "SYX") or max(page.shape) < 1:
            raise Refused(f"has axes {page.axes}; expected rows, columns and samples")
        if page.samplesperpixel > MOST_CHANNELS:
            raise Refused(f"has {page.samplesperpixel} channels; at most {MOST_CHANNELS} are read")
        try:
            values = page.asarray()
        except (ValueError, NotImplementedError) as error:
            if "imagecodecs" not in str(error):
                raise
            raise Refused(f"{error}: pip install imagecodecs") from error
    values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
    return np.ascontiguousarray(values.reshape(*values.shape[:2], -1))
