"""A real browser tries the page of ``detpipe demo``; what its controls do is tested without it too."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detpipe.backbones import SEResNet
from detpipe.detector import TwoStageDetector
from detpipe.heads import AttentionalHead
from detpipe.heads.postprocess import Postprocess
from detpipe.pictures import visualize
from detpipe.proposals import DenseGrid
from detpipe.serving import trial as trial_module
from detpipe.serving.trial import GIVEN, OWN, Trial, Tried

NAMES = ["<b>cat</b>", "dog"]


def tried() -> Tried:
    """A detector of random weights that always finds something, and looks three times."""
    torch.manual_seed(0)
    backbone = SEResNet(18, levels=["c2"], out_channels=8)
    head = AttentionalHead(8, 2, backbone.strides, fc=[16], postprocess=Postprocess(0.01, detections_per_image=20))
    detector = TwoStageDetector(backbone, DenseGrid(scales=[32]), head, min_size=64, max_size=96).eval()

    def draw(picture: torch.Tensor, found: Any, out: Path) -> list[Path]:
        visualize.save_png(out / "gates.png", picture)
        return [out / "gates.png"] if len(found["scores"]) else []

    half = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    return Tried("a <i>model</i>.ckpt", detector, NAMES, {"half": lambda image: half}, draw)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tried(), tmp_path)


def upload(folder: Path, name: str = "photo.png", size: tuple[int, int] = (80, 60)) -> dict[str, str]:
    Image.effect_noise(size, 60).convert("RGB").save(folder / name)
    return {"path": str(folder / name), "orig_name": name}


def test_a_look_tells_everything_of_a_detection(trial):
    key, line, *pictures, rows, classes, times, written, _ = trial.look(upload(trial.folder), OWN, "", "none", 0.0)
    assert line.startswith("20 of 20 detections at 0.00 and above; 80 x 60 pixels")
    assert all(Path(one).suffix == ".png" for one in pictures)
    told = json.loads(Path(written).read_text())
    assert len(told["detections"]) == len(rows) == len(classes["data"]) == 20
    for record, row, scores in zip(told["detections"], rows, told["class_scores"]["scores"], strict=True):
        assert scores[NAMES.index(record["label"])] == pytest.approx(record["score"])
        assert row[1:3] == [record["label"], round(record["score"], 3)]
        assert len(record["glimpses"]) == 1
        assert max(record["proposal"]) <= 80
    assert [row[0] for row in times] == ["backbone", "proposals", "head", "resizing and the rest", "all"]
    few = trial.show(key, rows[4][2])
    assert 0 < len(few[4]) < 20
    assert trial.attend(key, 1.0) == ("Gates are drawn on detections: lower the threshold.", [])
    assert len(trial.attend(key, 0.0)[1]) == 1
    assert trial.tried.detector.head.return_glimpses is False
    assert type(trial.tried.detector.head.postprocess) is Postprocess


@pytest.mark.parametrize(
    ("source", "text", "tiles", "corner"), [(GIVEN, "[[10, 10, 30, 30]]", "none", 10), ("half", "", "none", 0)]
)
def test_boxes_that_are_given_or_made_are_looked_at(trial, source, text, tiles, corner):
    written = trial.look(upload(trial.folder), source, text, tiles, 0.0)[-2]
    records = json.loads(Path(written).read_text())["detections"]
    assert records
    assert {tuple(round(side) for side in one["proposal"][:2]) for one in records} == {(corner, corner)}


def test_tiles_find_detections_alone(trial):
    key, line, picture, proposals, glimpses, rows, *_ = trial.look(
        upload(trial.folder, size=(500, 330)), OWN, "", "320", 0.0
    )
    assert line.startswith(f"{len(rows)} of {len(rows)}")
    assert (proposals, glimpses) == (None, None)
    assert rows
    assert picture
    assert key


@pytest.mark.parametrize(
    ("file", "source", "text", "message"),
    [
        ({"path": "/etc/hostname"}, OWN, "", "expected an image that was dropped"),
        ({"path": "http://127.0.0.1/x.png"}, OWN, "", "expected an image that was dropped"),
        ("/etc/hostname", OWN, "", "expected an image that was dropped"),
        ("text", OWN, "", "text.png: cannot be read as an image"),
        ("large", OWN, "", "9000 x 9000 pixels are too many"),
        ("program", OWN, "", "program.eps: files of the format EPS are not taken"),
        ("good", GIVEN, "", "boxes: there are none; click two corners"),
        ("good", GIVEN, "[[1, 2", "boxes: line 1"),
        ("good", GIVEN, "[[0, 0, 999, 4]]", "boxes: box 0 is"),
    ],
)
def test_bad_input_is_a_line(trial, file, source, text, message):
    if file == "text":
        (trial.folder / "text.png").write_text("no image")
        file = {"path": str(trial.folder / "text.png"), "orig_name": "../text.png"}
    elif file == "large":
        Image.new("1", (9000, 9000)).save(trial.folder / "large.png")
        file = {"path": str(trial.folder / "large.png"), "orig_name": "large.png"}
    elif file == "program":
        (trial.folder / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
        file = {"path": str(trial.folder / "program.eps"), "orig_name": "program.eps"}
    elif file == "good":
        file = upload(trial.folder)
    key, line, *others = trial.look(file, source, text, "none", 0.5)
    assert key == ""
    assert message in line
    assert "on_bad" not in line
    assert not any(others)


@pytest.mark.slow
def test_old_results_are_forgotten(trial, monkeypatch):
    monkeypatch.setattr(trial_module, "_FOLDERS", 3)
    file = upload(trial.folder)
    keys = [trial.look(file, OWN, "", "none", 0.9)[0] for _ in range(9)]
    assert trial.show(keys[0], 0.5)[0] == "This result is gone: press Detect again."
    assert trial.show(keys[1], 0.5)[0].startswith("0 of 20")
    assert len([*trial.folder.iterdir()]) == 3 + 1  # of pictures, and the upload


# what Gradio 6 leaves open, and asks of pandas 3, in the process of the tests
GRADIOS_OWN = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore:The copy keyword is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is, served by a thread of this process."""
    folder = tmp_path_factory.mktemp("uploads")
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'detpipe[demo]'")
    from detpipe.serving.listening import address_of, listen, make_server
    from detpipe.serving.page import create_page_app

    server = make_server(create_page_app(Trial(tried(), folder)), 1)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield address_of(listener)
        server.should_exit = True
        thread.join(20)


def says(page: Any, text: str) -> None:
    """Wait until a field of the page says something."""
    page.wait_for_function(
        "text => [...document.querySelectorAll('textarea')].some(one => one.value.includes(text))",
        arg=text,
        timeout=30_000,
    )


@GRADIOS_OWN
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'")  # Gradio's own statistics of its queue
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_tries_it(browser, address, width, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append("a dialog"))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    assert "a <i>model</i>.ckpt" in page.inner_text("h2")
    assert "<b>cat</b>" in page.inner_text("main")
    page.set_input_files("input[type=file]", upload(tmp_path)["path"])
    says(page, "of 20 detections at 0.50 and above; 80 x 60 pixels")
    page.locator("input[type=number]").first.fill("0.01")
    page.locator("input[type=number]").first.press("Enter")
    says(page, "20 of 20 detections at 0.01 and above")
    page.wait_for_function("[...document.querySelectorAll('img')].some(one => one.naturalWidth >= 480)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_label("Boxes").fill("[[10, 10, 30, 30]]")
    page.get_by_label("Proposals from").click()
    page.get_by_role("option", name=GIVEN).click()
    says(page, "2 of 2 detections")  # one proposal, a box of each class
    page.get_by_role("tab", name="Proposals").click()
    with page.expect_download() as download:
        page.get_by_text("Download JSON").click()
    told = json.loads(Path(download.value.path()).read_text())
    assert {round(one["proposal"][0]) for one in told["detections"]} == {10}
    page.get_by_label("Boxes").fill("[[10, 10, 3")
    page.get_by_role("button", name="Detect", exact=True).click()
    says(page, "boxes: line 1 column")
    assert complaints == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.close()


@GRADIOS_OWN
@pytest.mark.slow
def test_no_part_of_the_page_follows_an_address(trial):
    gradio = pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'detpipe[demo]'")
    from detpipe.serving.page import build_page

    for part in build_page(trial).blocks.values():
        with pytest.raises(gradio.Error, match="addresses are not followed"):
            part.async_move_resource_to_block_cache("https://nowhere.invalid/x").send(None)


@GRADIOS_OWN
@pytest.mark.slow
def test_what_is_asked_beside_the_page_is_refused(address):
    import httpx2 as httpx

    said = HTTPConnection(address.removeprefix("http://"), timeout=20)
    said.putrequest("POST", "/gradio_api/upload")
    said.putheader("Content-Length", str(10**9))  # httpx sends no more than it has
    said.putheader("Content-Type", "multipart/form-data; boundary=x")
    said.endheaders()
    assert said.getresponse().status == 413
    said.close()
    assert httpx.post(f"{address}/gradio_api/queue/join", content=iter([b"{}"])).status_code == 413  # says no size
    assert httpx.get(f"{address}/gradio_api/file=/etc/hostname").status_code == 403
    assert httpx.get(f"{address}/gradio_api/proxy=http://127.0.0.1:1/x").status_code == 400
