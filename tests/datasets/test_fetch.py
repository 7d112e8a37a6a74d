from __future__ import annotations

import hashlib
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detpipe.datasets import fetch as module
from detpipe.datasets.fetch import Patience, RemoteFile, fetch, read_url
from detpipe.support.errors import DownloadError
from detpipe.support.files import sole_writer

from .file_server import Behavior, bucket, serving

CONTENT = bytes(range(256)) * 4000  # about 1 MB, more than what a socket holds back
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(attempts=3, timeout=5, wait=0)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Behavior]:
    with serving(files={"/x/data.bin": CONTENT}) as behavior:
        yield behavior


def remote(server: Behavior, **changes: Any) -> RemoteFile:
    fields: dict[str, Any] = {"size": len(CONTENT), "algorithm": "sha256", "checksum": SHA256}
    return RemoteFile(**{"url": f"{server.url}/x/data.bin", **fields, **changes})


def partial(folder: Path, content: bytes) -> Path:
    """What an earlier run has left."""
    part = folder / "data.bin.part"
    part.write_bytes(content)
    return part


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_a_file_is_fetched_once(server: Behavior, tmp_path: Path, algorithm: Any) -> None:
    wanted = remote(server, algorithm=algorithm, checksum=hashlib.new(algorithm, CONTENT).hexdigest())
    path = fetch(wanted, tmp_path / "new", QUICK)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["data.bin"]
    assert fetch(wanted, tmp_path / "new", QUICK) == path
    assert server.requests == [("/x/data.bin", None)]


def test_an_empty_file(tmp_path: Path) -> None:
    with serving(files={"/x/data.bin": b""}) as server:
        path = fetch(remote(server, size=0, checksum=hashlib.sha256(b"").hexdigest()), tmp_path, QUICK)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (CONTENT[:300_000], ["bytes=300000-"]),
        (CONTENT, []),
        (CONTENT + b"more", [None]),  # nothing beyond the end is asked for
        (b"x" * 300_000, ["bytes=300000-", None]),  # the file has changed since
    ],
    ids=["beginning", "whole", "too long", "of another file"],
)
def test_what_an_earlier_run_left_is_used(server: Behavior, tmp_path: Path, part: bytes, asked: list) -> None:
    partial(tmp_path, part)
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT
    assert [found for _, found in server.requests] == asked
    assert names(tmp_path) == ["data.bin"]


def test_cut_connections_go_on_where_they_were(server: Behavior, tmp_path: Path) -> None:
    server.cuts = [100_000, 0, 200_000, 0, 0, None]  # an attempt that brings something begins the count anew
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, *["bytes=100000-"] * 2, *["bytes=300000-"] * 3]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 400_000), max_size=6), st.booleans())
def test_any_cuts_give_the_same_file(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], ranges: bool) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    with serving(files={"/x/data.bin": CONTENT}, cuts=[*cuts, None], ranges=ranges) as server:
        assert fetch(remote(server), folder, Patience(attempts=9, wait=0)).read_bytes() == CONTENT
    assert names(folder) == ["data.bin"]


def test_after_too_many_failures_what_arrived_is_kept(server: Behavior, tmp_path: Path) -> None:
    server.cuts = [100_000, 0, 0, 0]
    with pytest.raises(
        DownloadError, match=r"the connection was closed early; 100000 of 1024000 bytes are there: check"
    ):
        fetch(remote(server), tmp_path, QUICK)
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:100_000]
    server.cuts = []
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again(server: Behavior, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT
    server.statuses = [503, 500, 502]
    with pytest.raises(DownloadError, match="the server answers 502 Bad Gateway; 0 of 1024000 bytes"):
        fetch(remote(server), tmp_path / "other", QUICK)


ALTERED, CUTS = CONTENT[:-1] + b"?", [1000 + 7 * (k % 3) for k in range(100)]
WRONG = f"sha256 expected {SHA256}, found [0-9a-f]{{64}}; it is dropped"
# what the server does, how many bytes of the file an earlier run has left, the error, what is asked for first, what is left
REFUSED: dict[str, tuple[dict[str, Any], int, str, list[str | None], list[str]]] = {
    "another file": ({"files": {"/x/data.bin": ALTERED}}, 0, WRONG, [None], []),
    "pieces of another file": ({"files": {"/x/data.bin": ALTERED}}, 300_000, WRONG, ["bytes=300000-", None], []),
    "shorter": ({"files": {"/x/data.bin": CONTENT[:1000]}}, 2000, "expected 1024000 bytes, but the server offers 1000 of type None",
                ["bytes=2000-", None], ["data.bin.part"]),  # 416, then from the beginning
    "part of another place": ({"shift": 5}, 300_000, "does not go on where the file was cut off", ["bytes=300000-", None],
                              ["data.bin.part"]),  # the answers from the beginning lack 5 bytes too
    "more": ({"files": {"/x/data.bin": CONTENT + b"more"}, "length": 0}, 0, "sends more than the expected 1024000 bytes", [None],
             ["data.bin.part"]),
    "missing": ({"files": {}}, 0, r"/x/data\.bin: the server answers 404 Not Found; the file may have moved", [None],
                ["data.bin.part"]),
    "cut for ever": ({"ranges": False, "cuts": CUTS}, 0, "closed early", [None, "bytes=1000-"], ["data.bin.part"]),
    "leads to a store": ({"redirects": {"/x/data.bin": "s3://bucket/x/data.bin"}}, 0, r"only http://|302", [None],
                         ["data.bin.part"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_the_file_is_refused(server: Behavior, tmp_path: Path, case: str) -> None:
    changes, there, message, asked, left = REFUSED[case]
    for name, value in changes.items():
        setattr(server, name, value)
    if there:
        partial(tmp_path, CONTENT[:there])
    with pytest.raises(DownloadError, match=message):
        fetch(remote(server), tmp_path, QUICK)
    assert [found for _, found in server.requests][: len(asked)] == asked
    assert len(server.requests) < 12
    assert names(tmp_path) == left


def test_a_page_in_place_of_the_file_does_not_cost_what_is_there(server: Behavior, tmp_path: Path) -> None:
    server.files["/x/data.bin"], server.ranges = b"<html>log in</html>", False
    part = partial(tmp_path, CONTENT[:300_000])
    for length, shown in ((None, "19"), (0, "an unknown number")):
        server.length = length
        with pytest.raises(DownloadError, match=f"expected 1024000 bytes, but the server offers {shown} of type"):
            fetch(remote(server), tmp_path, QUICK)
        assert part.read_bytes() == CONTENT[:300_000]


def test_a_file_that_is_there_but_another_is_named_and_left_alone(server: Behavior, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    for content, message in ((b"short", "expected 1024000 bytes, found 5; remove it"), (CONTENT[::-1], "remove it")):
        path.write_bytes(content)
        with pytest.raises(DownloadError, match=message):
            fetch(remote(server), tmp_path, QUICK)
        assert path.read_bytes() == content


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:  # bound, but nobody listens
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/data.bin"
        with pytest.raises(
            DownloadError, match=r"cannot be reached \(.*refused\); 0 of 7 bytes are there: check the network"
        ):
            fetch(RemoteFile(url, 7, "sha256", SHA256), tmp_path, QUICK)

    def no_names(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(DownloadError, match=r"cannot be reached .*Name or service not known"):
        fetch(RemoteFile("http://example.invalid/data.bin", 7, "sha256", SHA256), tmp_path, QUICK)


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/data.bin"
        with pytest.raises(DownloadError, match=r"cannot be reached \(timed out\)"):
            fetch(RemoteFile(url, 7, "sha256", SHA256), tmp_path, Patience(attempts=2, timeout=0.1, wait=0))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/data.bin", "data:,x", "http:///data.bin", "data.bin"]
)
def test_only_web_addresses_are_fetched(server: Behavior, tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="only http:// and https:// addresses are fetched"):
        fetch(remote(server, url=url), tmp_path, QUICK)
    server.redirects = {"/x/data.bin": url}
    if "://" in url and not url.startswith("http:///"):
        with pytest.raises(DownloadError, match=r"only http://|302"):
            fetch(remote(server), tmp_path, QUICK)
    assert names(tmp_path) in ([], ["data.bin.part"])


def test_redirects_are_followed_but_not_in_circles(server: Behavior, tmp_path: Path) -> None:
    server.redirects = {"/a/data.bin": f"{server.url}/b", "/b": "/x/data.bin"}
    partial(tmp_path, CONTENT[:1000])
    assert fetch(remote(server, url=f"{server.url}/a/data.bin"), tmp_path, QUICK).read_bytes() == CONTENT
    assert server.requests[-1] == ("/x/data.bin", "bytes=1000-")
    server.redirects = {"/a/data.bin": "/a/data.bin"}
    with pytest.raises(DownloadError, match="the server answers 302 The HTTP server returned a redirect error"):
        fetch(remote(server, url=f"{server.url}/a/data.bin"), tmp_path / "other", QUICK)
    server.redirects = {f"/{k}/data.bin": f"/{k + 1}/data.bin" for k in range(20)}
    server.requests.clear()
    with pytest.raises(DownloadError, match="the server answers 302"):
        fetch(remote(server, url=f"{server.url}/0/data.bin"), tmp_path / "other", QUICK)
    assert len(server.requests) <= 6


def test_too_little_space_is_known_before_anything_is_asked(
    server: Behavior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 900_000, 900_000))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"data\.bin: needs 0\.00 GB, but .* left; make room"):
        fetch(remote(server), tmp_path, QUICK)
    assert server.requests == []
    partial(tmp_path, CONTENT[:300_000])  # what is missing fits
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT


def test_a_disk_that_gets_full_keeps_what_arrived(server: Behavior, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(DownloadError, match=r"data\.bin\.part: the disk is full; make room and run it again"):
            fetch(remote(server), tmp_path, QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    arrived = (tmp_path / "data.bin.part").read_bytes()
    assert CONTENT.startswith(arrived)
    assert fetch(remote(server), tmp_path, QUICK).read_bytes() == CONTENT


def test_two_processes_do_not_write_the_same_file(server: Behavior, tmp_path: Path) -> None:
    held = sole_writer(tmp_path / "data.bin.part", DownloadError("held"))
    with held, pytest.raises(DownloadError, match="another process is fetching"):
        fetch(remote(server), tmp_path, QUICK)


def test_waits_get_longer(server: Behavior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.statuses = [503] * 4
    fetch(remote(server), tmp_path, Patience(attempts=5, wait=2))
    assert waits == [2, 4, 8, 16]


STORED = RemoteFile("s3://bucket/x/data.bin", len(CONTENT), "sha256", SHA256)


def test_a_file_of_an_object_store_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bucket(monkeypatch, {"bucket/x/data.bin": CONTENT})
    store.errors = [RuntimeError("try again"), ConnectionError("gone")]
    partial(tmp_path, CONTENT[:300_000])
    assert fetch(STORED, tmp_path, QUICK).read_bytes() == CONTENT
    assert store.asked == ["/bucket/x/data.bin"] * 3
    assert names(tmp_path) == ["data.bin"]
    (tmp_path / "other").mkdir()
    partial(tmp_path / "other", b"x" * 300_000)
    assert fetch(STORED, tmp_path / "other", QUICK).read_bytes() == CONTENT  # the first piece was of another file
    assert read_url(STORED.url, len(CONTENT), "") == CONTENT
    with pytest.raises(DownloadError, match=r"more than 5 bytes"):
        read_url(STORED.url, 5, "")


def test_faults_of_an_object_store_name_the_file_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bucket(monkeypatch, {"bucket/x/data.bin": CONTENT[:1000]})
    cases: list[tuple[list[Exception], str]] = [
        ([], r"s3://bucket/x/data\.bin: expected 1024000 bytes, but the server offers 1000 of type a stored file"),
        ([FileNotFoundError("x")], r"s3://bucket/x/data\.bin: there is no such file; see its home page"),
        ([PermissionError("Forbidden")], r"data\.bin: may not be read \(Forbidden\); s3fs found other credentials"),
        ([RuntimeError("no\nroute")] * 3, r"cannot be read \(RuntimeError: no route\); 0 of 1024000 bytes are there"),
        ([ImportError("x")], r"needs a package that is not installed: pip install s3fs"),
    ]
    for errors, message in cases:
        store.errors = errors
        with pytest.raises(DownloadError, match=message):
            fetch(STORED, tmp_path, QUICK)
        assert store.errors == []
