"""Pictures of a camera as they come, by OpenCV: one of this machine, or one that streams over a network."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Thread
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.video import Frame, VideoEnd
from detpipe.support.errors import DataError

_PATIENCE = 10_000  # milliseconds to connect, and to wait for a picture


def read_camera(source: ImageInput, every: int = 1) -> Iterator[Frame]:
    """Read what a camera shows: always its newest picture, so that who is slower than the camera misses some and is not late.

    Args:
        source: one that `is_camera`.
        every: pictures of the camera from one frame to the next, at least.

    Yields:
        Frames, ``[3, H, W]`` uint8 RGB, numbered by the pictures of the camera, in seconds after the first.

    Raises:
        DataError: it cannot be opened.
        VideoEnd: it gives no more pictures.
    """
    with _opened(source) as capture:
        newest = _Newest(capture)
        reader = Thread(target=newest.follow, daemon=True)
        reader.start()
        number, first = -every, None
        try:
            while (found := newest.after(number + every)) is not None:
                number, moment, picture = found
                first = moment if first is None else first
                image = np.ascontiguousarray(picture[:, :, ::-1])
                yield Frame(number, moment - first, torch.from_numpy(image).permute(2, 0, 1))
            if first is None:
                raise DataError(f"{source.name}: gives no picture; is it in use by another program?")
            raise VideoEnd(f"{source.name}: gives no picture after frame {newest.number}")
        finally:
            newest.wanted = False
            reader.join()


class _Newest:
    """The newest picture of a camera."""

    def __init__(self, capture: Any) -> None:
        self.wanted, self.number = True, -1
        self._capture, self._changed, self._ended = capture, Condition(), False
        self._moment, self._picture = 0.0, np.zeros(0, np.uint8)

    def follow(self) -> None:
        """Read pictures, in a thread, until there are no more or none are wanted."""
        try:
            while self.wanted:
                is_read, picture = self._capture.read()
                if not is_read:
                    return
                with self._changed:
                    self.number, self._moment, self._picture = self.number + 1, time.monotonic(), picture
                    self._changed.notify_all()
        finally:  # by an error too, or who waits would wait for ever
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def after(self, number: int) -> tuple[int, float, npt.NDArray[np.uint8]] | None:
        """Wait for a picture of this number or a later one: its number, time and BGR values; None if none will come."""
        with self._changed:
            while self.number < number and not self._ended:
                self._changed.wait(0.5)  # so that an interrupt is heard
            return (self.number, self._moment, self._picture) if self.number >= number else None


@contextmanager
def _opened(source: ImageInput) -> Iterator[Any]:
    scheme, _, rest = (source.url or "").partition(":")
    is_local = scheme == "camera"
    logging: Any = cv2.utils.logging
    before = logging.setLogLevel(logging.LOG_LEVEL_SILENT)  # remarks on what cannot be opened
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # and those of FFmpeg
    try:
        if is_local:
            capture = cv2.VideoCapture(int(rest))
        else:
            limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE)
            capture = cv2.VideoCapture(f"{scheme}:{rest}", cv2.CAP_FFMPEG, limits)
    finally:
        logging.setLogLevel(before)
    try:
        if not capture.isOpened():
            hint = (
                "it connected, and may this user open it?" if is_local else "its address right, and can it be reached?"
            )
            raise DataError(f"{source.name}: this camera cannot be opened; is {hint}")
        yield capture
    finally:
        capture.release()
