"""A real browser opens the page of glimpses, and finds every picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detpipe.heads.base import outlines
from detpipe.pictures import glimpse_pictures, visualize
from detpipe.types import GlimpsedDetection

# legal names of files, the second one of bytes that are no UTF-8
NAMES = ["scene #1.png", "caf\udce9.png", "50%20?.png", "a 'b' & \"c\".png", "<script>alert(1)<\\script>.png"]
COUNTS = [0, 2, 1, 8, 12]  # detections of each


def found(count: int) -> GlimpsedDetection:
    boxes = torch.tensor([[20.0, 20.0, 60.0, 70.0]]).repeat(count, 1)
    return GlimpsedDetection(
        boxes=boxes,
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.arange(count) % 2 + 1,
        proposals=boxes - 3,
        glimpses=outlines(boxes[:, None] + torch.tensor([[4.0], [9.0]])),
    )


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glimpses #1 50%")
    records = []
    for name, count in zip(NAMES, COUNTS, strict=True):
        seen, classes = found(count), ["<b>one</b>", "two"]
        drawing = glimpse_pictures.draw_glimpses(torch.full((3, 96, 128), 90, dtype=torch.uint8), seen, classes)
        visualize.save_png(folder / name, drawing)
        rows = [
            {"label": classes[index % 2], "score": 0.5, **glimpse_pictures.describe(seen, index)}
            for index in range(count)
        ]
        records.append({"file": f"in/{name}", "drawing": name, "detections": rows})
    return glimpse_pictures.write_page(folder, records)


@pytest.mark.parametrize("width", [1280, 400])
def test_every_picture_is_found_whatever_its_name(browser, page_path, width):
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.on("dialog", lambda dialog: complaints.append("a dialog"))
    page.goto(page_path.as_uri())
    assert page.evaluate("document.compatMode") == "CSS1Compat"
    heads = [f"in/{name}" for name in [NAMES[0], "caf\\udce9.png", *NAMES[2:]]]
    assert page.eval_on_selector_all("h2", "all => all.map(one => one.textContent)") == heads
    assert (
        page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth > 200 && one.width > 200)")
        == [True] * 5
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    rows = page.eval_on_selector_all("section", "all => all.map(one => one.querySelectorAll('tbody th').length)")
    assert rows == COUNTS
    assert "Nothing was found." in page.inner_text("section")
    assert page.inner_text("td:nth-child(2)") == "<b>one</b>"
    opened = page.eval_on_selector_all("details", "all => all.map(one => one.open)")
    assert opened == [True, True, True, False]  # many: folded
    page.click("details:not([open]) summary")
    assert page.inner_text("section:last-of-type").count("(+") == 24  # two glimpses of twelve detections
    links = page.eval_on_selector_all("a", "all => all.map(one => one.href)")
    assert links == page.eval_on_selector_all("img", "all => all.map(one => one.src)")
    assert complaints == []
    page.close()
