"""A detector behind HTTP: an image in, detections as JSON out, with limits on everything that a client decides.

``POST /detect`` takes the bytes of an image file as the body, or a form with the field ``image`` and, for boxes to look at,
``boxes``, JSON ``[[x1, y1, x2, y2], ...]``. Nothing else of a request is read: no path or address in it is followed. Errors are
``{"error": TEXT}``. ``GET /health`` says whether it runs, ``GET /metrics`` is Prometheus' text.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor

from detpipe.datasets.decode import read_image
from detpipe.datasets.planes import MAX_PIXELS, without_advice
from detpipe.serving.batching import Answer, Batcher, ModelError, Served
from detpipe.serving.given_boxes import parse_boxes
from detpipe.serving.metrics import Metrics
from detpipe.serving.uploads import upload_size
from detpipe.support.errors import DataError
from detpipe.support.terminal import printable

GONE = 499  # the status that logs have for a client that closed the connection
_MOST_BOXES = 2**20  # bytes of their JSON
_DECODERS = 4  # threads


@dataclass(frozen=True)
class Limits:
    """What clients may ask for.

    Args:
        requests: under way at once, from the first byte of the body on; others are refused, so that nobody waits long.
        body: bytes of a request.
        pixels: of all images under way; a single one may have as many as `MAX_PIXELS`.
        seconds: for an answer, once the body has come.
        upload_seconds: for the body to come.

    Raises:
        ValueError: one is not positive.
    """

    requests: int = 64
    body: int = 16 * 2**20
    pixels: int = 2 * MAX_PIXELS
    seconds: float = 30.0
    upload_seconds: float = 10.0

    def __post_init__(self) -> None:
        if min(vars(self).values()) <= 0:
            raise ValueError(f"limits must be positive, got {self}")


class Service:
    """What is between a request and the model.

    Args:
        model: that answers.
        limits: of requests.
        batch_size: most images of one run of the model.
        metrics: that count its runs.
    """

    def __init__(self, model: Served, limits: Limits, batch_size: int, metrics: Metrics) -> None:
        self.model, self.limits = model, limits
        self.batcher = Batcher(model.detect, batch_size, metrics.count_batch)
        self.decoders, self.free = ThreadPoolExecutor(_DECODERS, "decode"), asyncio.Semaphore(_DECODERS)
        self.under_way, self.pixels = 0, 0

    async def detect(self, request: Request, score_threshold: float) -> dict[str, Any]:
        """Answer a request, or raise an HTTPException."""
        if self.under_way >= self.limits.requests:
            raise _busy(f"{self.under_way} requests are under way")
        self.under_way += 1
        held = 0
        try:
            content, text = await _parts(request, await _body(request, self.limits), self.model)
            start = time.perf_counter()
            async with asyncio.timeout(self.limits.seconds):
                size = await self._in_thread(upload_size, "image", content)
                held = self._reserve(size[0] * size[1])
                image, boxes = await self._in_thread(self._prepare, content, text, size)
                answer = await _unless_gone(request, self.batcher(image, boxes))
            return self._describe(answer, size, score_threshold, time.perf_counter() - start)
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {self.limits.seconds:g} seconds; try again later") from error
        except ClientDisconnect as error:
            raise HTTPException(GONE, "the client closed the connection") from error
        except ModelError as error:
            raise HTTPException(500, str(error)) from error
        except DataError as error:
            raise HTTPException(400, without_advice(error)) from error
        finally:
            self.under_way -= 1
            self.pixels -= held

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run in a thread. Who waits for a free one waits here, where it can give up, and not in the queue of the threads."""
        await self.free.acquire()
        loop, work = asyncio.get_running_loop(), self.decoders.submit(function, *arguments)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self.free.release))
        return await asyncio.wrap_future(work)

    def _reserve(self, pixels: int) -> int:
        """Count the pixels of an image that is to be decoded, unless others fill the memory that is meant for them."""
        if self.pixels and self.pixels + pixels > self.limits.pixels:
            raise _busy("images that are under way take up the memory for pixels")
        self.pixels += pixels
        return pixels

    def _prepare(self, content: bytes, text: str | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        boxes = None if text is None else parse_boxes(text, size)
        image = read_image("image", content, self.model.pixels)
        if boxes is None and self.model.make_boxes is not None:
            boxes = self.model.make_boxes(image)
        return image, boxes

    def _describe(self, answer: Answer, size: tuple[int, int], threshold: float, seconds: float) -> dict[str, Any]:
        keep = answer.found["scores"] >= threshold
        labels = answer.found["labels"][keep].tolist()
        return {
            "model": self.model.name,
            "width": size[1],
            "height": size[0],
            "boxes": answer.found["boxes"][keep].tolist(),
            "scores": answer.found["scores"][keep].tolist(),
            "labels": labels,
            "names": [self.model.class_names[label - 1] for label in labels],
            "seconds": {"total": seconds, "model": answer.seconds, "batch": answer.batch},
        }


def create_app(
    model: Served, limits: Limits | None = None, batch_size: int = 8, score_threshold: float = 0.5
) -> FastAPI:
    """Make the server, as an ASGI application.

    Args:
        model: that answers.
        limits: of requests; None for the defaults.
        batch_size: most images of one run of the model.
        score_threshold: where a request has no ``?score_threshold=``.

    Returns:
        The application, with the routes ``/detect``, ``/health`` and ``/metrics``.
    """
    metrics = Metrics()
    service = Service(model, limits or Limits(), batch_size, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batches = asyncio.create_task(service.batcher.run())
        yield
        app.state.batches.cancel()
        with suppress(asyncio.CancelledError):
            await app.state.batches
        service.decoders.shutdown()

    app = FastAPI(title="detpipe", lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages load others' scripts

    @app.post("/detect")
    async def detect(
        request: Request, score_threshold: Annotated[float, Query(ge=0, le=1)] = score_threshold
    ) -> JSONResponse:
        with metrics.request():
            given = [name for name, _ in request.query_params.multi_items()]
            if given not in ([], ["score_threshold"]):
                told = ", ".join(given)
                raise HTTPException(400, f"expected at most one score_threshold behind /detect?, got {told}")
            return JSONResponse(await service.detect(request, score_threshold))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        alive = not app.state.batches.done()
        told = {"status": "ok" if alive else "the thread of the model has ended", "model": model.name}
        told |= {"class_names": list(model.class_names), "under_way": service.under_way}
        return JSONResponse(told, 200 if alive else 500)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    _answer_errors(app, metrics)
    return app


def _answer_errors(app: FastAPI, metrics: Metrics) -> None:
    """Let errors be answered as JSON."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": printable(str(error.detail))}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        metrics.count(400)
        [first, *_] = error.errors()
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}, got {first['input']!r}"}, 400)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": f"the server failed: {type(error).__name__}; its log says more"}, 500)


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"{why}; try again later", {"Retry-After": "1"})


async def _body(request: Request, limits: Limits) -> bytes:
    """Read the body of a request while it is within its limits."""
    too_large = HTTPException(413, f"the body is larger than {limits.body} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.body:
        raise too_large
    content = io.BytesIO()
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for part in request.stream():
                if content.tell() + len(part) > limits.body:
                    raise too_large
                content.write(part)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not come within {limits.upload_seconds:g} seconds") from error
    return content.getvalue()


async def _parts(request: Request, body: bytes, model: Served) -> tuple[bytes, str | None]:
    """The image file and the JSON of the boxes of a request."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return body, None

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    expected = "expected a form with an image file as the field 'image', and at most the text 'boxes'"
    try:
        async with Request(request.scope, replay).form(max_files=1, max_fields=1, max_part_size=_MOST_BOXES) as form:
            fields = dict(form.multi_items())
            image, boxes = fields.pop("image", None), fields.pop("boxes", None)
            if not isinstance(image, UploadFile) or isinstance(boxes, UploadFile) or fields:
                raise HTTPException(400, expected)
            if boxes is not None and not model.takes_boxes:
                raise HTTPException(400, f"boxes: {model.name} finds its own and takes none")
            return await image.read(), boxes
    except UnicodeError as error:  # a charset in which its names cannot be read
        raise HTTPException(400, f"{expected}, in UTF-8") from error


async def _unless_gone(request: Request, answer: Awaitable[Answer]) -> Answer:
    """Wait for an answer while the client does."""
    waiting = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(request.receive())  # all of the body has come: now comes that the client has gone
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        gone.cancel()
