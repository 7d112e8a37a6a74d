"""A job of prediction: named images in, JSON lines and drawings out, and one JSON file of all in the end.

The file holds ``checkpoint``, ``class_names``, ``images`` (``file``, ``drawing``, ``width``, ``height``, ``detections`` or
``regions`` with ``label``, ``score`` and ``box`` in pixels of the image) and ``failed`` (``file``, ``reason``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from detpipe.images import Size, to_picture
from detpipe.pictures import glimpse_pictures, visualize
from detpipe.prediction.batches import Part, plan_batches
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.lines import LinesFile, Plan, Tally, describe, join, part_name, recorded
from detpipe.prediction.running import run
from detpipe.prediction.windows import Windows
from detpipe.support.errors import UsageError
from detpipe.types import Detection, GlimpsedDetection

Read = Callable[[ImageInput], Windows]
Look = Callable[[Sequence[ImageInput], Sequence[Windows]], Sequence[Detection]]  # -> what is found, on the CPU
_DRAWN = 4096  # pixels of the longer side of a drawing of an image that has more


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Args:
        inputs: the images.
        out: the folder that takes what is written.
        checkpoint: of the model, as the user named it.
        class_names: the name of label 1 first.
        kind: what is found, ``"detections"`` or ``"regions"``.
        settings: by name, what decides about it.
        drawings: the suffix of drawings, ``"jpg"`` or ``"png"``; None for no drawings.
        batch_size: images of one size that are looked at together; 1 leaves their sizes unread.
    """

    inputs: Sequence[ImageInput]
    out: Path
    checkpoint: str
    class_names: Sequence[str]
    kind: str
    settings: dict[str, Any]
    drawings: str | None = "jpg"
    batch_size: int = 1

    @cached_property
    def plan(self) -> Plan:
        """What is asked for, as the files say it."""
        names = "\n".join(one.name if one.page is None else f"{one.name} {one.page}" for one in self.inputs)
        images = hashlib.sha256(os.fsencode(names)).hexdigest()
        settings = {**self.settings, "batch_size": self.batch_size, "list": images}
        return Plan(self.checkpoint, tuple(self.class_names), len(self.inputs), settings)

    def do(
        self,
        part: Part,
        read: Read,
        look: Look,
        workers: int,
        resume: bool,
        tell: Callable[[int, int, str | None], None],
    ) -> None:
        """Look at the images of a part, and write them.

        Args:
            part: of all images.
            read: opens one, in a thread.
            look: finds something in a batch of them.
            workers: threads.
            resume: whether to go on with what an earlier run has written.
            tell: called with the number of images that are done and of all of the part, and why the last one could not be read.
        """
        batches = part.take(plan_batches(self._sizes(workers), self.batch_size))
        rows = [row for batch in batches for row in batch]
        names = drawing_names(self.inputs, self.out, self.drawings) if self.drawings else [None] * len(self.inputs)
        if self.drawings and not resume:
            check_foreign(self.out, self.kind, [str(names[row]) for row in rows])
        with LinesFile(self.out / part_name(self.kind, part), self.plan, part, rows, resume) as lines:
            tell(len(lines.done), len(rows), None)

            run(
                batches,
                lambda row: read(self.inputs[row]),
                lambda batch, images: look([self.inputs[row] for row in batch], images),
                lambda row, image, found: self._record(row, image, found, names[row]),
                lines,
                workers,
                lambda one: tell(len(lines.done), len(rows), one.get("reason")),
            )

    def finish(self, parts: int, limit: int | None = None) -> Tally:
        """Join what all parts have written to ``KIND.json``; see `join`."""
        names = [part_name(self.kind, Part(number, parts)) for number in range(1, parts + 1)]
        return join([self.out / name for name in names], self.out / f"{self.kind}.json", limit)

    def _sizes(self, workers: int) -> list[Size | None]:
        if self.batch_size == 1:
            return [None] * len(self.inputs)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(ImageInput.size, self.inputs))

    def _record(self, row: int, image: Windows | None, found: Detection | str, drawing: str | None) -> dict[str, Any]:
        source = self.inputs[row]
        record: dict[str, Any] = {"index": row, "file": source.name}
        if source.page is not None:
            record["page"] = source.page + 1
        if image is None or isinstance(found, str):
            return {**record, "reason": found}
        if drawing is not None:
            self._draw(image, found, self.out / drawing)
            record["drawing"] = drawing
        height, width = image.size
        return {**record, "width": width, "height": height, self.kind: describe(found, self.class_names)}

    def _draw(self, image: Windows, found: Detection, path: Path) -> None:
        reduced, factor = Windows.reduced(image, _DRAWN)  # a JPEG has at most 65,500 pixels a side
        picture = to_picture(reduced)
        rows = cast(dict[str, Tensor], found).items()
        found = cast(Detection, {name: row if name in ("scores", "labels") else row / factor for name, row in rows})
        if "glimpses" in found:
            drawn = glimpse_pictures.draw_glimpses(picture, cast(GlimpsedDetection, found), self.class_names)
        else:
            drawn = visualize.draw(picture, found["boxes"], found["labels"], self.class_names, found["scores"])
        save = visualize.save_png if self.drawings == "png" else visualize.save_jpeg
        save(path, drawn)


def check_foreign(out: Path, kind: str, drawings: Sequence[str]) -> None:
    """Refuse to draw over pictures that no run in the folder has drawn."""
    there = [name for name in drawings if (out / name).exists()]
    own = recorded(out, kind, "drawing") if there else set()
    foreign = [name for name in there if name not in own]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UsageError(
            f"{out / foreign[0]}{more}: is there, and no predictions in {out} say that they drew it: give another -o, move it "
            "away, or add --no-drawings"
        )


def drawing_names(inputs: Sequence[ImageInput], out: Path, suffix: str) -> list[str]:
    """Name the drawings after the images, with a number where two would be the same or an image in that folder would be lost."""
    names: list[str] = []
    used = {one.path.name for one in inputs if one.path.parent.resolve() == out.resolve()}
    next_number: dict[str, int] = {}
    for one in inputs:
        stem = one.path.stem if one.page is None else f"{one.path.stem}-page-{one.page + 1}"
        name, number = f"{stem}.{suffix}", next_number.get(stem, 2)
        while name in used:
            name, number = f"{stem}-{number}.{suffix}", number + 1
        next_number[stem] = number
        used.add(name)
        names.append(name)
    return names
