"""What LVIS's annotation files say beyond COCO's: for which classes each image was searched."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.errors import DataError
from detpipe.strict_json import require
from detpipe.types import Federation

FREQUENCIES = ("r", "c", "f")
_NEGATIVE, _NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


def is_federated(images: dict[int, dict[str, Any]]) -> bool:
    """Whether any image lists classes that it was searched for without finding them."""
    return any(_NEGATIVE in image for image in images.values())


def read_federation(
    images: dict[int, dict[str, Any]], categories: dict[int, dict[str, Any]], label_of: dict[int, int], path: str
) -> Federation:
    """Read the fields of a federated data set.

    Args:
        images: the records of the file by id.
        categories: the records of the file by id.
        label_of: category id -> label.
        path: of the file, for messages.

    Returns:
        The classes of each image, and how frequent each class is.

    Raises:
        DataError: a field is missing or of the wrong kind, or names a category that the file does not have.
    """
    frequencies = []
    for key in label_of:
        where = f"{path}: category id {key}"
        frequency = require(categories[key], "frequency", str, where)
        if frequency not in FREQUENCIES:
            raise DataError(
                f"{where}: the field 'frequency' is {frequency!r}: expected one of {', '.join(FREQUENCIES)}"
            )
        frequencies.append(frequency)
    return Federation(
        negative=_pairs(images, _NEGATIVE, label_of, path),
        not_exhaustive=_pairs(images, _NOT_EXHAUSTIVE, label_of, path),
        frequencies=tuple(frequencies),
    )


def _pairs(images: dict[int, dict[str, Any]], field: str, label_of: dict[int, int], path: str) -> npt.NDArray[np.int64]:
    pairs: list[tuple[int, int]] = []
    for key, image in images.items():
        where = f"{path}: image id {key}"
        for category in require(image, field, list, where):
            if type(category) is not int or category not in label_of:
                raise DataError(f"{where}: the field {field!r} lists {category!r}, which is no category id of the file")
            pairs.append((key, label_of[category]))
    return np.array(pairs, np.int64).reshape(-1, 2)
