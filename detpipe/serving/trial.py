"""What the page to try a detector on does: uploads in; a line, pictures, tables and files out, all in one folder."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any, cast

from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detpipe.datasets.decode import read_image
from detpipe.datasets.planes import without_advice
from detpipe.detector import TwoStageDetector
from detpipe.images import to_picture
from detpipe.pictures import glimpse_pictures, visualize
from detpipe.prediction import TiledDetector
from detpipe.serving.explanation import Explanation, explain
from detpipe.serving.given_boxes import AtGivenBoxes, parse_boxes
from detpipe.serving.uploads import upload_size
from detpipe.support.errors import DataError
from detpipe.types import RGB, Detection, GlimpsedDetection, PixelType

OWN, GIVEN = "the detector's own", "the boxes below"
TILES = ["none", "320", "640", "1024"]
_MOST_PIXELS = 2**26  # of an image; several lie in memory
_KEPT = 8  # results that can be looked at with another threshold
_FOLDERS = 64  # of pictures, one for each threshold that was looked at
_DRAWN = 100  # proposals of a picture
_CLASSES = 12  # columns of the table of scores
_COLORS = ((255, 214, 0), (65, 135, 255))


@dataclass(frozen=True)
class Tried:
    """A detector that the page is about.

    Args:
        name: of it.
        detector: in evaluation mode.
        class_names: the name of label 1 first.
        sources: of proposals, name -> image ``[C, H, W]`` to boxes ``[P, 4]``.
        draw_attention: image ``[3, H, W]`` uint8, what was found there and a folder -> pictures of the gates; None without any.
        needs_boxes: whether the detector finds no proposals itself.
        pixels: what images are read as.
    """

    name: str
    detector: TwoStageDetector
    class_names: Sequence[str]
    sources: dict[str, Callable[[Tensor], Tensor]]
    draw_attention: Callable[[Tensor, Detection, Path], Sequence[Path]] | None = None
    needs_boxes: bool = False
    pixels: PixelType = RGB


@dataclass
class Trial:
    """What the controls of the page do; one image at a time goes through the detector.

    Args:
        tried: the detector.
        folder: that uploads come to, and pictures go to.
    """

    tried: Tried
    folder: Path
    _results: OrderedDict[str, Explanation] = field(default_factory=OrderedDict)
    _written: deque[Path] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, file: Any, source: Any, boxes: Any, tiles: Any, threshold: Any) -> tuple[Any, ...]:
        """Detect in an uploaded file; the key of the result, and what :meth:`show` says."""
        if file is None:
            return "", *self.show("", threshold)
        try:
            with self._lock:
                result = self._detect(self._read(file), str(source), str(boxes or ""), str(tiles))
                key = token_hex(8)
                self._results[key] = result
                while len(self._results) > _KEPT:
                    self._results.popitem(last=False)
        except (DataError, ValueError) as error:
            return "", *self.show("", threshold, without_advice(error))
        return key, *self.show(key, threshold)

    def show(self, key: Any, threshold: Any, line: str = "Drop an image above.") -> tuple[Any, ...]:
        """Show a result at a threshold: a line, pictures, tables and files; nothing but the line where there is none."""
        result = self._results.get(str(key))
        if result is None:
            line = "This result is gone: press Detect again." if key else line
            return line, None, None, None, [], [], [], None, None
        told, names, out = result.above(float(threshold)), self.tried.class_names, self._new_folder()
        found = told.found

        def save(name: str, picture: Tensor) -> str:
            visualize.save_png(out / name, picture)
            return str(out / name)

        drawn = visualize.draw(told.picture, found["boxes"], found["labels"], names, found["scores"])
        picture, proposals, glimpses = save("detections.png", drawn), None, None
        if told.proposals is not None:
            proposals = save("proposals.png", draw_boxes(told.picture, told.proposals))
        if "glimpses" in found and found["glimpses"].shape[1]:
            seen = cast(GlimpsedDetection, found)
            glimpses = save("glimpses.png", glimpse_pictures.draw_glimpses(told.picture, seen, names))
        height, width = told.picture.shape[1:]
        written = out / "detections.json"
        written.write_text(json.dumps(self._describe(told, width, height), indent=1), encoding="utf-8")
        count = (
            f"{len(found['scores'])} of {len(result.found['scores'])} detections at {float(threshold):.2f} and above"
        )
        return (
            f"{count}; {width} x {height} pixels, {told.seconds['all']:.2f} s",
            *(picture, proposals, glimpses),
            *(self._rows(found), self._class_rows(told), _time_rows(told)),
            *(str(written), picture),
        )

    def attend(self, key: Any, threshold: Any) -> tuple[str, list[str]]:
        """Draw the gates of the backbone on what was found: a line, and pictures."""
        result = self._results.get(str(key))
        if result is None or self.tried.draw_attention is None:
            return "Drop an image above, and press Detect.", []
        found = result.above(float(threshold)).found
        with self._lock:
            paths = self.tried.draw_attention(result.picture, found, self._new_folder())
        line = f"Gates on the {len(found['scores'])} detections at {float(threshold):.2f} and above"
        return line if paths else "Gates are drawn on detections: lower the threshold.", [str(path) for path in paths]

    def _read(self, file: Any) -> Tensor:
        """Decode a file that was uploaded, and no other."""
        given = file if isinstance(file, dict) else {}
        path = Path(str(given.get("path") or "")).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            raise DataError("expected an image that was dropped or pasted on this page")
        name, content = Path(str(given.get("orig_name") or "image")).name, path.read_bytes()
        height, width = upload_size(name, content)
        if height * width > _MOST_PIXELS:
            raise DataError(f"{name}: {width} x {height} pixels are too many for this page; use detpipe predict")
        return read_image(name, content, self.tried.pixels)

    def _detect(self, image: Tensor, source: str, text: str, tiles: str) -> Explanation:
        start = time.perf_counter()
        boxes = None
        if source == GIVEN or (source == OWN and self.tried.needs_boxes):
            boxes = parse_boxes(text or "[]", (image.shape[1], image.shape[2]))
            if not len(boxes):
                raise DataError("boxes: there are none; click two corners on the image, or write [[x1, y1, x2, y2]]")
        elif source != OWN:
            boxes = self.tried.sources[source](image)
        made = time.perf_counter() - start
        detector = self.tried.detector
        if tiles in TILES[1:]:
            tiled = TiledDetector(AtGivenBoxes(detector), int(tiles))
            [found] = tiled([image], None if boxes is None else [{"proposals": boxes}])
            told = Explanation(to_picture(image), found, boxes)
        else:
            told = explain(detector, image, boxes)
        told.seconds = {**({f"proposals: {source}": made} if source in self.tried.sources else {}), **told.seconds}
        told.seconds["all"] = time.perf_counter() - start
        return told

    def _describe(self, told: Explanation, width: int, height: int) -> dict[str, Any]:
        found, names = told.found, self.tried.class_names
        rows: list[dict[str, Any]] = [
            {"label": names[label - 1], "score": score, "box": box}
            for label, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        ]
        if "glimpses" in found:
            rows = [row | glimpse_pictures.describe(cast(GlimpsedDetection, found), k) for k, row in enumerate(rows)]
        described = {"model": self.tried.name, "width": width, "height": height, "detections": rows}
        if told.class_scores is not None:
            described["class_scores"] = {"classes": list(names), "scores": told.class_scores.tolist()}
        return {**described, "seconds": told.seconds}

    def _rows(self, found: Detection) -> list[list[Any]]:
        columns = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
        return [
            [index, self.tried.class_names[label - 1], round(score, 3), *(round(side, 1) for side in box)]
            for index, (label, score, box) in enumerate(columns, start=1)
        ]

    def _class_rows(self, told: Explanation) -> dict[str, Any]:
        """The scores of the classes that are likely anywhere, a detection a row."""
        scores = told.class_scores
        if scores is None or not len(scores):
            return {"headers": [""], "data": []}
        best = scores.amax(0).topk(min(_CLASSES, scores.shape[1])).indices.sort().values
        rows = [
            [index, *(round(value, 3) for value in row)] for index, row in enumerate(scores[:, best].tolist(), start=1)
        ]
        return {"headers": ["", *(self.tried.class_names[k] for k in best.tolist())], "data": rows}

    def _new_folder(self) -> Path:
        """A new folder for what is written; the oldest goes where there are many."""
        folder = self.folder / token_hex(8)
        folder.mkdir()
        self._written.append(folder)
        while len(self._written) > _FOLDERS:
            shutil.rmtree(self._written.popleft(), ignore_errors=True)
        return folder


def draw_boxes(picture: Tensor, boxes: Tensor) -> Tensor:
    """Draw the first boxes ``[P, 4]`` on a picture ``[3, H, W]`` uint8 without a name, the best ones yellow, others blue."""
    colors: list[Any] = [_COLORS[index >= 10] for index in range(min(len(boxes), _DRAWN))]
    large, factors = visualize.fit(picture, max(640, *picture.shape[1:]))
    corners = (boxes[:_DRAWN] * factors).flip(0)
    return draw_bounding_boxes(large, corners, colors=colors[::-1], width=2) if len(boxes) else large


def _time_rows(told: Explanation) -> list[list[Any]]:
    stages = {name: seconds for name, seconds in told.seconds.items() if name != "all"}
    total = told.seconds["all"]
    rows = {**stages, "resizing and the rest": total - sum(stages.values()), "all": total}
    return [[name, round(1000 * seconds, 1)] for name, seconds in rows.items()]
