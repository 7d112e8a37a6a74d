"""Videos in and out, frame by frame with its time, by PyAV (extra ``video``): a file, or a folder of frames.

Times are those that frames are to be shown at, so that a video whose rate changes stays in step. What was written is whole after
any stop: lines end with each frame, and the video is in fragments, each of which plays without what follows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detpipe.datasets.planes import without_advice
from detpipe.images import to_picture
from detpipe.pictures import visualize
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.tracking import Tracker
from detpipe.support.errors import DataError, UsageError
from detpipe.types import Detection, PixelType

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv")
_CLOCK = Fraction(1, 1000)  # seconds of a step of what is written
_MOST_PIXELS = 2**26  # of a frame
_CODECS = ("libx264", "mpeg4")  # the first that PyAV was built with


class Frame(NamedTuple):
    """A picture of a video."""

    number: int  # from 0 on
    seconds: float  # after the first
    image: Tensor  # [C, H, W]


class VideoEnd(Exception):
    """A video that cannot be read any further, though it has not ended; the message says why."""


@dataclass(frozen=True)
class VideoOutput:
    """What is written of a video.

    Args:
        lines: file for JSON lines: one of the video, ``{"file", "checkpoint", "class_names"}``, and one of each frame, ``{"frame",
            "seconds", "width", "height", "detections"}``, those as of ``detpipe predict``, with a ``track``.
        video: file for the frames with what was found; None for none.
        class_names: the name of label 1 first.
    """

    lines: Path
    video: Path | None
    class_names: Sequence[str]


def is_video(path: Path) -> bool:
    """Whether a file is one by its suffix."""
    return path.suffix.lower() in SUFFIXES


def read_video(path: Path, every: int = 1) -> Iterator[Frame]:
    """Decode a video file, upright as it is to be shown.

    Args:
        path: of the file.
        every: frames from one to the next; others are left out.

    Yields:
        Frames, ``[3, H, W]`` uint8 RGB.

    Raises:
        DataError: it is no video, has no pictures, frames that are too large, or there is no decoder for it.
        VideoEnd: it is cut off, or damaged from there on.
        UsageError: PyAV is not installed.
    """
    av = _pyav()
    with _named(av, path), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path}: has no pictures; expected a video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f"{path}: this PyAV has no decoder for its pictures; convert it, to H.264 for example")
        if stream.width * stream.height > _MOST_PIXELS:
            raise DataError(f"{path}: frames of {stream.width} x {stream.height} pixels are too large")
        stream.thread_type = "AUTO"
        first, number, seconds = None, -1, 0.0
        try:
            for number, frame in enumerate(container.decode(stream)):
                first = frame.time if first is None else first
                seconds = number / 25 if frame.time is None or first is None else float(frame.time - first)
                if number % every == 0:
                    yield Frame(number, seconds, _upright(frame))
        except av.FFmpegError as error:
            if number < 0:
                raise
            raise VideoEnd(f"{path}: cannot be read after frame {number} ({error.strerror})") from error
        if number >= 0 and _is_cut_off(container, stream, seconds):
            raise VideoEnd(f"{path}: is cut off after frame {number}, at {seconds:.2f} seconds")
        if number < 0:
            raise DataError(f"{path}: no picture of it can be decoded; the file is empty or cut off")


def _is_cut_off(container: Any, stream: Any, seconds: float) -> bool:
    """Whether a file that was read to its end, the last frame at a time, has less in it than its header says."""
    if "mp4" in container.format.name:  # its header counts what is not to be shown too, but says where each frame lies
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0) > container.size
    duration = None if stream.duration is None else float(stream.duration * stream.time_base)
    if duration is None and container.duration is not None and len(container.streams) == 1:
        duration = container.duration / 1e6
    return duration is not None and seconds + max(1.0, 0.05 * duration) < duration


def read_frames(inputs: Sequence[ImageInput], rate: float, every: int, pixels: PixelType) -> Iterator[Frame]:
    """Decode images, so many a second, as frames; a VideoEnd names the first that cannot be read."""
    for number in range(0, len(inputs), every):
        try:
            image = inputs[number].read(pixels)
        except (DataError, OSError) as error:
            raise VideoEnd(without_advice(error)) from error
        yield Frame(number, number / rate, image)


def look_at_video(
    frames: Iterator[Frame],
    look: Callable[[Sequence[Tensor]], Sequence[Detection]],
    out: VideoOutput,
    head: dict[str, Any],
    tracker: Tracker | None = None,
    batch_size: int = 1,
    tell: Callable[[int], None] = lambda number: None,
) -> str | None:
    """Look at frames and write what is found, batch by batch.

    Args:
        frames: in order.
        look: N images of one size -> what is found in each.
        out: what is written.
        head: the first line.
        tracker: that follows objects; None for none.
        batch_size: frames that are looked at together.
        tell: called with the number of each frame that was written.

    Returns:
        Why it ended early; None if it did not.
    """
    out.lines.parent.mkdir(parents=True, exist_ok=True)
    with out.lines.open("w", encoding="utf-8") as lines, _writing(out.video) as write:
        lines.write(json.dumps(head) + "\n")
        end = None
        while end is None:
            batch: list[Frame] = []
            try:
                batch += islice(frames, batch_size)
            except VideoEnd as error:
                end = str(error)
            if not batch:
                return end
            for frame, found in zip(batch, look([one.image for one in batch]), strict=True):
                tracks = None if tracker is None else tracker.follow(found, frame.seconds)
                write(frame, lambda: _draw(frame.image, found, tracks, out.class_names))  # noqa: B023 (called there)
                lines.write(json.dumps(_record(frame, found, tracks, out.class_names), allow_nan=False) + "\n")
                lines.flush()
                tell(frame.number)
    return end


def _record(
    frame: Frame, found: Detection, tracks: Sequence[int | None] | None, names: Sequence[str]
) -> dict[str, Any]:
    columns = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    rows: list[dict[str, Any]] = [
        {"label": names[label - 1], "score": score, "box": box} for label, score, box in columns
    ]
    if tracks is not None:
        rows = [{**row, "track": track} for row, track in zip(rows, tracks, strict=True)]
    height, width = frame.image.shape[1:]
    return {
        "frame": frame.number,
        "seconds": round(frame.seconds, 6),
        "width": width,
        "height": height,
        "detections": rows,
    }


def _draw(image: Tensor, found: Detection, tracks: Sequence[int | None] | None, names: Sequence[str]) -> Tensor:
    """A frame with its detections, those of one track in one color and with its number."""
    picture = to_picture(image)
    if tracks is None:
        return visualize.draw(picture, found["boxes"], found["labels"], names, found["scores"], min_side=0)
    rows = list(zip(found["labels"].tolist(), tracks, strict=True))
    own = [f"{names[label - 1]}{'' if track is None else f' #{track}'}" for label, track in rows]
    colors = [visualize.IGNORED_COLOR if track is None else visualize.class_color(track) for _, track in rows]
    labels = torch.arange(1, len(own) + 1)
    return visualize.draw(picture, found["boxes"], labels, own, found["scores"], colors=colors, min_side=0)


@contextmanager
def _writing(path: Path | None) -> Iterator[Callable[[Frame, Callable[[], Tensor]], None]]:
    """Yield what writes a frame, drawn only where there is a file; the first decides about the size."""
    if path is None:
        yield lambda frame, draw: None
        return
    av = _pyav()
    codec = next((name for name in _CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UsageError(
            f"{path}: this PyAV has no encoder of {' or '.join(_CODECS)}; add --no-drawings to write lines alone"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.pix_fmt, stream.codec_context.time_base, stream.time_base = "yuv420p", _CLOCK, _CLOCK
        last = -1

        def write(frame: Frame, draw: Callable[[], Tensor]) -> None:
            nonlocal last
            picture = _even(draw())
            if last < 0:
                stream.height, stream.width = picture.shape[1:]
            elif (stream.height, stream.width) != tuple(picture.shape[1:]):
                raise DataError(
                    f"frame {frame.number} has another size than the first; frames of a video have one size"
                )
            last = max(last + 1, round(frame.seconds / float(_CLOCK)))
            encoded = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            encoded.pts, encoded.time_base = last, _CLOCK
            container.mux(stream.encode(encoded))

        yield write
        if last >= 0:
            container.mux(stream.encode(None))


def _even(picture: Tensor) -> Tensor:
    """Repeat the last row or column where there is an odd number: colors of a video are those of squares of four pixels."""
    height, width = picture.shape[1:]
    padded = torch.nn.functional.pad(picture[None].float(), (0, width % 2, 0, height % 2), mode="replicate")
    return padded[0].to(picture.dtype)


def _upright(frame: Any) -> Tensor:
    """``[3, H, W]``, turned as the file says it is to be shown."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counterclockwise
    return torch.from_numpy(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))).permute(2, 0, 1)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError("videos need PyAV: pip install 'detpipe[video]'") from error
    logging.getLogger("libav").setLevel(logging.CRITICAL)  # its remarks on damaged frames
    return av


@contextmanager
def _named(av: Any, path: Path) -> Iterator[None]:
    """Let every error of the library name the file."""
    try:
        yield
    except av.FFmpegError as error:
        raise DataError(
            f"{path}: cannot be read as a video ({error.strerror}); is it damaged, or of a codec that PyAV lacks?"
        ) from error
