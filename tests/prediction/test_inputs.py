from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from detpipe.datasets import fetch
from detpipe.datasets.fetch import Patience, read_url
from detpipe.prediction import inputs as module
from detpipe.prediction.inputs import find_images, find_inputs
from detpipe.support.errors import DataError, DownloadError, UsageError
from detpipe.types import RGB
from tests.datasets.file_server import Behavior, serving


def png(color: int = 7) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (color, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.png", "more/a.png", "more/left_1.png", "odd[1].png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Behavior]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_PATIENCE", Patience(attempts=1, timeout=2, wait=0, total=3))
    with serving(files={"/x/a%20b.png": png(9), "/x/page.html": b"<html>"}) as behavior:
        yield behavior


def typed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def names(given: list[str], root: Path) -> list[str]:
    return [one.path.relative_to(root).as_posix() for one in find_inputs(given)]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["b.png", "", "more"], ["b.png", "a.png", "more/a.png", "more/left_1.png", "odd[1].png"]),
        (["*.png"], ["a.png", "b.png", "odd[1].png"]),
        (["**/left_*.png"], ["more/left_1.png"]),
        (["odd[1].png"], ["odd[1].png"]),  # a file of that name comes before a pattern
        (["[ab].png"], ["a.png", "b.png"]),
    ],
)
def test_files_folders_and_patterns(given, found, folder):
    assert names([str(folder / name) for name in given], folder) == found


def test_lists(folder, tmp_path, monkeypatch):
    lines = f"{folder / 'b.png'}\n\n  {folder / 'more'}\n{folder / 'gone.png'}\n"
    (tmp_path / "list.txt").write_text(lines)
    expected = ["b.png", "more/a.png", "more/left_1.png", "gone.png"]
    assert names([f"@{tmp_path / 'list.txt'}"], folder) == expected
    for encoding in ("utf-8", "utf-8-sig"):  # as editors on Windows write it
        typed(monkeypatch, lines.encode(encoding))
        assert names(["@-"], folder) == expected
    with pytest.raises(DataError, match=r"gone\.png: no such image file"):  # when it is its turn
        find_inputs([f"@{tmp_path / 'list.txt'}"])[-1].read(RGB)


def test_an_image_from_standard_input(monkeypatch):
    typed(monkeypatch, png(5))
    [one] = find_inputs(["-"])
    assert (one.name, one.path.name, one.size()) == ("-", "stdin", (4, 6))
    assert one.read(RGB)[0].unique().tolist() == [5]
    typed(monkeypatch, png(5))
    with pytest.raises(UsageError, match="are taken by detpipe predict alone"):
        find_images(["-"])
    with pytest.raises(UsageError, match=r"http://localhost/a.png: images .* are taken by detpipe predict alone"):
        find_images(["http://localhost/a.png"])
    typed(monkeypatch, b"")
    with pytest.raises(UsageError, match=r"-: expected an image of at most .* got 0"):
        find_inputs(["-"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.jpg", "does not exist; expected an image or a folder of images"),
        ("*.gif", r"no file matches .*\*\.gif"),
        ("@nowhere.txt", "nowhere.txt: this list of images cannot be read"),
        ("@empty.txt", "empty.txt: this list names no image"),
        ("@a.png", "a.png: expected a list of images in UTF-8, one name a line"),
        ("@dash.txt", "'-' is no name for a list"),
        ("empty", "empty holds no image"),
        ("http://localhost/a.png", "a.png: is on the web; add --allow_network to fetch it"),
        ("@web.txt", "a.png: is on the web; add --allow_network to fetch it"),
    ],
)
def test_what_is_not_there_is_named(given, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "empty.txt").write_text("\n")
    (folder / "dash.txt").write_text("-\n")
    (folder / "web.txt").write_text("https://localhost/a.png\n")
    with pytest.raises(UsageError, match=message):
        find_inputs([given])


def test_images_on_the_web(server, monkeypatch):
    good, page, gone = find_inputs(
        [f"{server.url}/x/{name}" for name in ("a%20b.png", "page.html", "gone.png")], allow_network=True
    )
    assert (good.path.name, good.size()) == ("a b.png", None)
    assert torch.equal(good.read(RGB)[0].unique(), torch.tensor([9], dtype=torch.uint8))
    with pytest.raises(DataError, match=r"/x/page\.html: cannot be decoded as an image"):
        page.read(RGB)
    with pytest.raises(DownloadError, match=r"/x/gone\.png: the server answers 404"):
        gone.read(RGB)
    monkeypatch.setattr(module, "MOST_BYTES", 20)
    with pytest.raises(DownloadError, match="more than 20 bytes"):
        good.read(RGB)


class Dripping:
    """A server's answer that never ends, a byte at a time."""

    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> Dripping:
        return self

    def __exit__(self, *_: object) -> None: ...

    def read1(self, length: int) -> bytes:
        self.asked += 1
        return b"x"


def test_an_answer_that_never_ends_is_left(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(fetch.time, "monotonic", lambda: next(clock))
    answer = Dripping()
    monkeypatch.setattr(fetch, "_open", lambda *_: answer)
    with pytest.raises(DownloadError, match=r"cannot be read \(only 30 bytes came in time\)"):
        read_url("http://localhost/a.png", 10**6, "", Patience(attempts=1, total=29.5))
