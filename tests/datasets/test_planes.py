"""Channels and depth of image files: what is read as it is, what is converted, what is refused by name."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detpipe.datasets.decode import image_format, image_size, read_image, read_reduced
from detpipe.support.errors import DataError
from detpipe.types import PixelFormat, PixelType

from .builders import picture, png

tifffile = pytest.importorskip("tifffile")

SIZE = (20, 30)
FULL = PixelType(3, "dtype")


def numbers(channels: int, dtype: type = np.uint16, most: int = 65535) -> np.ndarray:
    """[H, W, channels] of many values."""
    values = np.random.default_rng(channels).integers(0, most + 1, (*SIZE, channels))
    values[0, 0], values[0, 1] = 0, most
    return values.astype(dtype)


def as_npy(array: np.ndarray, path: Path, **_: object) -> None:
    np.save(path, array)


def as_tiff(array: np.ndarray, path: Path, **options: object) -> None:
    planar = options.get("planarconfig") == "separate"
    tifffile.imwrite(path, np.moveaxis(array, 2, 0) if planar else array, **options)


def as_pages(array: np.ndarray, path: Path) -> None:
    first, *more = (Image.fromarray(array[:, :, k]) for k in range(array.shape[2]))
    first.save(path, save_all=True, append_images=more)


def as_opencv(array: np.ndarray, path: Path, *options: int) -> None:
    order = [2, 1, 0, 3][: array.shape[2]] if array.shape[2] > 1 else [0]
    assert cv2.imwrite(str(path), array[:, :, order], list(options))


def as_png(array: np.ndarray, path: Path, more: bytes = b"") -> None:
    """16 bits a sample, of 1 to 4 channels."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(png(SIZE, 16, (0, 4, 2, 6)[array.shape[2] - 1], rows, more))


CONTIG = {"photometric": "minisblack", "planarconfig": "contig"}
SEPARATE = {"photometric": "minisblack", "planarconfig": "separate"}
RGB_PLANES = {"photometric": "rgb", "planarconfig": "separate"}
WITH_ALPHA = {"extrasamples": ["unassalpha"]}
ZIP = {"compression": "zlib"}
# name of the file, channels, type, how it is written
DEEP: dict[str, tuple[int, type, Callable[[np.ndarray, Path], None]]] = {
    "grey.npy": (1, np.uint16, as_npy),
    "two.npy": (2, np.uint16, as_npy),
    "nine.npy": (9, np.uint16, as_npy),
    "bytes.npy": (4, np.uint8, as_npy),
    "grey.png": (1, np.uint16, as_opencv),
    "rgb.png": (3, np.uint16, as_opencv),
    "rgba.png": (4, np.uint16, as_opencv),
    "grey.tif": (1, np.uint16, as_opencv),
    "rgb.tif": (3, np.uint16, as_opencv),
    "lzw.tif": (3, np.uint16, lambda a, p: as_opencv(a, p, cv2.IMWRITE_TIFF_COMPRESSION, 5)),
    "rgba.tif": (4, np.uint16, as_opencv),
    "two.tif": (2, np.uint16, lambda a, p: as_tiff(a, p, **CONTIG)),
    "five.tif": (5, np.uint16, lambda a, p: as_tiff(a, p, **CONTIG)),
    "bytes.tif": (8, np.uint8, lambda a, p: as_tiff(a, p, **CONTIG)),
    "planar.tif": (4, np.uint16, lambda a, p: as_tiff(a, p, **SEPARATE)),
    "zip.tif": (6, np.uint16, lambda a, p: as_tiff(a, p, **SEPARATE, compression="zlib")),
    "tiles.tif": (4, np.uint16, lambda a, p: as_tiff(a, p, **CONTIG, tile=(16, 16))),
    "big.tif": (5, np.uint16, lambda a, p: as_tiff(a, p, **CONTIG, bigtiff=True)),
    "pages.tif": (4, np.uint8, as_pages),
    "deep_pages.tif": (5, np.uint16, as_pages),
    "rgb_planes.tif": (3, np.uint16, lambda a, p: as_tiff(a, p, **RGB_PLANES)),
    "rgb_planes_zip.tif": (
        3,
        np.uint16,
        lambda a, p: as_tiff(a, p, **RGB_PLANES, **ZIP, byteorder=">", predictor=True),
    ),
    "rgb_planes_tiles.tif": (3, np.uint16, lambda a, p: as_tiff(a, p, **RGB_PLANES, tile=(16, 16))),
    "rgba_planes.tif": (4, np.uint16, lambda a, p: as_tiff(a, p, **RGB_PLANES, **WITH_ALPHA)),
    "rgb8_planes.tif": (3, np.uint8, lambda a, p: as_tiff(a, p, **RGB_PLANES, **ZIP)),
    "rgba8_planes.tif": (4, np.uint8, lambda a, p: as_tiff(a, p, **RGB_PLANES, **WITH_ALPHA)),
    "la8_planes.tif": (2, np.uint8, lambda a, p: as_tiff(a, p, **SEPARATE, **WITH_ALPHA)),
    "la8_planes_zip.tif": (2, np.uint8, lambda a, p: as_tiff(a, p, **SEPARATE, **WITH_ALPHA, **ZIP)),
    "zero_is_white.tif": (1, np.uint16, lambda a, p: as_tiff(65535 - a, p, photometric="miniswhite")),
    "zero_is_white_big_endian.tif": (
        1,
        np.uint16,
        lambda a, p: as_tiff(65535 - a, p, photometric="miniswhite", byteorder=">"),
    ),
    "la.png": (2, np.uint16, as_png),
    "transparent.png": (3, np.uint16, lambda a, p: as_png(a, p, b"tRNS" + a[0, 0].astype(">u2").tobytes())),
    "grey.pgm": (1, np.uint16, as_opencv),
    "rgba8.tif": (4, np.uint8, lambda a, p: Image.fromarray(a).save(p)),
    "rgba8.png": (4, np.uint8, lambda a, p: Image.fromarray(a).save(p)),
    "cmyk8.tif": (4, np.uint8, lambda a, p: _banded("CMYK", a, p)),
    "la8.png": (2, np.uint8, lambda a, p: _banded("LA", a, p)),
}


def _banded(mode: str, array: np.ndarray, path: Path) -> None:
    Image.frombytes(mode, SIZE[::-1], array.tobytes()).save(path)


@pytest.mark.parametrize("name", DEEP)
def test_every_channel_is_read_at_full_depth(tmp_path: Path, name: str) -> None:
    count, dtype, write = DEEP[name]
    most = int(np.iinfo(dtype).max)
    array, path = numbers(count, dtype, most), tmp_path / name
    write(array, path)
    expected = torch.from_numpy((array / np.float32(most)).astype(np.float32)).permute(2, 0, 1)
    for limits in ("dtype", (0, most)):
        image = read_image(path, pixels=PixelType(count, limits))
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    # without a range 8 bits: the high byte
    eight = torch.from_numpy((array >> 8 if most > 255 else array).astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(read_image(path, pixels=PixelType(count)), eight)
    assert torch.equal(read_image(path, path.read_bytes(), PixelType(count)), eight)
    assert image_size(path) == image_size(path, path.read_bytes()) == read_reduced(path, None, pixels=None).size == SIZE
    reduced = read_reduced(path, (5, 5), pixels=PixelType(count))
    assert (reduced.size, reduced.factor) == (SIZE, 1)
    assert image_format(path.read_bytes()) == {".npy": "NPY", ".tif": "TIFF", ".png": "PNG", ".pgm": "PPM"}[path.suffix]
    if count not in (1, 3):
        with pytest.raises(DataError, match=rf"{name}: has {count} channels.*, but channels is {count + 3}"):
            read_image(path, pixels=PixelType(count + 3))


def test_a_range_is_stretched_and_clipped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0, 1000, 2000, 3000, 9000]], dtype=np.uint16))
    image = read_image(tmp_path / "x.npy", pixels=PixelType(1, (1000, 3000)))
    assert image.tolist() == [[[0, 0, 0.5, 1, 1]]]
    for dtype in (np.int32, np.int64, np.float32, np.float64, np.uint32, np.int16):
        values = np.array([[-5, 0, 50, 100]])
        np.save(tmp_path / "y.npy", values.astype(dtype))
        expected = [0, 0, 0.5, 1] if np.dtype(dtype).kind != "u" else [1, 0, 0.5, 1]  # -5 is a large number there
        assert read_image(tmp_path / "y.npy", pixels=PixelType(1, (0, 100)))[0, 0].tolist() == expected, dtype
        tifffile.imwrite(tmp_path / "y.tif", values.astype(dtype))
        assert read_image(tmp_path / "y.tif", pixels=PixelType(1, (0, 100)))[0, 0].tolist() == expected, dtype
        for limits in (None, "dtype"):
            for name in ("y.npy", "y.tif"):
                with pytest.raises(
                    DataError, match=rf"{name}: pixel mode .* no fixed white point; convert .* or set range"
                ):
                    read_image(tmp_path / name, pixels=PixelType(1, limits))


def test_grey_and_rgb_are_converted_and_nothing_else(tmp_path: Path) -> None:
    image = picture(20, 30)
    for name in ("x.png", "x.jpg", "x.tif", "x.bmp"):
        image.save(tmp_path / name)
        with Image.open(tmp_path / name) as stored:
            expected = np.asarray(stored.convert("L"))
        np.testing.assert_array_equal(
            read_image(tmp_path / name, pixels=PixelType(1))[0].numpy(), expected, err_msg=name
        )
    np.save(tmp_path / "x.npy", np.asarray(image))
    assert torch.equal(read_image(tmp_path / "x.npy"), read_image(tmp_path / "x.png"))
    np.save(tmp_path / "grey.npy", np.asarray(image.convert("L")))
    assert torch.equal(read_image(tmp_path / "grey.npy")[2], torch.from_numpy(np.array(image.convert("L"))))
    deep = numbers(3)
    np.save(tmp_path / "deep.npy", deep)
    grey = read_image(tmp_path / "deep.npy", pixels=PixelType(1, "dtype"))[0].numpy()
    np.testing.assert_allclose(grey, deep @ [0.299, 0.587, 0.114] / 65535, atol=2e-5)
    np.save(tmp_path / "four.npy", numbers(4, np.uint8, 255))
    as_tiff(numbers(4), tmp_path / "planes.tif", **SEPARATE)  # is not cut to its first plane
    four = [(name, channels, 4) for name in ("four.npy", "planes.tif") for channels in (1, 3)]
    for name, channels, count in (("x.jpg", 4, 3), ("x.png", 2, 3), *four):
        with pytest.raises(DataError, match=rf"{name}: has {count} channels.*, but channels is {channels}; convert"):
            read_image(tmp_path / name, pixels=PixelType(channels))


def test_a_range_that_a_file_cannot_fill_is_refused(tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: pixels of uint8 end at 255, but range is \[0, 65535\]; .* 'dtype'"):
        read_image(tmp_path / "x.jpg", pixels=PixelType(3, (0, 65535)))
    np.save(tmp_path / "x.npy", np.full((2, 3), np.nan))
    with pytest.raises(DataError, match=r"x\.npy: has pixels that are not a number"):
        read_image(tmp_path / "x.npy", pixels=PixelType(1, (0, 1)))


def test_a_jpeg_of_one_channel_or_in_floating_point_is_decoded_at_a_part_of_its_scale(tmp_path: Path) -> None:
    picture(64, 96).save(tmp_path / "x.jpg")
    whole = read_reduced(tmp_path / "x.jpg", (16, 24))
    grey = read_reduced(tmp_path / "x.jpg", (16, 24), pixels=PixelType(1))
    assert (grey.factor, grey.size, grey.pixels.shape) == (4, (64, 96), (1, 16, 24))
    deep = read_reduced(tmp_path / "x.jpg", (16, 24), pixels=FULL)
    torch.testing.assert_close(deep.pixels, whole.pixels / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("channels", "options"), [(5, CONTIG), (3, {"photometric": "rgb"}), (4, {"photometric": "rgb"}), (3, RGB_PLANES)]
)
def test_planes_are_turned_too(tmp_path: Path, channels: int, options: dict[str, str], orientation: int) -> None:
    path, array = tmp_path / "x.tif", numbers(channels)
    as_tiff(array, path, **options, extratags=[(274, "H", 1, orientation, False)])
    turned = array.swapaxes(0, 1) if orientation >= 5 else array
    turned = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    image = read_image(path, pixels=PixelType(channels, "dtype"))
    torch.testing.assert_close(image, torch.from_numpy((turned / 65535).astype(np.float32)).permute(2, 0, 1))
    assert image_size(path) == read_reduced(path, None, pixels=None).size == turned.shape[:2]


@pytest.mark.parametrize("options", [{"photometric": "minisblack"}, {"photometric": "rgb"}, RGB_PLANES])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int32])
@pytest.mark.parametrize("more", [{}, {"byteorder": ">"}, {"byteorder": ">", **ZIP}])
def test_other_numbers_are_read_wherever_they_stand(
    tmp_path: Path, options: dict[str, str], dtype: type, more: dict[str, str]
) -> None:
    array = (numbers(1 if options["photometric"] == "minisblack" else 3, np.int32, 32000) / 16).astype(dtype)
    as_tiff(array, tmp_path / "x.tif", **options, **more)
    image = read_image(tmp_path / "x.tif", pixels=PixelType(array.shape[2], (0, 2000)))
    expected = torch.from_numpy((array.astype(np.float64) / 2000).astype(np.float32))
    torch.testing.assert_close(image.permute(1, 2, 0), expected)


def twelve_bits(array: np.ndarray) -> bytes:
    """A TIFF of packed numbers of 12 bits."""
    bits = np.unpackbits(array.astype(">u2").view(np.uint8).reshape(*array.shape, 2), axis=-1)[..., 4:]
    rows = np.packbits(bits.reshape(SIZE[0], -1), axis=1).tobytes()
    C = array.shape[2]
    tags = {
        256: SIZE[1],
        257: SIZE[0],
        258: 12,
        259: 1,
        262: 1 if C == 1 else 2,
        273: 8,
        277: C,
        278: SIZE[0],
        279: len(rows),
    }
    end = 8 + len(rows)
    fields = {tag: (1, value) for tag, value in tags.items()}
    fields[258] = (C, 12) if C == 1 else (C, end + 2 + 12 * len(tags) + 4)
    directory = b"".join(struct.pack("<HHII", tag, 3, *field) for tag, field in fields.items())
    return b"".join([
        b"II*\0", struct.pack("<I", end), rows, struct.pack("<H", len(tags)), directory, bytes(4), struct.pack("<3H", 12, 12, 12)
    ])  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_white_of_twelve_bits_is_white(channels: int) -> None:
    array = numbers(channels, np.uint16, 4095)
    files = {"x.tif": twelve_bits(array)}
    if channels == 1:
        files["x.pgm"] = b"P5 30 20 4095\n" + array.astype(">u2").tobytes()
    for name, content in files.items():
        image = read_image(name, content, PixelType(channels))
        assert (image.permute(1, 2, 0).numpy() == array >> 4).all(), name
        for limits in ("dtype", (0, 4095)):
            image = read_image(name, content, PixelType(channels, limits)).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(image, array / 4095, atol=3e-4, err_msg=name)


@pytest.mark.parametrize("options", [CONTIG, SEPARATE, {"photometric": "rgb"}, RGB_PLANES])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_colors_that_are_multiplied_with_alpha_are_divided_by_it(options: dict[str, str], dtype: type) -> None:
    count = 4 if options["photometric"] == "rgb" else 2
    most = 1 if dtype is np.float32 else int(np.iinfo(dtype).max)
    array, stream = numbers(count, np.uint8, 255) / 255, io.BytesIO()
    array[:, :, -1] = array[:, :, -1].clip(0.3, 1)
    stored = np.concatenate([array[:, :, :-1] * array[:, :, -1:], array[:, :, -1:]], axis=2) * most
    stored = (stored if most == 1 else stored.round()).astype(dtype)
    planes = np.moveaxis(stored, 2, 0) if "separate" in options.values() else stored
    tifffile.imwrite(stream, planes, **options, extrasamples=["assocalpha"])
    for channels in (count, count - 1):
        image = read_image("x.tif", stream.getvalue(), PixelType(channels, (0, most))).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(image, array[:, :, :channels], atol=0.02 if dtype is np.uint8 else 1e-4)


HEADER = "{{'descr': '{}', 'fortran_order': {}, 'shape': {}, }}"


def npy(descr: str, shape: tuple[int, ...], content: bytes = b"", fortran: bool = False) -> bytes:
    text = HEADER.format(descr, fortran, shape).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + content


FAULTS = {
    "objects": (npy("|O", (2, 2), b"\x80\x04]."), "is an array of object"),
    "complex": (npy("<c8", (2, 2), bytes(32)), "is an array of complex64"),
    "flat": (npy("|u1", (4,), bytes(4)), r"is an array of shape \[4\]; expected \[H, W\]"),
    "volume": (npy("|u1", (2, 2, 2, 2), bytes(16)), r"is an array of shape \[2, 2, 2, 2\]"),
    "first": (
        npy("|u1", (3, 300, 400), bytes(360000)),
        r"is an array of shape \[3, 300, 400\]; expected .* C up to 256",
    ),
    "empty": (npy("|u1", (0, 4)), r"is an array of shape \[0, 4\]"),
    "bomb": (npy("|u1", (20_000, 20_000), bytes(10)), "400000000 pixels, more than the limit"),
    "deep": (npy("|u1", (10_000, 10_000, 100)), "10000 x 10000 x 100 = 10000000000 values, more than the limit"),
    "cut": (npy("<u2", (4, 4), bytes(31)), "ends early: 31 bytes of 32"),
    "columns": (npy("|u1", (4, 4), bytes(16), True), "stored column by column"),
    "text": (b"\x93NUMPY\x01\x00" + b"what", "cannot be .* as an image"),
    "code": (npy("|u1'+exit()+'", (2, 2), bytes(4)), "cannot be .* as an image"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_arrays_that_are_no_images_are_refused_unpickled(tmp_path: Path, case: str) -> None:
    content, message = FAULTS[case]
    path = tmp_path / f"{case}.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{case}\.npy: .*{message}"):
        read_image(path)
    if case not in ("cut", "deep"):
        with pytest.raises(DataError, match=rf"{case}\.npy: .*{message}"):
            image_size(path)


@pytest.mark.parametrize("name", ["rgb.png", "rgb.tif", "lzw.tif", "five.tif", "zip.tif", "deep_pages.tif", "nine.npy"])
def test_a_deep_file_that_ends_early_or_whose_values_are_damaged_is_refused(tmp_path: Path, name: str) -> None:
    count, dtype, write = DEEP[name]
    write(numbers(count, dtype), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for part in (0.1, 0.5, 0.95):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name, data[: int(len(data) * part)], PixelType(count, "dtype"))
    if name in ("rgb.tif", "lzw.tif"):
        damaged = data[:60] + bytes(value ^ 0x5A for value in data[60:-400]) + data[-400:]
        with pytest.raises(DataError, match=rf"{name}: is damaged, or ends early"):
            read_image(tmp_path / name, damaged, PixelType(count, "dtype"))


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tiff(numbers(5), tmp_path / "x.tif", **CONTIG)
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DataError, match=r"x\.tif: .*pip install 'detpipe\[tiff\]'"):
        read_image(tmp_path / "x.tif", pixels=PixelType(5))
    assert image_size(tmp_path / "x.tif") == SIZE


def test_formats_are_spread_over_other_channels() -> None:
    assert PixelFormat().spread(1).mean == (pytest.approx(0.449),)
    assert PixelFormat().spread(5).std == (0.229, 0.224, 0.225, 0.229, 0.224)
