"""Requests that wait are answered together: one thread runs the model on what came in while it ran, and never waits for more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from detpipe.support.errors import DataError
from detpipe.types import RGB, Detection, PixelType, Target

Detect = Callable[[Sequence[Tensor], Sequence[Target] | None], list[Detection]]


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Args:
        name: what it is called in answers.
        class_names: K, the name of label 1 first.
        detect: N images ``[C, H, W]`` of one size, and N targets with ``proposals`` ``[P_i, 4]`` xyxy in their pixels, or None for
            the model's own, to N detections in pixels of the images.
        pixels: what images are read as.
        takes_boxes: whether boxes may be given.
        make_boxes: ``[C, H, W]`` to the boxes of an image that comes without, ``[P, 4]``; None where the model finds its own.
    """

    name: str
    class_names: tuple[str, ...]
    detect: Detect
    pixels: PixelType = RGB
    takes_boxes: bool = True
    make_boxes: Callable[[Tensor], Tensor] | None = None


class ModelError(Exception):
    """The model failed on an image; the log says how."""


class Answer(NamedTuple):
    """What a request gets."""

    found: Detection
    seconds: float  # of the model, for its batch
    batch: int  # images in it


@dataclass(frozen=True, eq=False)
class _Job:
    image: Tensor  # [C, H, W]
    boxes: Tensor | None  # [P, 4]
    answer: asyncio.Future[Answer]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the images of a batch have in common: only those of one size, so that padding never decides about a detection."""
        return self.image.shape, self.boxes is None


class Batcher:
    """Run a model on batches of what waits, in one thread, first come, first served.

    Args:
        detect: as of :class:`Served`.
        size: most images of a batch.
        on_batch: told the answer of each batch, such as to count it.
    """

    def __init__(self, detect: Detect, size: int, on_batch: Callable[[Answer], None] = lambda answer: None) -> None:
        self._detect, self._size, self._on_batch = detect, size, on_batch
        self._waiting: list[_Job] = []
        self._arrived = asyncio.Event()

    async def __call__(self, image: Tensor, boxes: Tensor | None) -> Answer:
        """Wait for the answer to an image ``[C, H, W]`` and boxes ``[P, 4]``; who is cancelled before its turn is left out."""
        job = _Job(image, boxes, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        try:
            return await job.answer
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self) -> None:
        """Answer until cancelled; a batch that is being computed is ended first."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                await self._arrived.wait()
                if not self._waiting:
                    self._arrived.clear()
                    continue
                jobs = [job for job in self._waiting if job.kind == self._waiting[0].kind][: self._size]
                self._waiting = [job for job in self._waiting if job not in jobs]
                for job, answer in zip(jobs, await loop.run_in_executor(thread, self._answer, jobs), strict=True):
                    if job.answer.done():
                        continue
                    if isinstance(answer, Answer):
                        job.answer.set_result(answer)
                    else:
                        job.answer.set_exception(answer)

    def _answer(self, jobs: Sequence[_Job]) -> list[Answer | Exception]:
        """Run the model, and where it fails, on each image alone: what is wrong with one must not befall the others."""
        start = time.perf_counter()
        try:
            targets: list[Target] = [{"proposals": job.boxes} for job in jobs if job.boxes is not None]
            found = self._detect([job.image for job in jobs], targets or None)
        except Exception as error:
            if len(jobs) > 1:
                return [answer for job in jobs for answer in self._answer([job])]
            if isinstance(error, DataError):
                return [error]
            logging.getLogger(__name__).exception("the model failed on an image %s", tuple(jobs[0].image.shape))
            return [ModelError(f"the model failed: {type(error).__name__}; the log of the server says more")]
        seconds = time.perf_counter() - start
        answers = [Answer(one, seconds, len(jobs)) for one in found]
        self._on_batch(answers[0])
        return list[Answer | Exception](answers)
