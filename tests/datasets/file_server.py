"""A web server on localhost that misbehaves as it is told, and an object store in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


@dataclass
class Behavior:
    """What the server does.

    Args:
        files: path -> content.
        ranges: whether parts are sent on request.
        cuts: for each request in turn, after how many bytes of it the connection is closed; None sends all.
        statuses: for each request in turn, a status that is answered instead; None answers normally.
        redirects: path -> address.
        length: the Content-Length that is announced instead of the true one; 0 for none.
        shift: that much of a part is left out, though it is announced.
        ended: nothing more is sent, but the connection stays open, in seconds.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    cuts: list[int | None] = field(default_factory=list)
    statuses: list[int | None] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    shift: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range, as they came
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    behavior: Behavior

    def do_GET(self) -> None:
        b = self.behavior
        asked = self.headers.get("Range")
        b.requests.append((self.path, asked))
        status = b.statuses.pop(0) if b.statuses else None
        if status is not None:
            return self.send_error(status)
        if self.path in b.redirects:
            self.send_response(302)
            self.send_header("Location", b.redirects[self.path])
            return self.end_headers()
        if self.path not in b.files:
            return self.send_error(404)
        return self._send(b, b.files[self.path], asked)

    def _send(self, b: Behavior, content: bytes, asked: str | None) -> None:
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and b.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + b.shift}-{len(content) - 1}/{len(content)}")
        if b.length != 0:
            self.send_header("Content-Length", str(b.length or len(content) - start))
        self.end_headers()
        cut = b.cuts.pop(0) if b.cuts else None
        self.wfile.write(content[start + b.shift :] if cut is None else content[start : start + cut])
        self.close_connection = True
        return None

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(**changes: Any) -> Iterator[Behavior]:
    """Serve files while the block runs; ``url`` is the address of the server, without a slash at its end."""
    behavior = Behavior(**changes)
    handler = type("Handler", (_Handler,), {"behavior": behavior})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    behavior.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield behavior
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Store(MemoryFileSystem):
    """What is in it, and where each file was opened."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012 (fsspec's own way)
    asked: list[str] = []  # noqa: RUF012
    errors: list[Exception] = []  # noqa: RUF012 (of the next times that a file is opened)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if options.get("mode", arguments[0] if arguments else "rb") == "rb":
            self.asked.append(path)
            if self.errors:
                raise self.errors.pop(0)
        return super()._open(path, *arguments, **options)


def bucket(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> type[_Store]:
    """Let ``s3://`` be a store in memory with these files."""
    kind = type("Store", (_Store,), {"store": {}, "pseudo_dirs": [""], "asked": [], "errors": []})
    monkeypatch.setitem(_registry, "s3", kind)
    for path, content in files.items():
        kind().pipe_file(path, content)
    return kind
