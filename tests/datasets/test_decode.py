import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detpipe.datasets import decode
from detpipe.datasets.decode import Reduced, image_names, image_size, read_image, read_reduced
from detpipe.support.errors import DataError
from detpipe.types import PixelType

from .builders import picture, png

DECODERS = ("simplejpeg", "torchvision", "pillow")


# format of Pillow, mode, options of saving: whatever may hold an orientation, and what cannot
ORIENTED = {
    "jpeg": ("JPEG", "RGB", {}),
    "grey_jpeg": ("JPEG", "L", {}),
    "cmyk_jpeg": ("JPEG", "CMYK", {}),
    "mpo": ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}),
    "png": ("PNG", "RGB", {}),
    "png_16": ("PNG", "I;16", {}),
    "palette_png": ("PNG", "P", {}),
    "webp": ("WEBP", "RGB", {"lossless": True}),
    "avif": ("AVIF", "RGB", {}),
    "jp2": ("JPEG2000", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff_lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "tiff_deflate": ("TIFF", "RGBA", {"compression": "tiff_adobe_deflate"}),
    "tiff_jpeg": ("TIFF", "RGB", {"compression": "jpeg"}),
    "tiff_16": ("TIFF", "I;16", {}),
    "tiff_16_lzw": ("TIFF", "I;16", {"compression": "tiff_lzw"}),
    "tiff_bits": ("TIFF", "1", {"compression": "group4"}),
    "tiff_grey": ("TIFF", "L", {}),
    **{f"png_{mode}": ("PNG", mode, {}) for mode in ("L", "1", "RGBA", "LA")},
    **{kind.lower(): (kind, mode, {}) for kind, mode in (("BMP", "RGB"), ("GIF", "P"))},
}


def oriented(folder: Path, case: str, orientation: int, size: tuple[int, int] = (40, 60)) -> Path:
    """A file whose picture is as large as ``size``, stored turned or mirrored."""
    kind, mode, options = ORIENTED[case]
    if not (kind in Image.SAVE or (Image.init() and kind in Image.SAVE)):
        pytest.skip(f"this Pillow writes no {kind}")
    image = picture(*size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    exif, path = Image.Exif(), folder / f"{case}_{orientation}"
    exif[0x0112] = orientation
    with path.open("wb") as file:
        (image if mode == "I;16" else image.convert(mode)).save(file, kind, exif=exif, **options)
    return path


def upright(path: Path) -> np.ndarray:
    with Image.open(
        io.BytesIO(path.read_bytes())
    ) as image:  # Pillow 13 maps a grey TIFF by its name with its sides exchanged
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I;16"):
            return np.repeat((np.asarray(turned) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.asarray(turned.convert("RGB"))


@pytest.mark.parametrize("case", ORIENTED)
def test_every_orientation_of_every_format_is_that_of_exif_transpose(tmp_path: Path, case: str) -> None:
    for orientation in range(1, 9):
        path = oriented(tmp_path, case, orientation)
        expected = upright(path)
        read = [read_image(path), read_image(path, path.read_bytes()), read_reduced(path, expected.shape[:2]).pixels]
        for image in read:
            assert image.dtype == torch.uint8
            np.testing.assert_array_equal(
                image.permute(1, 2, 0).numpy(), expected, err_msg=f"orientation {orientation}"
            )
        assert read[0].is_contiguous()
        sizes = [
            image_size(path),
            image_size(path, path.read_bytes()),
            read_reduced(path, None, pixels=None).size,
            read_reduced(path, (5, 5)).size,
        ]
        assert sizes == [expected.shape[:2]] * 4, f"orientation {orientation}"
        grey = read_image(path, pixels=PixelType(1))
        assert grey.shape == (1, *expected.shape[:2])


def test_an_orientation_in_xmp_counts_as_pillow_counts_it(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    for name, options in {"x.jpg": {"xmp": xmp}, "x.webp": {"xmp": xmp}, "x.tif": {"tiffinfo": {700: xmp}}}.items():
        picture(40, 60).save(tmp_path / name, **options)
        expected = upright(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name).permute(1, 2, 0).numpy(), expected, err_msg=name)
        assert image_size(tmp_path / name) == expected.shape[:2], name


def test_names_of_images_are_found_in_either_case_and_stored_arrays_are_not_doubles() -> None:
    names = ["a.avif", "B.JFIF", "c.jp2", "d.JPE", "e.pjpeg", "f.TIFF", "g.npy", "f.npy", "h.txt", "i.json"]
    assert image_names(names) == names[:7]


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 3), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 20, 30]


def encoded(suffix: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(out, suffix)
    return out.getvalue()


def of_size(height: int, width: int) -> bytes:
    """A JPEG that announces any size."""
    data = encoded("jpeg")
    frame = data.index(b"\xff\xc0") + 5
    return data[:frame] + struct.pack(">HH", height, width) + data[frame + 4 :]


def read_part(path: Path) -> Reduced:
    """At a part of the scale."""
    return read_reduced(path, (20, 20))


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
    for read in (read_image, read_part):
        with pytest.raises(DataError, match=rf"cut\.{suffix}: cannot be decoded"):
            read(path)


@pytest.mark.parametrize("read", [read_image, read_part, image_size])
def test_text_and_missing_files_are_errors_that_name_the_path(tmp_path: Path, read: Any) -> None:
    (tmp_path / "text.jpg").write_text("this is no picture")
    with pytest.raises(DataError, match=r"text\.jpg: cannot be .* as an image"):
        read(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg: no such image file"):
        read(tmp_path / "gone.jpg")


@pytest.mark.parametrize("read", [read_image, read_part, image_size])
@pytest.mark.parametrize("pillow_guards", [True, False])
def test_a_400_megapixel_header_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_guards: bool, read: Any
) -> None:
    if not pillow_guards:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for name, content in (("x.png", png((20_000, 20_000), 8, 2, b"")), ("x.jpg", of_size(20_000, 20_000))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: .*400000000 pixels.*limit"):
            read(tmp_path / name)


def test_a_picture_that_pillow_only_warns_of_raises_no_warning() -> None:
    assert image_size("large.jpg", of_size(11_000, 12_000)) == (11_000, 12_000)


def test_real_photographs_equal_pillow(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco_mini" / "val2017").iterdir())[:5]:
        np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), upright(path))


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
    turned = size[::-1] if orientation >= 5 else size
    reduced = read_reduced(path, (turned[0] // 2, turned[1] // 2))
    assert reduced.size == turned == image_size(path)
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


def test_what_a_strict_decoder_refuses_pillow_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: "simplejpeg")
    data = encoded("jpeg")
    (tmp_path / "x.jpg").write_bytes(data)
    (tmp_path / "y.jpg").write_bytes(data[:-2] + bytes(40) + data[-2:])  # bytes that belong to nothing
    np.testing.assert_array_equal(read_image(tmp_path / "y.jpg").numpy(), read_image(tmp_path / "x.jpg").numpy())
