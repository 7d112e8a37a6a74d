"""A real browser opens the report, uses every control, and hears no complaint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from report_cases import EVIL, evil_analysis

from detpipe.pictures.report_images import draw_outcome
from detpipe.pictures.report_page import report_page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    analysis = evil_analysis(("<b>run</b>", "other"))
    image = torch.full((3, 160, 160), 120, dtype=torch.uint8)
    drawings = [draw_outcome(image, outcome, list(EVIL)) for outcome in analysis.worst]
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_page(analysis.numbers, drawings), encoding="utf-8")
    return path


class Listener:
    """What a page complains about, and what it asks for."""

    def __init__(self, browser: Any, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.complaints.append("a dialog"))

    def open(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        return self.page

    def assert_quiet(self, path: Path) -> None:
        assert self.complaints == []
        asked = [url for url in self.requests if not url.startswith("data:image/jpeg;base64,")]
        assert asked == [path.as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_every_control_works_without_complaint(browser, report, width):
    listener = Listener(browser, width)
    page = listener.open(report)
    assert page.title() == "Evaluation report: <b>run</b>"
    for select in page.query_selector_all("select"):
        seen = set()
        values = select.eval_on_selector_all("option", "all => all.map(one => one.value)")
        assert len(values) >= 5
        for value in values:
            select.select_option(value)
            seen.add(page.inner_html("#pr-chart") + page.inner_html("#calibration-chart"))
        assert len(seen) == len(values)  # each choice draws another picture
    for slider in page.query_selector_all("input[type=range]"):
        before = page.inner_text("#pr-read")
        slider.focus()
        page.keyboard.press("End")
        assert page.inner_text("#pr-read") != before
    for button in page.query_selector_all("button"):
        button.click()
        button.click()
    for summary in page.query_selector_all("summary"):
        summary.click()
    for link in page.query_selector_all("nav a"):
        link.click()
        assert page.evaluate("location.hash") == link.get_attribute("href")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.eval_on_selector_all("img", "all => all.every(one => one.complete && one.naturalWidth > 100)")
    listener.assert_quiet(report)
    page.close()


def test_the_chart_says_what_the_numbers_say(browser, report):
    listener = Listener(browser, 1280)
    page = listener.open(report)
    numbers = evil_analysis(("<b>run</b>", "other")).numbers
    for index in range(4):
        page.select_option("#pr-class", str(index))
        for choice, iou in (("0", 0), ("5", 5)):
            page.select_option("#pr-iou", choice)
            legend = page.inner_text("#pr-legend")
            for name in ("<b>run</b>", "other"):
                expected = numbers["curves"][name]["AP"][index][iou]
                shown = float(legend.split(f"{name}: AP ")[1].split()[0])
                assert shown == pytest.approx(expected, abs=0.0015)
    page.select_option("#pr-class", "4")
    assert "AP unknown" in page.inner_text("#pr-legend")
    page.select_option("#pr-iou", "each")
    assert page.inner_text("#pr-legend").count("IoU") == 10
    read = page.inner_text("#calibration-read")
    assert f"{numbers['calibration']['diagrams'][0]['error']:.3f}" in read
    listener.assert_quiet(report)
    page.close()


def test_tables_sort_by_keyboard_and_unknown_stays_last(browser, report):
    listener = Listener(browser, 1280)
    page = listener.open(report)

    def column(index: int) -> list[str]:
        return page.eval_on_selector_all(
            ".sortable tbody tr", f"rows => rows.map(row => row.cells[{index}].firstElementChild.dataset.value)"
        )

    button = page.query_selector("button[data-column='3']")
    button.focus()
    page.keyboard.press("Enter")
    falling = column(3)
    assert falling[-1] == ""
    assert [float(one) for one in falling[:-1]] == sorted((float(one) for one in falling[:-1]), reverse=True)
    assert page.get_attribute(".sortable th:nth-child(4)", "aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert column(3)[:-1] == falling[:-1][::-1]
    assert column(3)[-1] == ""
    page.click("button[data-column='0']")
    assert sorted(column(0), key=str.lower) != []
    assert page.eval_on_selector_all("th[aria-sort]", "all => all.length") == 1
    listener.assert_quiet(report)
    page.close()


def test_every_control_is_reached_by_tab_and_has_a_name(browser, report):
    listener = Listener(browser, 1280)
    page = listener.open(report)
    wanted = page.eval_on_selector_all("a, button, select, input, summary, [tabindex]", "all => all.length")
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "[...document.querySelectorAll('a, button, select, input, summary, [tabindex]')].indexOf(document.activeElement)"
            )
        )
    visible = page.eval_on_selector_all(
        "a, button, select, input, summary, [tabindex]",
        "all => all.flatMap((one, i) => one.checkVisibility() ? [i] : [])",
    )
    assert set(visible) <= reached
    unnamed = page.eval_on_selector_all(
        "button, select, input, [role=region], [role=img]",
        "all => all.filter(one => !(one.textContent.trim() || one.labels?.length || one.getAttribute('aria-label'))).length",
    )
    assert unnamed == 0
    listener.assert_quiet(report)
    page.close()


def test_a_page_with_little_to_show_works_too(browser, tmp_path):
    numbers = evil_analysis().numbers | {"calibration": None, "comparison": None}
    path = tmp_path / "report.html"
    path.write_text(report_page(numbers, []), encoding="utf-8")
    listener = Listener(browser, 400)
    page = listener.open(path)
    assert page.inner_text("#pr-legend").startswith("<b>run</b>: AP")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    listener.assert_quiet(path)
    page.close()
