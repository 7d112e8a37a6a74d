"""Listening for requests until SIGTERM or Ctrl+C: what is under way is answered, and the process ends by itself.

uvicorn waits for ever for the head of a request, and for the rest of a body that was answered before it ended; here both have a
time.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from detpipe.support.errors import UsageError

HEAD_SECONDS = 10.0
_CONNECTIONS = 1024


class _TimedProtocol(H11Protocol):
    """A connection that is closed when the head of a request, or what nobody reads any more, takes too long."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait(True)

    def data_received(self, data: bytes) -> None:
        """Take data, and see what the client is at."""
        super().data_received(data)
        in_head = self.conn.their_state is h11.IDLE
        in_answered_body = self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        self._wait(in_head or in_answered_body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._wait(False)
        super().connection_lost(exc)

    def _wait(self, slow: bool) -> None:
        """Start the clock where it does not run yet, or stop it."""
        if slow and self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not slow and self._late is not None:
            self._late.cancel()
            self._late = None


def listen(host: str, port: int) -> socket.socket:
    """Open a socket; port 0 takes a free one; a UsageError if it cannot be had."""
    if not 0 <= port < 2**16:
        raise UsageError(f"--port must be in 0..65535, got {port}")
    try:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # a name that is none
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}, port {port} ({reason}); give another --host or --port") from error


def address_of(listener: socket.socket) -> str:
    """The web address of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Callable[..., Any], stop_seconds: float) -> uvicorn.Server:
    """Make what answers requests to an ASGI application; when it is stopped, requests are dropped after ``stop_seconds``."""
    config = uvicorn.Config(
        app,
        http=_TimedProtocol,
        ws="none",
        limit_concurrency=_CONNECTIONS,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(stop_seconds),
    )
    return uvicorn.Server(config)


def run(app: Callable[..., Any], listener: socket.socket, stop_seconds: float) -> None:
    """Answer requests on a socket, which is closed in the end, until SIGTERM or Ctrl+C; arguments as of :func:`make_server`."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {one: signal.signal(one, lambda *_: None) for one in signals}  # uvicorn raises them again in the end
    try:
        make_server(app, stop_seconds).run([listener])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
