"""What image files of strangers may be."""

from __future__ import annotations

from PIL import Image

from detpipe.datasets.decode import IMAGE_SUFFIXES, image_format, image_size
from detpipe.support.errors import DataError

_FORMATS = {"NPY", *(Image.registered_extensions().get(suffix, "NPY") for suffix in IMAGE_SUFFIXES)}


def upload_size(name: str, content: bytes) -> tuple[int, int]:
    """Height and width of an image file, by its header.

    Raises:
        DataError: it is none, too large, or of a format that data sets do not have, such as PostScript, which is a program.
    """
    size = image_size(name, content)
    if (found := image_format(content)) not in _FORMATS:
        raise DataError(f"{name}: files of the format {found} are not taken; send JPEG or PNG")
    return size
