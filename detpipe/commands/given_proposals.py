"""Boxes for ``predict`` that are not the detector's own: from a JSON file, from a store, or made on the spot.

A JSON file maps image name or path -> list of ``[x1, y1, x2, y2]`` in pixels of the image, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpipe.prediction.windows import Windows
from detpipe.proposal_files.store import ProposalStore
from detpipe.proposal_files.store_format import SUFFIX
from detpipe.proposals.registry import SOURCES, OfflineSource, make_source, remake_source
from detpipe.support.errors import DataError, UsageError
from detpipe.support.strict_json import is_number, load_json, shorten

Boxes = Callable[[Path, Windows], Tensor]  # path and image, 8-bit RGB -> [P, 4] xyxy in its pixels


def open_boxes(option: str, images: Sequence[Path], trained_on: dict[str, Any] | None) -> Boxes:
    """Open what ``--proposals`` names, a JSON file, a store, or a source, and see that it has boxes for all images.

    A source by which the detector was trained, if known, gets its settings, another one its defaults.
    """
    suffix = Path(option).suffix
    if suffix == SUFFIX:
        return _from_store(ProposalStore(option), images)
    if suffix == ".json":
        return _from_json(Path(option), images)
    if not set(option.split("+")) <= set(SOURCES) and (suffix or "/" in option):
        raise UsageError(
            f"--proposals {option} is neither a JSON file, nor a store (*{SUFFIX}), nor a source: {', '.join(SOURCES)}"
        )
    if trained_on is not None and trained_on["source"] in (option, "union") and trained_on["settings"]:
        source = remake_source(trained_on["source"], trained_on["settings"])
        if option in (source.name, "+".join(part.name for part in getattr(source, "sources", []))):
            return _from_source(source)
    return _from_source(make_source(option))


def advice(checkpoint: str, trained_on: dict[str, Any] | None) -> str:
    """Say what to add where a detector of a checkpoint needs boxes and none are given."""
    source = None if trained_on is None else trained_on["source"]
    if source == "union" and trained_on is not None:
        source = "+".join(part["source"] for part in trained_on["settings"].get("sources", []))
    known = source is not None and set(source.split("+")) <= set(SOURCES)
    made_by = "precomputed proposals" if source is None else f"proposals of {source}"
    first = f"--proposals {source}, which makes the same kind of boxes" if known else "--proposals selective_search"
    return (
        f"{checkpoint} was trained on {made_by} and needs boxes for the images: add {first}, another source "
        f"({', '.join(SOURCES)}), a store (*{SUFFIX}), or a JSON file"
    )


def read_proposals(path: Path) -> dict[str, Tensor]:
    """Read a JSON file, image name or path -> list of ``[x1, y1, x2, y2]``; a DataError names the image and the box."""
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must map image names to lists of [x1, y1, x2, y2], got {type(content).__name__}")
    proposals = {}
    for name, boxes in content.items():
        if not isinstance(boxes, list):
            raise DataError(f"{path}, image {name!r}: expected a list of [x1, y1, x2, y2], got {type(boxes).__name__}")
        numbers = [isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) for box in boxes]
        rows = [box if known else [0] * 4 for box, known in zip(boxes, numbers, strict=True)]
        found = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
        sound = (found[:, 2:] > found[:, :2]).all(dim=1) & found.isfinite().all(dim=1)
        if not sound.all():
            index = int(sound.logical_not().nonzero()[0])
            raise DataError(
                f"{path}, image {name!r}, box {index}: expected [x1, y1, x2, y2] with x2 > x1, y2 > y1, got {shorten(boxes[index])}"
            )
        proposals[name] = found
    return proposals


def _from_source(source: OfflineSource) -> Boxes:
    def boxes(path: Path, image: Windows) -> Tensor:
        try:
            return torch.from_numpy(source.propose(image.whole().permute(1, 2, 0).contiguous().numpy())[0])
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    return boxes


def _from_store(store: ProposalStore, images: Sequence[Path]) -> Boxes:
    names = {path: _name_in(store, path) for path in images}
    missing = [path for path, name in names.items() if name is None]
    if missing:
        raise DataError(
            f"{store.path} has no boxes for {len(missing)} of {len(images)} images, such as {', '.join(map(str, missing[:5]))}; "
            f"it calls its images {', '.join(list(store)[:5])}"
        )

    def boxes(path: Path, image: Windows) -> Tensor:
        name = names[path]
        assert name is not None
        size, seen = store.size(name), image.size
        if size is not None and size != seen:
            raise DataError(
                f"{path} has {seen[1]} x {seen[0]} pixels, but {store.path} has boxes of an image {name!r} of {size[1]} x {size[0]}"
            )
        return torch.tensor(store[name].boxes)

    return boxes


def _name_in(store: ProposalStore, path: Path) -> str | None:
    """The id of an image in a store: its name, or COCO's number without leading zeros."""
    for name in (path.stem, path.name, path.stem.lstrip("0")):
        if name in store:
            return name
    return None


def _from_json(file: Path, images: Sequence[Path]) -> Boxes:
    proposals = read_proposals(file)
    found = {}
    for path in images:
        key = next((key for key in (str(path), path.as_posix(), path.name, path.stem) if key in proposals), None)
        if key is None:
            raise DataError(f"the proposals file has no boxes for {path}: add the key {path.name!r}")
        found[path] = proposals[key]
    return lambda path, image: found[path]
