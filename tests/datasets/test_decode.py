import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detpipe.datasets import decode
from detpipe.datasets.decode import image_size, read_image, read_reduced
from detpipe.support.errors import DataError

from .builders import picture

DECODERS = ("simplejpeg", "torchvision", "pillow")


def by_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def png_header(path: Path, width: int, height: int) -> Path:
    """A file of 1 KB that announces any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(start + struct.pack(">I", 1000) + b"IDAT" + bytes(1000))
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoder", DECODERS)
def test_exif_orientation_is_applied_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, suffix: str, decoder: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(24, 40).save(path, exif=exif)
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: decoder)
    image = read_image(path)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), by_pillow(path))
    assert image_size(path) == tuple(image.shape[1:])
    assert (image.shape[1] > image.shape[2]) == (orientation >= 5)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("rgb.jpg", "RGB"), ("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("grey.png", "L"), ("palette.png", "P"),
     ("bits.png", "1"), ("alpha.png", "RGBA"), ("grey_alpha.png", "LA"), ("rgb.png", "RGB"), ("rgb.bmp", "RGB"),
     ("frames.gif", "P"), ("rgb.webp", "RGB"), ("rgb.tif", "RGB")],
)  # fmt: skip
def test_every_kind_becomes_8_bit_rgb(tmp_path: Path, name: str, mode: str) -> None:
    path = tmp_path / name
    picture(20, 30).convert(mode).save(path)
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), by_pillow(path))
    assert image_size(path) == (20, 30)


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[:, 0].tolist() == [[0, 0, 1, 128, 255]] * 3


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_point_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((3, 4), dtype=dtype)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: pixel mode .* no fixed white point"):
        read_image(tmp_path / "x.tif")


def encoded(suffix: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(out, suffix)
    return out.getvalue()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", ["jpeg", "png"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_ends_early_is_an_error_never_grey_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, part: float, decoder: str
) -> None:
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: decoder)
    data = encoded(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DataError, match=rf"cut\.{suffix}: cannot be decoded"):
        read_image(path)


def test_text_and_missing_files_are_errors_that_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"text\.jpg: cannot be .* as an image"):
            read(tmp_path / "text.jpg")
        with pytest.raises(DataError, match=r"gone\.jpg: no such image file"):
            read(tmp_path / "gone.jpg")


@pytest.mark.parametrize("pillow_guards", [True, False])
def test_a_400_megapixel_header_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_guards: bool
) -> None:
    if not pillow_guards:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = png_header(tmp_path / "bomb.png", 20_000, 20_000)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"bomb\.png: .*400000000 pixels.*limit"):
            read(path)


def test_a_picture_that_pillow_only_warns_of_raises_no_warning(tmp_path: Path) -> None:
    data = encoded("jpeg")
    frame = data.index(b"\xff\xc0") + 5
    (tmp_path / "large.jpg").write_bytes(data[:frame] + struct.pack(">HH", 11_000, 12_000) + data[frame + 4 :])
    assert image_size(tmp_path / "large.jpg") == (11_000, 12_000)


def test_errors_survive_pickling(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_image(tmp_path / "gone.jpg")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is DataError
    assert "gone.jpg" in str(copy)


def test_real_photographs_equal_pillow(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco_mini" / "val2017").iterdir())[:5]:
        np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), by_pillow(path))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(64, 96), (61, 93), (200, 333)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_every_decoder_gives_the_same_part_of_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int], factor: int
) -> None:
    path = tmp_path / "x.jpg"
    picture(*size, seed=3).convert(mode).save(path, quality=90)
    least = (size[0] // factor, size[1] // factor)
    found = []
    for decoder in DECODERS:
        monkeypatch.setattr(decode, "_jpeg_decoder", lambda decoder=decoder: decoder)
        found.append(read_reduced(path, least))
        assert (found[-1].factor, found[-1].size) == (factor, size)
        assert found[-1].pixels.shape == (3, -(-size[0] // factor), -(-size[1] // factor))
        assert torch.equal(found[-1].pixels, found[0].pixels)
        assert torch.equal(read_image(path), read_reduced(path, size).pixels)
        assert read_reduced(path, (least[0] + 1, least[1])).factor == factor // 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(48, 80), (49, 80)])
def test_a_turned_picture_is_reduced_where_its_sides_are_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], orientation: int, decoder: str
) -> None:
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: decoder)
    path, exif = tmp_path / "x.jpg", Image.Exif()
    exif[0x0112] = orientation
    picture(*size).save(path, exif=exif, quality=95)
    upright = size[::-1] if orientation >= 5 else size
    reduced = read_reduced(path, (upright[0] // 2, upright[1] // 2))
    assert reduced.size == upright == image_size(path)
    assert reduced.factor == (1 if size[0] % 2 and orientation > 1 else 2)
    if reduced.factor == 2 and not size[0] % 2:
        mean = torch.nn.functional.avg_pool2d(read_image(path).float(), 2)
        assert (reduced.pixels - mean).abs().mean() < 2


@pytest.mark.parametrize("name", ["cmyk.jpg", "rgb.png", "palette.png", "grey16.png", "tiny.jpg"])
def test_other_files_are_decoded_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "grey16.png":
        Image.fromarray(np.full((40, 60), 513, dtype=np.uint16)).save(path)
    else:
        size = (8, 12) if name == "tiny.jpg" else (40, 60)
        mode = {"cmyk.jpg": "CMYK", "palette.png": "P"}.get(name, "RGB")
        picture(*size).convert(mode).save(path)
    reduced = read_reduced(path, (2, 3))
    assert reduced.factor == 1
    assert torch.equal(reduced.pixels, read_image(path))


@pytest.mark.parametrize("decoder", DECODERS)
def test_rows_23_24_and_28_hold_at_a_part_of_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: decoder)
    (tmp_path / "cut.jpg").write_bytes(encoded("jpeg")[:-800])
    (tmp_path / "text.jpg").write_text("this is no picture")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(DataError, match=rf"{name}: cannot be decoded"):
            read_reduced(tmp_path / name, (20, 20))
    data = encoded("jpeg")
    frame = data.index(b"\xff\xc0") + 5
    (tmp_path / "bomb.jpg").write_bytes(data[:frame] + struct.pack(">HH", 20_000, 20_000) + data[frame + 4 :])
    with pytest.raises(DataError, match=r"bomb\.jpg: .*400000000 pixels.*limit"):
        read_reduced(tmp_path / "bomb.jpg", (20, 20))


def test_what_a_strict_decoder_refuses_pillow_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: "simplejpeg")
    data = encoded("jpeg")
    (tmp_path / "x.jpg").write_bytes(data)
    (tmp_path / "y.jpg").write_bytes(data[:-2] + bytes(40) + data[-2:])  # bytes that belong to nothing
    np.testing.assert_array_equal(read_image(tmp_path / "y.jpg").numpy(), read_image(tmp_path / "x.jpg").numpy())
