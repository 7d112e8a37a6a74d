from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageColor
from report_cases import EVIL, evil_analysis, evil_truth, some_detections

from detpipe.evaluation.analysis import AnalysisSettings, analyze, plain
from detpipe.pictures import report_images
from detpipe.pictures.report_comparison import verdict
from detpipe.pictures.report_confusion import shown_classes
from detpipe.pictures.report_figures import require_matplotlib, write_figures
from detpipe.pictures.report_html import number, plural, script_json, text
from detpipe.pictures.report_page import page_data, report_page
from detpipe.support.errors import UsageError
from detpipe.types import DetectionArrays

MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "img", "input", "br", "line", "circle"}


class Page(HTMLParser):
    """Elements with their attributes; fails on a tag that is closed out of order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)


def drawings(analysis: Any) -> list[report_images.Drawing]:
    image = torch.full((3, 160, 160), 120, dtype=torch.uint8)
    return [report_images.draw_outcome(image, outcome, list(EVIL)) for outcome in analysis.worst]


def test_names_of_others_stay_names():
    analysis = evil_analysis(("<b>run</b>", "</title>"))
    page = Page(report_page(analysis.numbers, drawings(analysis)))
    assert len(page.scripts) == 2  # the data and the code: no name has opened another
    data = json.loads(page.scripts[0])
    assert data["names"][1:] == list(EVIL)
    assert [run["name"] for run in data["runs"]] == ["<b>run</b>", "</title>"]
    written = "".join(page.texts)
    assert "Evaluation report: <b>run</b>" in written
    assert "<img src=x onerror=alert(" in written
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert {tag for tag, _ in page.elements} & {"b", "iframe", "object", "link", "base", "form"} == set()
    for name in EVIL:
        assert name in written


def test_nothing_is_loaded_from_anywhere():
    analysis = evil_analysis()
    page = Page(report_page(analysis.numbers, drawings(analysis)))
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                assert (attributes[name] or "").startswith(("data:", "#")), (tag, attributes)
    policy = [one["content"] for tag, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"]
    code = page.scripts[1] + Path(report_images.__file__).with_name("report.css").read_text()
    assert not re.findall(r"fetch|XMLHttp|import\(|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", code)


def test_the_page_is_accessible():
    analysis = evil_analysis(("one", "two"))
    page = Page(report_page(analysis.numbers, drawings(analysis)))
    ids = [one["id"] for _, one in page.elements if "id" in one]
    assert len(set(ids)) == len(ids)
    labels = {one["for"] for tag, one in page.elements if tag == "label"}
    assert labels == {one["id"] for tag, one in page.elements if tag in ("select", "input")}
    assert all(one.get("alt") for tag, one in page.elements if tag == "img")
    assert sum(tag == "h1" for tag, _ in page.elements) == 1
    links = {(one["href"] or "").removeprefix("#") for tag, one in page.elements if tag == "a"}
    assert links <= set(ids)
    assert {one["id"] for tag, one in page.elements if tag == "section"} | {"main"} == links
    assert page.elements[0] == ("html", {"lang": "en"})
    assert all(one.get("scope") for tag, one in page.elements if tag == "th")


def test_the_numbers_are_on_the_page():
    analysis = evil_analysis(("one", "two"))
    numbers = analysis.numbers
    written = " ".join(Page(report_page(numbers, [])).texts)
    for value in (numbers["metrics"]["AP"], numbers["operating_point"]["score"], numbers["sizes"][2]["AP"]):
        assert f"{value:.3f}" in written
    for one in numbers["errors"]["types"]:
        assert f"{one['gain']:+.3f}".replace("-", MINUS) in written
    apart = numbers["comparison"]["runs"][1]["difference"]["AP"]["value"]
    assert f"{apart:+.3f}".replace("-", MINUS) in written
    assert "give their folder by" in written


def test_page_data_holds_the_curves_in_thousandths():
    numbers = evil_analysis().numbers
    data = page_data(numbers)
    curves = data["runs"][0]["curves"]
    assert len(curves) == 5
    assert curves[4] is None  # no objects of the last class
    exact = np.array(numbers["curves"]["<b>run</b>"]["precision"][1])
    np.testing.assert_allclose(np.array(curves[1]) / 1000, exact, atol=1e-3)
    assert (np.array(curves[1]) > 0).tolist() == (exact > 0).tolist()
    assert [one["name"] for one in data["calibration"]] == ["all classes", *EVIL]


def test_numbers_survive_strict_json_and_are_those_of_the_protocol():
    for protocol, key in (("coco", "AP"), ("voc07", "mAP"), ("voc10", "mAP")):
        numbers = evil_analysis(("one", "two"), AnalysisSettings(protocol)).numbers
        assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
        runs = numbers["comparison"]["runs"]
        assert runs[0]["metrics"][key]["value"] == pytest.approx(numbers["metrics"][key], abs=1e-12)
        assert ("follow the protocol" in report_page(numbers, [])) == (protocol != "coco")
    assert plain({"a": [np.float64("nan"), np.int64(2), (1.5, float("inf"))]}) == {"a": [None, 2, [1.5, None]]}


def test_numbers_agree_with_each_other():
    annotations = evil_truth()
    numbers = analyze(annotations, {"one": some_detections(annotations)}).numbers
    assert numbers["metrics"]["AP50"] == pytest.approx(numbers["errors"]["AP50"], abs=1e-12)
    assert numbers["metrics"]["APm"] == pytest.approx(numbers["sizes"][2]["AP"], abs=1e-12)
    assert numbers["curves"]["one"]["AP"][0][0] == pytest.approx(numbers["metrics"]["AP50"], abs=1e-12)
    for one, (name, average) in zip(numbers["per_class"], numbers["metrics"]["per_class"].items(), strict=True):
        assert one["name"] == name
        assert (one["AP"] if one["AP"] is not None else -1.0) == pytest.approx(average, abs=1e-12)
    confusion = np.array(numbers["confusion"])
    assert confusion[:-1].sum() == numbers["data"]["objects"] == sum(one["objects"] for one in numbers["per_class"])
    false = sum(one["count"] for one in numbers["errors"]["types"][:-1])
    assert false == numbers["errors"]["false_positives"]["count"]
    costs = [one["cost"] for one in numbers["worst_images"]]
    assert costs == sorted(costs, reverse=True)
    assert min(costs) > 0


def test_a_given_score_is_used(tmp_path):
    annotations = evil_truth()
    runs = {"one": some_detections(annotations)}
    numbers = analyze(annotations, runs, AnalysisSettings(score_threshold=0.9, worst=2)).numbers
    assert numbers["operating_point"]["score"] == 0.9
    assert len(numbers["worst_images"]) == 2
    kept = int((runs["one"].scores >= 0.9).sum())
    assert sum(one["detections"] for one in numbers["per_class"]) == pytest.approx(kept, abs=2)
    assert "This score was given" in report_page(numbers, [])


@pytest.mark.parametrize("what", ["no detections", "no objects", "nothing", "scores above 1"])
def test_what_cannot_be_computed_is_said(what, tmp_path):
    annotations = evil_truth()
    detections = some_detections(annotations)
    if what in ("no detections", "nothing"):
        detections = DetectionArrays(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    if what in ("no objects", "nothing"):
        annotations = replace(annotations, difficult=np.ones_like(annotations.difficult))
    if what == "scores above 1":
        detections = replace(detections, scores=detections.scores * 10)
    runs = {"one": detections, "two": detections}
    analysis = analyze(annotations, runs, AnalysisSettings(resamples=5))
    json.dumps(analysis.numbers, allow_nan=False)
    page = report_page(analysis.numbers, drawings(analysis))
    Page(page)
    assert ("no probabilities" in page) == (what == "scores above 1")
    assert ("nothing to compute it from" in page) or what == "scores above 1"
    assert write_figures(analysis.numbers, tmp_path)


def test_figures_are_written(tmp_path):
    written = write_figures(evil_analysis(("one", "two")).numbers, tmp_path)
    names = {"pr_curves", "ap_by_size", "error_types", "confusion", "calibration", "comparison"}
    assert {path.stem for path in written} == names
    assert sorted(tmp_path.iterdir()) == sorted(written)
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_figures_of_names_without_a_font_are_written_without_warnings(tmp_path):
    """Nor of those that a legend would leave out, or that are no Unicode."""
    annotations = replace(evil_truth(), class_names=("_猫", "_犬", "_\udce9", "_🦓"))
    analysis = analyze(annotations, {"鳥": some_detections(annotations)})
    assert write_figures(analysis.numbers, tmp_path)
    assert "_\\udce9" in report_page(analysis.numbers, []).encode().decode()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"matplotlib, which draws the figures.*pip install 'detpipe\[train\]'"):
        require_matplotlib()


def test_a_drawing_shows_what_came_of_each_box():
    analysis = evil_analysis()
    image = torch.full((3, 80, 160), 120, dtype=torch.uint8)
    drawing = report_images.draw_outcome(image, analysis.worst[0], list(EVIL))
    assert drawing.truth.shape == drawing.found.shape == (3, 320, 640)
    states = {*analysis.worst[0].states}
    for state in states:
        color = torch.tensor(ImageColor.getrgb(report_images._COLORS[state]))
        close = (drawing.truth.int() - color[:, None, None]).abs().amax(0) < 12
        assert close.any(), state
    assert report_images.as_data(drawing.truth).startswith("data:image/jpeg;base64,/9j/")


def test_large_matrices_show_the_classes_that_are_confused():
    counts = np.diag(np.full(41, 9))
    counts[40, 40] = 0
    counts[7, 30] = 3
    counts[12, 40] = 5
    chosen = shown_classes(counts, 3)
    assert chosen == [7, 12, 30]
    assert shown_classes(counts, 40) == list(range(40))


def test_verdicts():
    for low, high, expected in [
        (0.1, 0.2, "better"),
        (-0.2, -0.1, "worse"),
        (-0.1, 0.1, "undecided"),
        (0.0, 0.1, "undecided"),
        (None, None, "unknown"),
    ]:
        assert verdict({"low": low, "high": high}) == expected


def test_pieces():
    assert (number(0.12345), number(-0.5, 2, sign=True), number(0.5, sign=True)) == ("0.123", "&minus;0.50", "+0.500")
    assert "&ndash;" in number(None)
    assert "&ndash;" in number(-1)
    assert [plural(1, "class"), plural(2, "class"), plural(1000, "image")] == ["1 class", "2 classes", "1,000 images"]
    assert text("<a b='c'>&\"") == "&lt;a b=&#x27;c&#x27;&gt;&amp;&quot;"
    tricky = {"</script>": ["<!--", "]]>", "\u2028", "&amp;"]}
    written = script_json(tricky)
    assert json.loads(written) == tricky
    assert not set("<>&\u2028") & set(written)
