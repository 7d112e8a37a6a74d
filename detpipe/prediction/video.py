"""Videos in and out, frame by frame with its time, by PyAV (extra ``video``): a file, or a folder of frames.

Times are those that frames are to be shown at, so that a video whose rate changes stays in step. What was written is whole after
any stop: lines end with each frame, and the video is in fragments, each of which plays without what follows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detpipe.images import to_picture
from detpipe.pictures import visualize
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.lines import describe
from detpipe.prediction.tracking import Tracker
from detpipe.prediction.windows import Windows
from detpipe.support.errors import DataError, DownloadError, UsageError
from detpipe.types import Detection

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
            raise DataError(f"{path}: has no pictures; expected a video that is not cut off")
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
        if number >= 0 and _is_cut_off(container, stream, seconds, float(first or 0)):
            raise VideoEnd(f"{path}: is cut off after frame {number}, at {seconds:.2f} seconds")
        if number < 0:
            raise DataError(f"{path}: no picture of it can be decoded; the file is empty or cut off")


def _is_cut_off(container: Any, stream: Any, seconds: float, first: float) -> bool:
    """Whether a file that was read to its end, seconds after the first frame, has less in it than its header says."""
    if "mp4" in container.format.name:  # its header counts what is not to be shown too, but says where each frame lies
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0) > container.size
    duration = None if stream.duration is None else float(stream.duration * stream.time_base)
    if duration is None and container.duration is not None and len(container.streams) == 1:
        duration = container.duration / 1e6
    if duration is None:
        return False
    duration -= max(0.0, first)  # which some formats count from 0, and some from the first frame
    return seconds + max(1.0, 0.05 * duration) < duration


def read_frames(
    inputs: Sequence[ImageInput], rate: float, every: int, read: Callable[[ImageInput], Windows]
) -> Iterator[Frame]:
    """Read images, so many a second, as frames; a VideoEnd names the first that cannot be read."""
    for number in range(0, len(inputs), every):
        try:
            image = read(inputs[number]).whole()
        except (DataError, DownloadError, OSError) as error:
            raise VideoEnd(str(error)) from error
        yield Frame(number, number / rate, image)


def look_at_video(
    frames: Iterator[Frame],
    look: Callable[[Sequence[Frame]], Sequence[Detection]],
    lines: Path,
    video: Path | None,
    head: dict[str, Any],
    tracker: Tracker | None = None,
    batch_size: int = 1,
    tell: Callable[[int], None] = lambda count: None,
) -> tuple[int, str | None]:
    """Look at frames and write what is found, batch by batch.

    Args:
        frames: in order.
        look: N frames of one size -> what is found in each.
        lines: file for JSON lines: ``head``, and one of each frame, ``{"frame", "seconds", "width", "height", "detections"}``,
            those as of ``detpipe predict``, with a ``track``.
        video: file for the frames with what was found; None for none.
        head: ``{"file", "checkpoint", "class_names"}``.
        tracker: that follows objects; None for none.
        batch_size: frames that are looked at together.
        tell: called with the number of frames that were written.

    Returns:
        How many frames were written, and why it ended early; None if it did not.

    Raises:
        DataError: frames of several sizes are to be written as one video.
    """
    names, count, end = head["class_names"], 0, None
    lines.parent.mkdir(parents=True, exist_ok=True)
    with lines.open("w", encoding="utf-8") as stream, nullcontext() if video is None else _writing(video) as write:
        stream.write(json.dumps(head) + "\n")
        while end is None:
            batch: list[Frame] = []
            try:
                batch += islice(frames, batch_size)
            except VideoEnd as error:
                end = str(error)
            if not batch:
                break
            of_one_size = [list(some) for _, some in groupby(batch, key=lambda frame: frame.image.shape)]
            for frame, found in zip(batch, chain.from_iterable(map(look, of_one_size)), strict=True):
                record = _record(frame, found, names)
                tracks = None
                if tracker is not None:
                    tracks = tracker.follow(found, frame.seconds)
                    for row, track in zip(record["detections"], tracks, strict=True):
                        row["track"] = track
                if write is not None:
                    write(frame, _draw(frame.image, found, tracks, names))
                stream.write(json.dumps(record, allow_nan=False) + "\n")
                stream.flush()
                count += 1
                tell(count)
    return count, end


def _record(frame: Frame, found: Detection, names: Sequence[str]) -> dict[str, Any]:
    height, width = frame.image.shape[1:]
    sizes = {"seconds": round(frame.seconds, 6), "width": width, "height": height}
    return {"frame": frame.number, **sizes, "detections": describe(found, names)}


def _draw(image: Tensor, found: Detection, tracks: Sequence[int | None] | None, names: Sequence[str]) -> Tensor:
    """A frame with its detections, those of one track in one color and with its number."""
    labels, colors = found["labels"], None
    if tracks is not None:
        rows = list(zip(labels.tolist(), tracks, strict=True))
        names = [f"{names[label - 1]}{'' if track is None else f' #{track}'}" for label, track in rows]
        colors = [visualize.IGNORED_COLOR if track is None else visualize.class_color(track) for track in tracks]
        labels = torch.arange(1, len(names) + 1)
    return visualize.draw(to_picture(image), found["boxes"], labels, names, found["scores"], colors=colors, min_side=0)


@contextmanager
def _writing(path: Path) -> Iterator[Callable[[Frame, Tensor], None]]:
    """Yield what writes a frame as it was drawn; the first decides about the size."""
    av = _pyav()
    codec = next((name for name in _CODECS if name in av.codecs_available), None)
    if codec is None:
        raise UsageError(
            f"{path}: this PyAV has no encoder of {' or '.join(_CODECS)}; add --no-drawings to write lines alone"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.pix_fmt, stream.codec_context.time_base, stream.time_base = "yuv420p", _CLOCK, _CLOCK
        stream.codec_context.max_b_frames = 0  # frames that wait for later ones would move all to later times
        last = -1

        def write(frame: Frame, drawn: Tensor) -> None:
            nonlocal last
            picture = _even(drawn)
            height, width = picture.shape[1:]
            if last < 0:
                stream.height, stream.width = height, width
            elif (stream.height, stream.width) != (height, width):
                raise DataError(
                    f"{path}: frame {frame.number} has {width} x {height} pixels, the first has {stream.width} x {stream.height}, "
                    "but frames of a video have one size; give frames of one size, or add --no-drawings to write lines alone"
                )
            last = max(last + 1, round(frame.seconds / float(_CLOCK)))
            encoded = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            encoded.pts, encoded.time_base = last, _CLOCK
            container.mux(stream.encode(encoded))

        try:
            yield write
        finally:
            if last >= 0:  # the encoder holds some frames back
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
