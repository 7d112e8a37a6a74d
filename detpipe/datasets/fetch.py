"""Fetch a file of known size and checksum over HTTP, and go on where an earlier attempt was cut off.

What has arrived lies in ``NAME.part`` beside the final name, with ``NAME.part.json``, which says of which file it is the
beginning: the validators (ETag, Last-Modified) that the server gave for it. A file appears under its final name only when its
size and checksum are those that are known. Nothing but http and https is spoken, redirects included.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Literal, cast
from urllib.parse import urlsplit

from tqdm import tqdm

from detpipe.errors import DownloadError

_CHUNK = 1 << 20  # bytes
_REDIRECTS = 5
_FOR_A_WHILE = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        url: where it is.
        size: in bytes.
        algorithm: of the checksum.
        checksum: in hexadecimal digits.
    """

    url: str
    size: int
    algorithm: Literal["md5", "sha256"]
    checksum: str

    @property
    def name(self) -> str:
        """What it is called."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Args:
        attempts: in a row without a byte.
        timeout: seconds without a byte, after which an attempt has failed.
        wait: seconds before the second attempt; twice as many before each further one.
    """

    attempts: int = 5
    timeout: float = 30.0
    wait: float = 2.0


_USUAL = Patience()


class _CutOffError(Exception):
    """An attempt ended early; what arrived is kept, and another attempt may help."""


class _AnotherFileError(Exception):
    """What the server has is not the file whose beginning is there."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS
    max_repeats = _REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl)
        return super().redirect_request(req, fp, code, msg, cast(Any, headers), newurl)


def check_url(url: str) -> None:
    """Refuse what is not a web address.

    Raises:
        DownloadError: another scheme than http or https, or no server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"{url}: only http:// and https:// addresses are fetched")


def fetch(remote: RemoteFile, folder: str | Path, patience: Patience = _USUAL) -> Path:
    """Fetch a file, or the rest of it, unless it is there already.

    Args:
        remote: the file.
        folder: where it goes.
        patience: how long a server is waited for.

    Returns:
        Its path.

    Raises:
        DownloadError: no network, no such file, another file than the one that is known, or no space on the disk; what has
            arrived is kept for the next attempt unless it is of another file.
    """
    check_url(remote.url)
    path = Path(folder) / remote.name
    if path.exists():
        verify(path, remote, "remove it, and it is fetched again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _locked(part) as stream:
        missing = remote.size - os.fstat(stream.fileno()).st_size
        check_space(path.parent, missing, str(path))
        _receive(stream, remote, part, patience)
        stream.flush()
        os.fsync(stream.fileno())
        try:
            verify(part, remote, "it is dropped; a proxy or the server may have altered it: try again")
        except DownloadError:
            _forget(part)
            raise
        os.replace(part, path)
        _memo(part).unlink(missing_ok=True)
    return path


def verify(path: Path, remote: RemoteFile, advice: str) -> None:
    """Compare the size and the checksum of a file with those that are known.

    Args:
        path: of the file.
        remote: what it should be.
        advice: what to do if it is not.

    Raises:
        DownloadError: it is another file; expected and found are named.
    """
    size = path.stat().st_size
    if size != remote.size:
        raise DownloadError(f"{path}: expected {remote.size} bytes, found {size}; {advice}")
    digest = hashlib.new(remote.algorithm, usedforsecurity=False)
    with path.open("rb") as stream, _bar(f"checking {remote.name}", remote.size) as bar:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != remote.checksum:
        raise DownloadError(
            f"{path}: {remote.algorithm} expected {remote.checksum}, found {digest.hexdigest()}; {advice}"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot end.

    Args:
        folder: on the disk in question.
        needed: bytes.
        what: needs them.

    Raises:
        DownloadError: there are fewer.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{what}: needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB left; make room, or name another folder"
        )


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """Open what has arrived for appending, for this process alone."""
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part}: another process is fetching this file; wait for it") from error
        yield stream


def _receive(stream: IO[bytes], remote: RemoteFile, part: Path, patience: Patience) -> None:
    """Ask for the rest until all is there."""
    failures = setbacks = 0
    with _bar(remote.name, remote.size) as bar:
        while (start := stream.seek(0, os.SEEK_END)) != remote.size:
            if start > remote.size:  # of another file
                stream.truncate(0)
                continue
            try:
                _attempt(stream, remote, part, patience.timeout, bar)
                continue
            except _CutOffError as error:
                end = stream.seek(0, os.SEEK_END)
                failures = failures + 1 if end <= start else 0
                setbacks += end < start  # began anew, and did not get as far
                if max(failures, setbacks) >= patience.attempts:
                    raise DownloadError(
                        f"{remote.url}: {error}; {end} of {remote.size} bytes are there: check the network and run it "
                        f"again, or fetch the file by other means and put it into {part.parent}"
                    ) from error
            time.sleep(patience.wait * 2 ** max(failures - 1, 0))


def _attempt(stream: IO[bytes], remote: RemoteFile, part: Path, timeout: float, bar: Any) -> None:
    """One request: append what it brings."""
    start = stream.seek(0, os.SEEK_END)
    known = _read_memo(part) if start else {}
    headers = {"User-Agent": "detpipe", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        validator = known.get("etag") or known.get("last_modified")
        if validator and not validator.startswith("W/"):  # a weak one cannot promise equal bytes
            headers["If-Range"] = validator
    try:
        with _open(remote, headers, timeout) as response:
            if response.status == 206:
                _check_rest(response, remote, start, known)
            else:
                _check_length(response, remote, start)
                stream.truncate(0)  # the file has changed, or the server only sends it whole
                _write_memo(part, _validators(response))
            bar.n = stream.seek(0, os.SEEK_END)
            bar.refresh()
            _append(response, stream, remote, bar)
    except _AnotherFileError as error:
        stream.truncate(0)
        _write_memo(part, {})
        raise _CutOffError("the server does not go on where the file was cut off") from error
    except (HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(
                f"{part}: the disk is full; make room and run it again, it goes on from here"
            ) from error
        reason = getattr(error, "reason", None) or error
        raise _CutOffError(f"cannot be reached ({reason})" if not start else f"was cut off ({reason})") from error


def _open(remote: RemoteFile, headers: dict[str, str], timeout: float) -> HTTPResponse:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    try:
        return cast(HTTPResponse, opener.open(urllib.request.Request(remote.url, headers=headers), timeout=timeout))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                raise _AnotherFileError from error
            if error.code in _FOR_A_WHILE:
                raise _CutOffError(f"the server answers {error.code} {error.reason}") from error
            raise DownloadError(
                f"{remote.url}: the server answers {error.code} {' '.join(str(error.reason).split())}; the file may have moved: "
                "see its home page, or name another server with --mirror"
            ) from error


def _check_rest(response: HTTPResponse, remote: RemoteFile, start: int, known: dict[str, str]) -> None:
    """Whether a partial answer is the rest of the file whose beginning is there."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None or int(match[1]) != start or match[3] not in ("*", str(remote.size)):
        raise _AnotherFileError
    if any(known.get(key, value) != value for key, value in _validators(response).items()):
        raise _AnotherFileError


def _check_length(response: HTTPResponse, remote: RemoteFile, start: int) -> None:
    """Refuse a page in the place of the file, before what is there is given up for it."""
    length, coding = response.headers.get("Content-Length"), response.headers.get("Content-Encoding", "identity")
    if coding != "identity" or (length is None and start) or length not in (None, str(remote.size)):
        raise DownloadError(
            f"{remote.url}: expected {remote.size} bytes, but the server offers {length or 'an unknown number'} of type "
            f"{response.headers.get('Content-Type')}: it is another file, or a page in its place"
        )


def _append(response: HTTPResponse, stream: IO[bytes], remote: RemoteFile, bar: Any) -> None:
    while chunk := response.read(_CHUNK):
        if stream.tell() + len(chunk) > remote.size:
            raise DownloadError(f"{remote.url}: the server sends more than the expected {remote.size} bytes")
        stream.write(chunk)
        bar.update(len(chunk))
    stream.flush()
    if stream.tell() < remote.size:
        raise _CutOffError("the connection was closed early")


def _validators(response: HTTPResponse) -> dict[str, str]:
    found = {"etag": response.headers.get("ETag"), "last_modified": response.headers.get("Last-Modified")}
    return {key: value for key, value in found.items() if value}


def _memo(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_memo(part: Path) -> dict[str, str]:
    """The validators of what has arrived; nothing is known where the note is gone or damaged: the checksum decides."""
    try:
        content = json.loads(_memo(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in content.items() if type(value) is str} if type(content) is dict else {}


def _write_memo(part: Path, validators: dict[str, str]) -> None:
    _memo(part).write_text(json.dumps(validators), encoding="utf-8")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _memo(part).unlink(missing_ok=True)


def _bar(title: str, total: int) -> Any:
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)
