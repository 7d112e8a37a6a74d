"""Does a store belong to the images that it is used for? One line for each kind of fault, with its likely cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from detpipe.proposal_files.box_checks import TOLERANCE, reaches_beyond

SHOWN = 5  # images that a line names


class _Store(Protocol):
    path: Path

    def __len__(self) -> int: ...
    def __iter__(self) -> Any: ...
    def __contains__(self, image_id: object) -> bool: ...
    def __getitem__(self, image_id: str) -> Any: ...


def missing(store: _Store, names: list[str], total: int) -> str:
    """Say which images have no entry.

    Args:
        store: the store.
        names: the ids that it has not.
        total: how many were wanted.

    Returns:
        The line.
    """
    first = names[0]
    near = next((form for form in (first.lstrip("0"), first.zfill(6), first.zfill(12)) if form in store), None)
    cause = "is the store of another data set or split?"
    if near is not None:
        cause = f"the store names images otherwise ({near!r} for {first!r}): convert again with --images FILE.json"
    shown = f"the first are {_first(names)}" if len(names) > 1 else _first(names)
    return f"{store.path}: no proposals for {len(names)} of {total} images: {shown} ({examples(store)}); {cause}"


def other_frame(store: _Store, names: list[str], made: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
    """Find images of another size than those that the boxes were made for.

    Args:
        store: the store.
        names: N ids that it has.
        made: ``[N, 2]`` height and width that the store knows, zeros where unknown.
        given: ``[N, 2]`` height and width of the data set's images.

    Returns:
        One line, or none.
    """
    bad = np.flatnonzero((made[:, 0] > 0) & (made != given).any(axis=1)).tolist()
    if not bad:
        return []
    shown = [f"{names[i]!r} ({_size(made[i])}, the data has {_size(given[i])})" for i in bad[:SHOWN]]
    return [
        f"{store.path}: {len(bad)} of {len(names)} images have another size (height x width) than those that the proposals "
        f"were made for: {', '.join(shown)}; make the proposals from these images"
    ]


def outside(store: _Store, names: list[str], extents: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
    """Find images whose boxes reach beyond them.

    Args:
        store: the store.
        names: N ids that it has.
        extents: ``[N, 4]`` least x1, least y1, greatest x2, greatest y2 of each image's boxes.
        given: ``[N, 2]`` height and width of the data set's images.

    Returns:
        One line, or none.
    """
    bad = np.flatnonzero(reaches_beyond(extents, given)).tolist()
    if not bad:
        return []
    shown = []
    for i in bad[:SHOWN]:
        boxes = store[names[i]].boxes
        first = int(np.argmax(reaches_beyond(boxes, given[i])))
        shown.append(f"{names[i]!r} (box {first} is {boxes[first].tolist()}, the image {_size(given[i])})")
    cause = "are they of other images or of resized ones?"
    if not reaches_beyond(extents[:, [1, 0, 3, 2]], given).any():
        cause = "with x and y swapped all would lie inside: convert again with --boxes yxyx, yxyx0 or yxyx1"
    return [
        f"{store.path}: {len(bad)} of {len(names)} images (height x width) have boxes (x1, y1, x2, y2) that reach more than "
        f"{TOLERANCE:g} pixel beyond them: {', '.join(shown)}; {cause}"
    ]


def examples(store: _Store) -> str:
    """Say how many images a store has, with a few of its ids."""
    names = [name for name, _ in zip(store, range(3), strict=False)]
    return f"it has {len(store)} images" + (f", such as {', '.join(map(repr, names))}" if names else "")


def _first(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN]))


def _size(size: npt.NDArray[Any]) -> str:
    return f"{size[0]} x {size[1]}"
