"""Fetch a file of known size and checksum over HTTP, and go on where an earlier attempt was cut off.

What has arrived lies in ``NAME.part`` beside the final name. A file appears under its final name only when its size and checksum
are those that are known: where pieces of several attempts do not make it, it is fetched once more in one piece. Nothing but http
and https is spoken, redirects included.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Literal

from tqdm import tqdm

from detpipe.datasets.web import HEADERS, MIRROR, USUAL, AnotherFileError, CutOffError, Patience, check_url, open_url
from detpipe.support.errors import DownloadError

_CHUNK = 1 << 20  # bytes


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


def fetch(
    remote: RemoteFile, folder: str | Path, patience: Patience = USUAL, advice: str = MIRROR, progress: bool = True
) -> Path:
    """Fetch a file, or the rest of it, unless it is there already.

    Args:
        remote: the file.
        folder: where it goes.
        patience: how long a server is waited for.
        advice: what to do where there is no such file.
        progress: whether bars are shown.

    Returns:
        Its path.

    Raises:
        DownloadError: no network, no such file, another file than the one that is known, or no space on the disk; what has
            arrived is kept for the next attempt unless it is of another file.
    """
    check_url(remote.url)
    path = Path(folder) / remote.name
    if path.exists():
        verify(path, remote, "remove it, and it is fetched again", progress)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _locked(part) as stream:
        missing = remote.size - os.fstat(stream.fileno()).st_size
        check_space(path.parent, missing, str(path))
        altered = "it is dropped; a proxy or the server may have altered it: try again"
        for again in (True, False):
            in_pieces = _receive(stream, remote, part, patience, advice, progress)
            try:
                verify(part, remote, altered, progress)
                break
            except DownloadError:
                stream.truncate(0)
                if not (in_pieces and again):  # else the file may have changed between two pieces
                    part.unlink()
                    raise
        os.replace(part, path)
    return path


def verify(path: Path, remote: RemoteFile, advice: str, progress: bool = True) -> None:
    """Compare the size and the checksum of a file with those that are known.

    Args:
        path: of the file.
        remote: what it should be.
        advice: what to do if it is not.
        progress: whether a bar is shown.

    Raises:
        DownloadError: it is another file; expected and found are named.
    """
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


def _receive(
    stream: IO[bytes], remote: RemoteFile, part: Path, patience: Patience, advice: str, progress: bool
) -> bool:
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
                _attempt(stream, remote, part, patience.timeout, advice, bar)
                continue
            except CutOffError as error:
                end = stream.seek(0, os.SEEK_END)
                failures = failures + 1 if end <= start else 0
                setbacks += end < start  # began anew, and did not get as far
                if max(failures, setbacks) >= patience.attempts:
                    raise DownloadError(
                        f"{remote.url}: {error}; {end} of {remote.size} bytes are there: check the network and run it "
                        f"again, or fetch the file by other means and put it into {part.parent}"
                    ) from error
            time.sleep(patience.wait * 2 ** max(failures - 1, 0))
    stream.flush()
    os.fsync(stream.fileno())
    return in_pieces


def _attempt(stream: IO[bytes], remote: RemoteFile, part: Path, timeout: float, advice: str, bar: Any) -> None:
    """One request: append what it brings."""
    start = stream.seek(0, os.SEEK_END)
    headers = {**HEADERS, "Range": f"bytes={start}-"} if start else HEADERS
    try:
        with open_url(remote.url, headers, timeout, advice) as response:
            if response.status == 206:
                _check_rest(response, remote, start)
            else:
                _check_length(response, remote, start)
                stream.truncate(0)  # the server only sends it whole
            bar.n = stream.seek(0, os.SEEK_END)
            bar.refresh()
            _append(response, stream, remote, bar)
    except AnotherFileError as error:
        stream.truncate(0)
        raise CutOffError("the server does not go on where the file was cut off") from error
    except (HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(
                f"{part}: the disk is full; make room and run it again, it goes on from here"
            ) from error
        reason = getattr(error, "reason", None) or error
        raise CutOffError(f"cannot be reached ({reason})" if not start else f"was cut off ({reason})") from error


def _check_rest(response: HTTPResponse, remote: RemoteFile, start: int) -> None:
    """Whether a partial answer is the rest of the file whose beginning is there."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None or int(match[1]) != start or match[3] not in ("*", str(remote.size)):
        raise AnotherFileError


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
        raise CutOffError("the connection was closed early")


def _bar(title: str, total: int, shown: bool) -> Any:
    hidden = None if shown else True  # None: where there is no terminal
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden, leave=False)
