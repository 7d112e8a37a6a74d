from __future__ import annotations

import asyncio
import gc
import json
import struct
import threading
import weakref
import zlib
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'detpipe[serve]'")

from fastapi.testclient import TestClient

from detpipe.serving.metrics import Metrics
from detpipe.serving.server import Limits, Service, create_app
from serving.fake_model import FAILS, REFUSED, FakeModel, picture, served, wait_until


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def client(model) -> Iterator[TestClient]:
    limits = Limits(requests=5, body=4000, pixels=5000, seconds=15)
    with TestClient(create_app(served(model), limits, batch_size=3, score_threshold=0.5)) as opened:
        yield opened


FORM = b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n--x--\r\n'


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_picture_is_answered_with_boxes_scores_labels_and_names(client):
    answer = client.post("/detect", content=picture(30, 20, "JPEG"))
    assert answer.status_code == 200
    told = answer.json()
    assert (told["width"], told["height"], told["model"]) == (30, 20, "fake")
    assert told["boxes"] == [[0, 0, 30, 20]]
    assert told["scores"] == [pytest.approx(0.9)]
    assert (told["labels"], told["names"]) == ([1], ["<cat>"])
    assert 0 <= told["seconds"]["model"] <= told["seconds"]["total"]


def test_boxes_of_a_form_are_looked_at_and_the_threshold_leaves_some_out(client):
    sent = [[1, 2, 9, 9], [3, 3, 10.5, 12]]
    form: dict[str, Any] = {"files": {"image": ("../../etc/passwd", picture())}, "data": {"boxes": json.dumps(sent)}}
    assert client.post("/detect?score_threshold=0.2", **form).json()["boxes"] == sent
    assert client.post("/detect", **form).json()["boxes"] == sent[:1]
    assert client.post("/detect", files={"image": picture()}, data={"boxes": "[]"}).json()["boxes"] == []


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b""}, 400, "cannot be read as an image (not a known image format, or empty)"),
        ({"content": b"/etc/passwd"}, 400, "not a known image format"),
        ({"json": {"url": "http://127.0.0.1/x.png"}}, 400, "not a known image format"),
        ({"content": picture(kind="JPEG")[:200]}, 400, "image: "),
        ({"content": bomb(100_000, 100_000)}, 400, "image: "),
        ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"}, 400, "EPS are not taken"),
        ({"content": bytes(5000)}, 413, "larger than 4000 bytes"),
        ({"content": iter([bytes(3000), bytes(3000)])}, 413, "larger than 4000 bytes"),
        ({"content": picture(), "params": {"score_threshold": 2}}, 400, "score_threshold: "),
        ({"content": picture(), "params": {"score_threshold": "nan"}}, 400, "score_threshold: "),
        ({"content": picture(), "params": {"boxes": "[[0, 0, 4, 4]]"}}, 400, "one score_threshold behind /detect?, got boxes"),
        ({"content": picture(), "params": {"score_threshold": [0.1, 0.9]}}, 400, "got score_threshold, score_threshold"),
        ({"files": {"other": picture()}}, 400, "the field 'image'"),
        ({"files": [("image", picture()), ("image", picture())]}, 400, "Too many files"),
        ({"data": {"image": "/etc/passwd"}, "files": {"other": b""}}, 400, "the field 'image'"),
        ({"files": {"image": picture()}, "data": {"boxes": "[[0, 0, 4]"}}, 400, "boxes: line 1"),
        ({"files": {"image": picture()}, "data": {"boxes": "[[0, 0, 4]]"}}, 400, "boxes must be [P, 4]"),
        ({"files": {"image": picture()}, "data": {"boxes": "[[0, 0, NaN, 4]]"}}, 400, "not a number in JSON"),
        ({"files": {"image": picture()}, "data": {"boxes": "[[0, 0, 1, 1], [0, 0, 99, 4]]"}}, 400, "box 1 is [0.0, 0.0, 99.0"),
        ({"files": {"image": picture()}, "data": {"boxes": "[[5, 0, 1, 4]]"}}, 400, "x2 is less than x1"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": FORM, "headers": {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}}, 400, "in UTF-8"),
        ({"content": FORM, "headers": {"Content-Type": "Multipart/Form-Data; boundary=x"}}, 400, "the field 'image'"),
        ({"content": picture(REFUSED)}, 400, "image: too wide"),
        ({"content": picture(FAILS, color="white")}, 500, "the model failed: RuntimeError"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line(client, request_, status, message):
    answer = client.post("/detect", **request_)
    told = answer.json()
    assert (answer.status_code, list(told)) == (status, ["error"])
    assert message in told["error"]
    assert "\n" not in told["error"]
    assert "secret" not in told["error"]
    assert "on_bad" not in told["error"]  # advice for data sets


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/detect", 405), ("GET", "/docs", 404), ("POST", "/", 404)]
)
def test_other_addresses_are_none(client, method, path, status):
    answer = client.request(method, path)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run in a thread of its own: in this one the loop of a browser may be running, for tests that need one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


def post(limits: Limits, model: FakeModel, parts: list[bytes], pause: float) -> tuple[int, dict[str, Any]] | None:
    """Send a body in parts, then pause, then hang up; what was answered, if anything."""
    messages: list[Any] = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
    messages.append({"type": "http.request", "body": parts[-1], "more_body": pause > 0})
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(pause)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def call() -> None:
        app = create_app(served(model), limits)
        scope = {"type": "http", "method": "POST", "path": "/detect", "headers": [], "query_string": b""}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
            model.may.set()

    run(call())
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_slow_upload_is_refused():
    found = post(Limits(upload_seconds=0.1), FakeModel(), [picture()[:10], picture()[10:]], pause=5)
    assert found == (408, {"error": "the body did not come within 0.1 seconds"})


def test_nobody_waits_for_a_client_that_has_gone():
    model = FakeModel()
    model.may.clear()
    assert post(Limits(), model, [picture()], pause=0) == (499, {"error": "the client closed the connection"})
    assert post(Limits(), FakeModel(), [picture()[:10]], pause=0.01) == (
        499,
        {"error": "the client closed the connection"},
    )


def test_what_waits_is_answered_together_and_what_is_too_much_is_refused(client, model):
    before = len(model.batches)
    model.may.clear()
    try:
        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(client.post, "/detect", content=picture())
            wait_until(lambda: client.get("/health").json()["under_way"] == 1)
            others = [
                pool.submit(client.post, "/detect", content=picture(*size)) for size in [(30, 20), (30, 20), (9, 9)]
            ]
            wait_until(lambda: client.get("/health").json()["under_way"] == 4)
            large = client.post("/detect", content=picture(70, 70))
            assert (large.status_code, large.headers["retry-after"]) == (503, "1")
            assert "memory for pixels" in large.json()["error"]
            last = pool.submit(client.post, "/detect", content=picture())
            wait_until(lambda: client.get("/health").json()["under_way"] == 5)
            full = client.post("/detect", content=picture())
            assert (full.status_code, "5 requests are under way" in full.json()["error"]) == (503, True)
            model.may.set()
            sizes = [(one.result().json()["width"], one.result().json()["height"]) for one in [first, *others, last]]
        assert sizes == [(30, 20), (30, 20), (30, 20), (9, 9), (30, 20)]
        batches = model.batches[before:]
        assert sum(batches) == 5
        assert max(batches) > 1
    finally:
        model.may.set()


def test_one_bad_image_does_not_harm_its_neighbors(client, model):
    model.may.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(client.post, "/detect", content=picture(FAILS, color=color))
            for color in ("black", "white", "black")
        ]
        wait_until(lambda: client.get("/health").json()["under_way"] == 3)
        model.may.set()
        assert [answer.result().status_code for answer in answers] == [200, 500, 200]


def test_an_answer_that_takes_too_long_is_given_up(caplog):
    model = FakeModel()
    model.may.clear()
    with TestClient(create_app(served(model), Limits(seconds=0.1))) as client:
        answers = [client.post("/detect", content=picture()) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [504, 504]
        assert answers[0].json() == {"error": "no answer within 0.1 seconds; try again later"}
        model.may.set()
        wait_until(lambda: model.batches)
        assert client.head("/health").status_code == 200
        assert client.get("/health").json()["under_way"] == 0
    assert model.batches == [1]  # nobody waited for the second one any more


def test_what_nobody_waits_for_any_more_is_kept_in_no_queue():
    async def give_up() -> None:
        service, blocked = Service(served(FakeModel()), Limits(), 1, Metrics()), threading.Event()
        image = torch.zeros(3, 9, 9)
        kept = weakref.ref(image)
        waiting = [service._in_thread(blocked.wait) for _ in range(6)] + [service.batcher(image, None)]
        del image
        _, pending = await asyncio.wait([asyncio.ensure_future(one) for one in waiting], timeout=0.1)
        assert len(pending) == 7
        for one in pending:
            one.cancel()
        await asyncio.wait(pending)
        del waiting, pending, one
        gc.collect()
        assert kept() is None
        assert service.decoders._work_queue.qsize() == 0
        blocked.set()
        assert await service._in_thread(int) == 0
        service.decoders.shutdown()

    run(give_up())


def test_a_model_that_takes_no_boxes_and_one_whose_boxes_are_made():
    with TestClient(create_app(served(FakeModel(), takes_boxes=False))) as client:
        answer = client.post("/detect", files={"image": picture()}, data={"boxes": "[]"})
        assert (answer.status_code, answer.json()["error"]) == (400, "boxes: fake finds its own and takes none")

    def make(image: torch.Tensor) -> torch.Tensor:
        if image.shape[2] == FAILS:
            raise ZeroDivisionError
        return torch.tensor([[1.0, 1.0, 5.0, float(image.shape[1])]])

    app = create_app(served(FakeModel(), make_boxes=make))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/detect", content=picture()).json()["boxes"] == [[1, 1, 5, 20]]
        answer = client.post("/detect", content=picture(FAILS))
        assert (answer.status_code, answer.json()["error"]) == (
            500,
            "the server failed: ZeroDivisionError; its log says more",
        )


def test_metrics_count_what_was_answered():
    with TestClient(create_app(served(FakeModel()))) as client:
        for content in (picture(), picture(), b""):
            client.post("/detect", content=content)
        client.post("/detect?score_threshold=2", content=picture())
        text = client.get("/metrics").text
    for line in (
        'detpipe_requests_total{status="200"} 2.0',
        'detpipe_requests_total{status="400"} 2.0',
        *("detpipe_batch_images_sum 2.0", "detpipe_requests_under_way 0.0", "detpipe_request_seconds_count 3.0"),
    ):
        assert line in text.splitlines()


def test_limits_are_positive():
    with pytest.raises(ValueError, match="positive"):
        Limits(seconds=0)
