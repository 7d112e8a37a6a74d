"""Opening web addresses: nothing but http and https is spoken, redirects included, and failures are sorted by what may help."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from typing import IO, Any, cast
from urllib.parse import urlsplit

from detpipe.support.errors import DownloadError

_REDIRECTS = 5
_FOR_A_WHILE = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next attempt
HEADERS = {"User-Agent": "detpipe", "Accept-Encoding": "identity"}
MIRROR = "see its home page, or name another server with --mirror"


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


USUAL = Patience()


class CutOffError(Exception):
    """An attempt ended early; what arrived is kept, and another attempt may help."""


class AnotherFileError(Exception):
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


def open_url(url: str, headers: dict[str, str], timeout: float, advice: str = MIRROR) -> HTTPResponse:
    """Send a request.

    Args:
        url: the address.
        headers: of the request.
        timeout: seconds without a byte.
        advice: what to do where there is no such file.

    Returns:
        The answer, of status 200 or 206.

    Raises:
        CutOffError: the server says that another attempt may help.
        AnotherFileError: it has nothing from the asked-for byte on.
        DownloadError: it does not have the file.
    """
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


def read_url(url: str, most: int, advice: str, patience: Patience = USUAL) -> bytes:
    """Read a small file whose size and checksum are not known.

    Args:
        url: the address.
        most: bytes that it may have.
        advice: what to do where there is no such file.
        patience: how long the server is waited for.

    Returns:
        Its content.

    Raises:
        DownloadError: no network, no such file, or a larger one.
    """
    check_url(url)
    for attempt in range(1, patience.attempts + 1):
        try:
            with open_url(url, HEADERS, patience.timeout, advice) as response:
                content = response.read(most + 1)
                length = response.headers.get("Content-Length")
            if len(content) > most:
                raise DownloadError(f"{url}: more than {most} bytes; it is another file, or a page in its place")
            if length in (None, str(len(content))):
                return content
            reason: Any = f"{len(content)} of {length} bytes came"
        except (CutOffError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
        if attempt < patience.attempts:
            time.sleep(patience.wait * 2 ** (attempt - 1))
    raise DownloadError(f"{url}: cannot be read ({reason}); check the network and run it again")
