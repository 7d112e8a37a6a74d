"""Turn other programs' proposal files into a store.

| format | what is read | image names | boxes |
| --- | --- | --- | --- |
| ``mat`` | Fast R-CNN's selective search data: cells ``boxes``, ``images`` | file names, or the order of ``--images`` | ``yxyx1`` |
| ``mat`` | ``boxes`` of one image, or a folder of such files | name of the file | ``xyxy1`` |
| ``coco`` | result JSON: list of image_id, bbox, score | ids | ``xywh`` |
| ``detectron2`` | pickle: ids, boxes, objectness_logits, bbox_mode | ids | ``xyxy`` or ``xywh`` |
| ``mmdetection`` | pickle: list, or path -> array or dict | the order of ``--images``, or file names | ``xyxy`` |
| ``csv`` | image_id, x1, y1, x2, y2[, score] | ids or file names | ``xyxy`` |
| ``numpy`` | ``.npz``: image id -> [P, 4] or [P, 5] | ids or file names | ``xyxy`` |

The conventions of boxes are explained in `detpipe.proposal_files.box_orders`. Files without scores list boxes best first; they
get scores that fall evenly from 1, so that the order stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from detpipe.proposal_files.array_readers import read_mat, read_numpy, read_pickle
from detpipe.proposal_files.box_checks import Array, explain, find_faults
from detpipe.proposal_files.box_orders import CONVENTIONS, starts_before_first, to_edges
from detpipe.proposal_files.known_images import KnownImages, plain_id, read_known_images
from detpipe.proposal_files.raw_proposals import OnBad, RawFile, RawImage, Reader, Tally
from detpipe.proposal_files.store import ProposalStore
from detpipe.proposal_files.store_format import ProposalWriter
from detpipe.proposal_files.table_readers import read_coco, read_csv
from detpipe.support.errors import DataError, UsageError
from detpipe.support.suggest import did_you_mean

FORMATS: dict[str, Reader] = {
    "mat": read_mat,
    "coco": read_coco,
    "detectron2": partial(read_pickle, kind="detectron2"),
    "mmdetection": partial(read_pickle, kind="mmdetection"),
    "csv": read_csv,
    "numpy": read_numpy,
}
_BY_SUFFIX: dict[str, tuple[str, Reader]] = {
    ".mat": ("mat", read_mat),
    ".json": ("coco", read_coco),
    ".pkl": ("pickle", read_pickle),
    ".pickle": ("pickle", read_pickle),
    ".csv": ("csv", read_csv),
    ".npz": ("numpy", read_numpy),
}


@dataclass(frozen=True)
class Conversion:
    """What became of a file of proposals.

    Args:
        store: the store that was written, open.
        convention: how the file's boxes were read, a key of `box_orders.CONVENTIONS`.
        counts: ``"images read"``, ``"images written"``, ``"boxes read"``, ``"boxes written"``, and for each reason
            ``"boxes skipped: ..."`` and ``"images skipped: ..."``.
    """

    store: ProposalStore
    convention: str
    counts: dict[str, int]


def convert(
    path: str | Path,
    output: str | Path,
    format: str | None = None,
    images: str | Path | None = None,
    source: str | None = None,
    boxes: str | None = None,
    on_bad: OnBad = "error",
    fill_missing: bool = False,
    progress: bool = False,
) -> Conversion:
    """Turn a file of proposals into a store.

    Args:
        path: the file, or a folder of ``.mat`` files.
        output: the store to write, ``*.safetensors``.
        format: a key of `FORMATS`; told from the suffix by default.
        images: COCO's annotation file, or a text file with one id a line: for formats that name no images, or name
            them by their files. With sizes in it, boxes outside their image are found and the store knows the sizes.
        source: the name of what made the boxes; the file's name by default.
        boxes: how the file writes boxes, a key of `box_orders.CONVENTIONS`; by default as the format does.
        on_bad: ``"error"`` ends at the first fault, ``"skip"`` leaves faulty boxes and images out and counts them.
        fill_missing: images of ``images`` that the file does not mention get no boxes and are counted, since result
            files and tables cannot say that an image has none.
        progress: show a progress bar.

    Returns:
        The store, and what was read and left out.

    Raises:
        DataError: a file is missing, damaged or something else, or a box or image in it cannot be used; file, image,
            box and value are named, and nothing is written.
        UsageError: ``format`` or ``boxes`` is unknown, or ``fill_missing`` is asked for without ``images``.
    """
    path = Path(path)
    if fill_missing and images is None:
        raise UsageError("images without boxes can only be filled in from a list of images: give --images FILE")
    name, reader = _choose(path, format)
    if boxes is not None and boxes not in CONVENTIONS:
        raise UsageError(
            f"boxes must be one of {', '.join(CONVENTIONS)}, got {boxes!r}{did_you_mean(boxes, CONVENTIONS)}"
        )
    if not path.exists():
        raise DataError(f"{path}: no such file: check the path")
    tally = Tally(on_bad)
    known = None if images is None else read_known_images(images)
    raw = reader(path, known, tally)
    convention = boxes or raw.convention
    settings = {"converted_from": name, "file": path.name, "boxes": convention}
    with ProposalWriter(output, source or path.stem, settings) as writer:
        for image in tqdm(raw.images, total=raw.total, unit="image", disable=not progress):
            _add(image, raw, convention, known, writer, tally, path)
        if known is not None and fill_missing:
            for image_id in (one for one in known.ids if one not in writer):
                writer.add(image_id, [], [], known.sizes.get(image_id))
                tally.counts["images filled in: not mentioned"] += 1
    store = ProposalStore(output)
    tally.counts.update({"images written": len(store), "boxes written": store.num_boxes})
    return Conversion(store, convention, dict(sorted(tally.counts.items())))


def _choose(path: Path, format: str | None) -> tuple[str, Reader]:
    if format is not None:
        if format not in FORMATS:
            raise UsageError(
                f"format must be one of {', '.join(FORMATS)}, got {format!r}{did_you_mean(format, FORMATS)}"
            )
        return format, FORMATS[format]
    suffix = ".mat" if path.is_dir() else path.suffix.lower()
    if suffix not in _BY_SUFFIX:
        raise UsageError(
            f"{path}: the suffix {path.suffix!r} does not tell the format (known are {', '.join(_BY_SUFFIX)}): "
            f"name it with --format, one of {', '.join(FORMATS)}"
        )
    return _BY_SUFFIX[suffix]


def _add(
    image: RawImage,
    raw: RawFile,
    convention: str,
    known: KnownImages | None,
    writer: ProposalWriter,
    tally: Tally,
    path: Path,
) -> None:
    where, count = f"{path}: image {image.name!r}", len(image.boxes)
    tally.counts.update({"images read": 1, "boxes read": count})
    image_id = plain_id(image.name, raw.naming) if known is None else known.find(image.name, raw.naming)
    if not image_id or image_id in writer:
        twice = f"there twice (as the id {image_id!r})"
        reason, text = (
            ("there twice", twice) if image_id else ("unknown", "--images lists no image of that name, or several")
        )
        tally.bad(f"images skipped: {reason}", f"{where}: {text}")
        tally.counts["boxes skipped: image skipped"] += count
        return
    size = known.sizes.get(image_id) if known is not None else None
    scores = (count - np.arange(count)) / max(count, 1) if image.scores is None else image.scores
    writer.add(image_id, *_usable(image, scores, convention, size, where, tally), size)


def _usable(
    image: RawImage, scores: Array, convention: str, size: tuple[int, int] | None, where: str, tally: Tally
) -> tuple[Array, Array]:
    edges, good = to_edges(image.boxes, convention), np.ones(len(scores), dtype=bool)
    early = {"starts before pixel 1": starts_before_first(image.boxes, convention)}
    for reason, rows in (early | find_faults(edges, scores, size)).items():
        rows = rows & good
        if not rows.any():
            continue
        row = int(np.flatnonzero(rows)[0])
        if reason in early:
            text = (
                f"is {image.boxes[row].tolist()}, read as {convention} ({CONVENTIONS[convention]}), and {reason}: "
                "name the right convention with --boxes"
            )
        else:
            text = f"{explain(reason, edges[row], float(scores[row]), size)} [read as {convention}]"
        tally.bad(f"boxes skipped: {reason}", f"{where}: {image.name_box(row)} {text}", int(rows.sum()))
        good &= ~rows
    return edges[good], scores[good]
