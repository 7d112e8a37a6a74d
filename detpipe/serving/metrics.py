"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException

from detpipe.serving.batching import Answer


class Metrics:
    """Counters of one server."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("detpipe_requests", "Requests answered, by status", ["status"], registry=registry)
        self._seconds = Histogram("detpipe_request_seconds", "Seconds from head to answer", registry=registry)
        self._under_way = Gauge("detpipe_requests_under_way", "Requests that wait for an answer", registry=registry)
        self._model = Histogram("detpipe_model_seconds", "Seconds of the model for a batch", registry=registry)
        sizes = [1, 2, 4, 8, 16, 32, 64]
        self._sizes = Histogram("detpipe_batch_images", "Images of a batch", buckets=sizes, registry=registry)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count and time a request that is answered inside."""
        status, start = 500, time.perf_counter()
        with self._under_way.track_inprogress():
            try:
                yield
                status = 200
            except HTTPException as error:
                status = error.status_code
                raise
            finally:
                self.count(status)
                self._seconds.observe(time.perf_counter() - start)

    def count(self, status: int) -> None:
        """Count an answer."""
        self._requests.labels(status).inc()

    def count_batch(self, answer: Answer) -> None:
        """Count a run of the model."""
        self._model.observe(answer.seconds)
        self._sizes.observe(answer.batch)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
