"""Fetch files over HTTP or from an object store, and go on where an earlier attempt was cut off.

What has arrived lies in ``NAME.part`` beside the final name. A file appears under its final name only when its size and checksum
are those that are known: where pieces of several attempts do not make it, it is fetched once more in one piece.

Of the web nothing but http and https is spoken, redirects included. ``s3://`` and ``gs://`` are read through fsspec, by the package
and with the credentials that it finds on this machine.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Literal, cast
from urllib.parse import urlsplit

from tqdm import tqdm

from detpipe.support.errors import DownloadError
from detpipe.support.files import sole_writer

_CHUNK = 1 << 20  # bytes
_REDIRECTS = 5
_FOR_A_WHILE = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt
_HEADERS = {"User-Agent": "detpipe", "Accept-Encoding": "identity"}
_STORES = {"s3": "s3fs", "gs": "gcsfs"}  # schemes, and the packages by which fsspec reads them
MIRROR = "see its home page, or name another server with --mirror"


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for."""

    attempts: int = 5  # in a row without a byte
    timeout: float = 30.0  # seconds without a byte, after which an attempt has failed
    wait: float = 2.0  # seconds before the second attempt; twice as many before each further one
    total: float = math.inf  # seconds of an attempt of `read_url`, however many bytes come


USUAL = Patience()


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server."""

    url: str  # where it is
    size: int  # in bytes
    algorithm: Literal["md5", "sha256"]  # of the checksum
    checksum: str  # in hexadecimal digits

    @property
    def name(self) -> str:
        """What it is called."""
        return self.url.rpartition("/")[2]


class CutOffError(Exception):
    """An attempt ended early; what arrived is kept, and another attempt may help."""


class AnotherFileError(CutOffError):
    """What the server has is not the file whose beginning is there."""

    def __init__(self) -> None:
        super().__init__("the server does not go on where the file was cut off")


def is_remote(address: str) -> bool:
    """Whether an address is one of the web or of an object store instead of a path."""
    return address.startswith(("http://", "https://", *(f"{scheme}://" for scheme in _STORES)))


def check_url(url: str) -> None:
    """Refuse by a DownloadError what is neither a web address nor one of an object store."""
    if not is_remote(url) or not urlsplit(url).hostname:
        raise DownloadError(
            f"{url}: only http:// and https:// addresses are fetched, and those of stores: s3:// and gs://"
        )


def fetch(
    remote: RemoteFile, folder: str | Path, patience: Patience = USUAL, advice: str = MIRROR, progress: bool = True
) -> Path:
    """Fetch a file into a folder, or the rest of it, unless it is there already; its path.

    A DownloadError without network or file, which then gives the advice, for another file than the one that is known, or without
    space on the disk; what has arrived is kept for the next attempt unless it is of another file.
    """
    check_url(remote.url)
    path = Path(folder) / remote.name
    if path.exists():
        _verify(path, remote, "remove it, and it is fetched again", progress)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    busy = DownloadError(f"{part}: another process is fetching this file; wait for it")
    with sole_writer(part, busy), part.open("ab") as stream:
        check_space(path.parent, remote.size - stream.tell(), str(path))
        altered = "it is dropped; a proxy or the server may have altered it: try again"
        for again in (True, False):
            in_pieces = _receive(stream, remote, patience, advice, progress)
            try:
                _verify(part, remote, altered, progress)
                break
            except DownloadError:
                stream.truncate(0)
                if not (in_pieces and again):  # else the file may have changed between two pieces
                    part.unlink()
                    raise
        os.replace(part, path)
    return path


def read_url(url: str, most: int, advice: str, patience: Patience = USUAL) -> bytes:
    """Read a small file whose size and checksum are not known.

    A DownloadError without network or file, which then gives the advice, or if it is larger than ``most`` bytes.
    """
    check_url(url)
    for attempt in range(1, patience.attempts + 1):
        try:
            with _open(url, 0, patience.timeout, advice) as response:
                content = _read(response, most + 1, time.monotonic() + patience.total)
                length = response.size if isinstance(response, _Stored) else _length(response)
            if len(content) > most:
                raise DownloadError(f"{url}: more than {most} bytes; it is another file, or a page in its place")
            if length in (None, len(content)):
                return content
            reason: Any = f"{len(content)} of {length} bytes came"
        except (CutOffError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
        if attempt < patience.attempts:
            time.sleep(patience.wait * 2 ** (attempt - 1))
    raise DownloadError(f"{url}: cannot be read ({reason}); check the network and run it again")


def _read(response: HTTPResponse | _Stored, most: int, end: float) -> bytes:
    """At most so many bytes; a CutOffError after a moment by which all should have come."""
    read = response.read if isinstance(response, _Stored) else response.read1  # what is there, without waiting for more
    parts, left = [], most
    while left and (part := read(min(left, _CHUNK))):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > end:
            raise CutOffError(f"only {most - left} bytes came in time")
    return b"".join(parts)


def _verify(path: Path, remote: RemoteFile, advice: str, progress: bool) -> None:
    size = path.stat().st_size
    if size != remote.size:
        raise DownloadError(f"{path}: expected {remote.size} bytes, found {size}; {advice}")
    digest = hashlib.new(remote.algorithm, usedforsecurity=False)
    with path.open("rb") as stream, _bar(f"checking {remote.name}", remote.size, progress) as bar:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != remote.checksum:
        raise DownloadError(
            f"{path}: {remote.algorithm} expected {remote.checksum}, found {digest.hexdigest()}; {advice}"
        )


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot end: a DownloadError if the disk of a folder has fewer bytes than ``what`` needs."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{what}: needs {needed / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB left; make room, or name another folder"
        )


def _receive(stream: IO[bytes], remote: RemoteFile, patience: Patience, advice: str, progress: bool) -> bool:
    """Ask for the rest until all is there; whether it came in several pieces."""
    failures = setbacks = 0
    in_pieces = False
    with _bar(remote.name, remote.size, progress) as bar:
        while (start := stream.seek(0, os.SEEK_END)) != remote.size:
            if start > remote.size:  # of another file
                stream.truncate(0)
                continue
            in_pieces = start > 0
            try:
                _attempt(stream, remote, patience.timeout, advice, bar)
                continue
            except CutOffError as error:
                end = stream.seek(0, os.SEEK_END)
                failures = failures + 1 if end <= start else 0
                setbacks += end < start  # began anew, and did not get as far
                if max(failures, setbacks) >= patience.attempts:
                    raise DownloadError(
                        f"{remote.url}: {error}; {end} of {remote.size} bytes are there: check the network and run it "
                        f"again, or fetch the file by other means and put it into {Path(stream.name).parent}"
                    ) from error
            time.sleep(patience.wait * 2 ** max(failures - 1, 0))
    stream.flush()
    os.fsync(stream.fileno())
    return in_pieces


def _attempt(stream: IO[bytes], remote: RemoteFile, timeout: float, advice: str, bar: Any) -> None:
    start = stream.seek(0, os.SEEK_END)
    try:
        with _open(remote.url, start, timeout, advice) as response:
            if not _is_rest(response, remote, start):
                stream.truncate(0)  # the server only sends it whole
            bar.n = stream.seek(0, os.SEEK_END)
            bar.refresh()
            while chunk := response.read(_CHUNK):
                if stream.tell() + len(chunk) > remote.size:
                    raise DownloadError(f"{remote.url}: the server sends more than the expected {remote.size} bytes")
                stream.write(chunk)
                bar.update(len(chunk))
            stream.flush()
    except AnotherFileError:
        stream.truncate(0)
        raise
    except (HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(
                f"{stream.name}: the disk is full; make room and run it again, it goes on from here"
            ) from error
        reason = getattr(error, "reason", None) or error
        raise CutOffError(f"cannot be reached ({reason})" if not start else f"was cut off ({reason})") from error
    if stream.tell() < remote.size:
        raise CutOffError("the connection was closed early")


def _is_rest(response: HTTPResponse | _Stored, remote: RemoteFile, start: int) -> bool:
    """Whether an answer is what is missing of a file; else it is all of it.

    AnotherFileError: it is the rest of another file. DownloadError: it is a page in the place of the file.
    """
    if isinstance(response, _Stored):
        length, kind, plain = response.size, "a stored file", True
    elif response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if match is None or int(match[1]) != start or match[3] not in ("*", str(remote.size)):
            raise AnotherFileError
        return True
    else:
        length, kind = _length(response), response.headers.get("Content-Type")
        plain = response.headers.get("Content-Encoding", "identity") == "identity"
    if not plain or (length is None and start) or length not in (None, remote.size):
        raise DownloadError(
            f"{remote.url}: expected {remote.size} bytes, but the server offers {length or 'an unknown number'} of type "
            f"{kind}: it is another file, or a page in its place"
        )
    return isinstance(response, _Stored)


def _length(response: HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _open(url: str, start: int, timeout: float, advice: str) -> HTTPResponse | _Stored:
    """Ask for a file from a byte on: an answer of status 200 or 206, or an open file of a store.

    CutOffError if another attempt may help, AnotherFileError if nothing is there from that byte on, DownloadError if there is no
    such file.
    """
    if urlsplit(url).scheme in _STORES:
        return _Stored(url, start, advice)
    headers = {**_HEADERS, "Range": f"bytes={start}-"} if start else _HEADERS
    opener = urllib.request.build_opener(
        _Redirects
    )  # it knows files and ftp, which are refused before and in redirects
    try:
        return cast(HTTPResponse, opener.open(urllib.request.Request(url, headers=headers), timeout=timeout))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                raise AnotherFileError from error
            if error.code in _FOR_A_WHILE:
                raise CutOffError(f"the server answers {error.code} {error.reason}") from error
            raise DownloadError(
                f"{url}: the server answers {error.code} {' '.join(str(error.reason).split())}; the file may have moved: {advice}"
            ) from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = _REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        parts = urlsplit(newurl)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DownloadError(
                f"{newurl}: only http:// and https:// addresses are fetched where a server leads to them"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Stored:
    def __init__(self, url: str, start: int, advice: str) -> None:
        self._url, self._package, self._advice = url, _STORES[urlsplit(url).scheme], advice
        with self._errors():
            import fsspec  # takes .1 s

            self._file = fsspec.filesystem(urlsplit(url).scheme).open(url, "rb")
            self._file.seek(start)
            self.size = int(self._file.size)

    def __enter__(self) -> _Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, length: int) -> bytes:
        with self._errors():
            return self._file.read(length)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise DownloadError(
                f"{self._url}: needs a package that is not installed: pip install {self._package}"
            ) from error
        except FileNotFoundError as error:
            raise DownloadError(f"{self._url}: there is no such file; {self._advice}") from error
        except PermissionError as error:
            raise DownloadError(
                f"{self._url}: may not be read ({error}); {self._package} found other credentials"
            ) from error
        except Exception as error:  # each package has kinds of its own
            raise CutOffError(f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _bar(title: str, total: int, shown: bool) -> Any:
    hidden = None if shown else True  # None: where there is no terminal
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden, leave=False)
