"""What an analysis computes, and how often."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detpipe.evaluation import analysis, coco, comparison, evaluate
from detpipe.evaluation.analysis import AnalysisSettings, analyze
from detpipe.evaluation.table import plain

from .builders import jittered
from .test_comparison import some_truth


@pytest.mark.parametrize(("protocol", "others"), [("coco", 0), ("voc10", 2)])
def test_each_run_is_matched_once_by_the_rules_of_a_protocol(protocol, others, monkeypatch):
    annotations = some_truth()
    runs = {"one": jittered(annotations, 1, extra=20), "two": jittered(annotations, 2, extra=40)}
    expected = evaluate(annotations, runs["one"], protocol)
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *arguments, **settings: (calls.append(name), function(*arguments, **settings))[1]

    for module in (analysis, coco, comparison):
        monkeypatch.setattr(module, "match", counted("coco", module.match))
    monkeypatch.setattr(comparison, "match_voc", counted("voc", comparison.match_voc))
    numbers = analyze(annotations, runs, AnalysisSettings(protocol, resamples=5)).numbers
    assert (calls.count("coco"), calls.count("voc")) == (2, others)
    assert numbers["metrics"] == plain(expected)
    if protocol == "coco":
        size, *_ = numbers["sizes"]
        assert [size["AP"], size["AP50"]] == pytest.approx([expected["AP"], expected["AP50"]], abs=1e-12)
        assert numbers["errors"]["AP50"] == pytest.approx(expected["AP50"], abs=1e-12)
        by_class = np.array(numbers["curves"]["one"]["AP"][1:]).mean(axis=1)
        assert by_class == pytest.approx(list(expected["per_class"].values()), abs=1e-12)
        assert numbers["comparison"]["runs"][0]["metrics"]["AP"]["value"] == pytest.approx(expected["AP"], abs=1e-12)


def test_nothing_to_analyze_is_refused():
    with pytest.raises(ValueError, match="there must be at least one run to analyze"):
        analyze(some_truth(), {})
