"""The page in ``examples/web``, in a headless browser: the same boxes as onnxruntime's."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detpipe.exporting.parity import sample_images
from detpipe.prediction.onnx_detector import OnnxDetector
from export.detectors import detector
from export.test_files import written  # noqa: F401 (a fixture)

PAGE = Path(__file__).resolve().parents[2] / "examples" / "web"
PACKAGE = "onnxruntime-web@1.22.0"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(written: Path, tmp_path: Path) -> Iterator[str]:  # noqa: F811
    """The address of the page, with a model and the runtime beside it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which fetches onnxruntime-web, is not installed")
    packed = subprocess.run([npm, "pack", PACKAGE], cwd=tmp_path, capture_output=True, text=True, check=False)
    if packed.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched: {packed.stderr.strip().splitlines()[-1:]}")
    folder = shutil.copytree(PAGE, tmp_path / "web")
    with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.move(tmp_path / "package", folder / "onnxruntime-web")
    shutil.copy(written, folder / "model.onnx")
    (folder / "classes.json").write_text(json.dumps(OnnxDetector(written).metadata["class_names"]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_dropped_image_shows_the_boxes_that_onnxruntime_finds(site, written, tmp_path):  # noqa: F811
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here")
    [image] = sample_images(detector("fpn cascade"))[1]
    Image.fromarray(image.movedim(0, -1).numpy()).save(tmp_path / "image.png")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(site)
        page.wait_for_function("document.getElementById('say').textContent != 'Loading the model ...'", timeout=120_000)
        page.set_input_files("#file", tmp_path / "image.png")
        page.wait_for_function("/objects|Error/.test(document.getElementById('say').textContent)", timeout=120_000)
        page.locator("#least").fill("0.2")
        said, lines = page.locator("#say").text_content(), page.locator("#list li").all_text_contents()
        browser.close()
    [found] = OnnxDetector(written).run(image[None].numpy())
    assert said.startswith(f"{len(found['scores'])} of {len(found['scores'])} objects"), said
    boxes = torch.tensor([[float(side) for side in line.split(" at ")[1].split(",")] for line in lines])
    np.testing.assert_allclose(boxes, found["boxes"], atol=0.06)  # one decimal is shown
    assert [line.split()[0] for line in lines] == [["cat", "dog", "owl"][label - 1] for label in found["labels"]]
