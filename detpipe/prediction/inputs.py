"""What is named on a command line, or in a list, as images: files, folders, patterns, lists, standard input, web addresses."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from torch import Tensor

from detpipe.datasets.decode import IMAGE_SUFFIXES, image_names, image_size, read_reduced
from detpipe.datasets.fetch import Patience, is_remote, read_url
from detpipe.datasets.planes import without_advice
from detpipe.images import Size
from detpipe.support.errors import DataError, DetpipeError, UsageError
from detpipe.support.files import refuse_special
from detpipe.types import PixelType

MOST_BYTES = 1 << 28  # of an image on the web or from standard input
_PATIENCE = Patience(attempts=2, timeout=20, wait=1, total=300)
_EVERYTHING = (2**31, 2**31)  # a size that no reduced picture has


@dataclass(frozen=True)
class ImageInput:
    """An image that is to be looked at.

    Args:
        name: what it is called in what is written.
        path: of its file; what it is called like where it has none.
        content: its bytes, where they came from standard input.
        url: where it is on the web, or the address of a camera.
        page: of a TIFF of several pages, from 0 on.
    """

    name: str
    path: Path
    content: bytes | None = None
    url: str | None = None
    page: int | None = None

    @property
    def is_camera(self) -> bool:
        """Whether it is no image, but a camera that shows one after another."""
        return self.url is not None and is_camera(self.url)

    def size(self) -> Size | None:
        """Height and width by the header of its file; None where it has none, or cannot be read."""
        try:
            return None if self.url else image_size(self.path, self.content)
        except (DetpipeError, OSError):
            return None  # reading it will say why

    def read(self, pixels: PixelType) -> Tensor:
        """Decode it: ``[C, H, W]``, the channels last in memory; a DataError or DownloadError where it cannot be."""
        if self.is_camera:
            raise UsageError(f"{self.name}: a camera is watched by detpipe predict alone; give images")
        content = read_url(self.url, MOST_BYTES, "check the address", _PATIENCE) if self.url else self.content
        try:
            return read_reduced(self.name if self.url else self.path, _EVERYTHING, content, pixels).pixels
        except DataError as error:
            raise DataError(without_advice(error)) from error


def is_camera(name: str) -> bool:
    """Whether a name is that of a camera: ``camera:0``, ``rtsp://HOST/PATH`` or ``http://HOST/PATH.mjpg``."""
    if name.startswith(("http://", "https://")):
        return urlsplit(name).path.lower().endswith((".mjpg", ".mjpeg"))  # pictures one after another
    return re.fullmatch(r"camera:[0-9]{1,4}|rtsps?://.+", name) is not None


def find_inputs(names: Sequence[str], allow_network: bool = False) -> list[ImageInput]:
    """List the images that are named, each once, those of a folder or pattern sorted.

    Args:
        names: files; folders, searched at any depth; patterns such as ``"shots/*/left_*.jpg"``; ``"@list.txt"``, a name a line of
            any of these but lists, ``"@-"`` of standard input; ``"-"``, an image from standard input; web addresses; cameras.
        allow_network: whether names may be addresses of the web or of a network's camera.

    Returns:
        The images.

    Raises:
        UsageError: what is named does not exist, is empty, or is on the web where that is not allowed. A file of a list that does
            not exist is an image that cannot be read.
    """
    found: dict[tuple[str, str | None], ImageInput] = {}
    for name in names:
        for one in _listed(name, allow_network) if name.startswith("@") else _named(name, allow_network):
            found.setdefault((str(one.path), one.url), one)
    return list(found.values())


def find_images(names: Sequence[str]) -> list[ImageInput]:
    """List images that are files, as `find_inputs`; one from elsewhere is a UsageError."""
    inputs = find_inputs(names, allow_network=True)  # fetches nothing
    for one in inputs:
        if one.content is not None or one.url:
            raise UsageError(
                f"{one.name}: images from standard input, the web and cameras are taken by detpipe predict alone; give files"
            )
    return inputs


def _named(name: str, allow_network: bool) -> Iterable[ImageInput]:
    if name == "-":
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
        if not content or len(content) > MOST_BYTES:
            raise UsageError(
                f"-: expected an image of at most {MOST_BYTES} bytes on standard input, got {len(content)}"
            )
        return [ImageInput("-", Path("stdin"), content)]
    if is_camera(name):
        shown = re.sub(r"(?<=://)[^/]*@|\?.*", "", name)  # without a password
        if "://" in name and not allow_network:
            raise UsageError(f"{shown}: is on the network; add --allow_network to watch it")
        return [ImageInput(shown, Path(Path(urlsplit(name).path).name.replace(":", "-") or "camera"), url=name)]
    if is_remote(name):
        if not allow_network:
            raise UsageError(f"{name}: is on the web; add --allow_network to fetch it")
        return [ImageInput(name, Path(Path(unquote(urlsplit(name).path)).name or "index"), url=name)]
    refuse_special(name, UsageError)
    path = Path(name)
    if path.is_dir():
        return map(_file, _in_folder(path))
    if path.is_file():
        return [_file(path)]
    if glob.has_magic(name):
        inside = [Path(one) for one in sorted(glob.glob(name, recursive=True)) if Path(one).is_file()]
        if inside:
            return map(_file, inside)
        raise UsageError(f"no file matches {name}")
    raise UsageError(f"{name} does not exist; expected an image or a folder of images")


def _file(path: Path) -> ImageInput:
    return ImageInput(str(path), path)


def _listed(name: str, allow_network: bool) -> Iterator[ImageInput]:
    file = name[1:]
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(
            f"{file}: this list of images cannot be read ({error.strerror}); give one name a line"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file}: expected a list of images in UTF-8, one name a line; give an image without @"
        ) from error
    if not lines:
        raise UsageError(f"{file}: this list names no image")
    for line in lines:
        if line == "-":
            raise UsageError(f"{file}: '-' is no name for a list; give it on the command line")
        if is_remote(line) or is_camera(line) or Path(line).exists() or glob.has_magic(line):
            yield from _named(line, allow_network)
        else:
            yield _file(Path(line))


def _in_folder(folder: Path) -> list[Path]:
    by_folder: dict[Path, list[str]] = {}
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            by_folder.setdefault(path.parent, []).append(path.name)
    inside = sorted(place / file for place, files in by_folder.items() for file in image_names(files))
    if not inside:
        raise UsageError(f"folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return inside
