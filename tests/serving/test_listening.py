from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'detpipe[serve]'")

from detpipe.serving.listening import address_of, listen
from detpipe.support.errors import UsageError

PROGRAM = """
import asyncio
from detpipe.serving import listening

listening.HEAD_SECONDS = 0.3

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        print("ended", flush=True)
        return await send({"type": "lifespan.shutdown.complete"})
    print("asked", flush=True)
    await asyncio.sleep(float(scope["query_string"] or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"done"})

with listening.listen("127.0.0.1", 0) as listener:
    print(listener.getsockname()[1], flush=True)
    listening.run(app, listener, 5)
print("after", flush=True)
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], int]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def connect(port: int) -> socket.socket:
    end = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            assert time.monotonic() < end


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


def test_a_signal_lets_what_is_under_way_be_answered(server):
    process, port = server
    with connect(port) as connection:
        connection.sendall(b"GET /?0.5 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        assert read_all(connection).endswith(b"done")
    assert process.wait(20) == 0
    assert process.stdout.read() == "ended\nafter\n"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost", b""),  # a head that never ends
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nabc", b"done"),  # what nobody reads any more
    ],
)
def test_connections_that_dawdle_are_closed(server, sent, answered):
    _, port = server
    with connect(port) as connection:
        if sent:
            connection.sendall(sent[:-1])
            time.sleep(0.1)
            connection.sendall(sent[-1:])
        assert read_all(connection).endswith(answered)


def test_where_nobody_can_listen():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(
            UsageError, match=f"cannot listen on 127.0.0.1, port {port} .*give another --host or --port"
        ):
            listen("127.0.0.1", port)
    for host in ("nowhere.invalid", "a..b"):
        with pytest.raises(UsageError, match=f"cannot listen on {re.escape(host)}, port 80 .*give another --host"):
            listen(host, 80)
    with pytest.raises(UsageError, match=r"--port must be in 0..65535, got 70000"):
        listen("127.0.0.1", 70000)
