from __future__ import annotations

import pytest

from detpipe.evaluation import PROTOCOLS, evaluate, format_table

from .builders import perfect, truth
from .test_lvis import federated


def test_every_number_and_class_stands_in_the_table():
    classes = [f"class number {k}" for k in range(23)]
    annotations = federated(truth([(1, k, (0, 0, 10 * k, 10)) for k in range(1, 23)], [1], classes), [], [], "f" * 23)
    for protocol in PROTOCOLS:
        metrics = evaluate(annotations, perfect(annotations), protocol)
        text = format_table(metrics, protocol)
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        for name, value in metrics.items():
            if name != "per_class":
                line = next(line for line in lines if line.split()[0] == name)
                assert line.split()[1] == ("-" if value < 0 else f"{value:.3f}")
        for name, value in metrics["per_class"].items():
            assert sum(f"{name}  " in line for line in lines) == 1, name
            assert any(f"{name}  " in line and ("-" if value < 0 else f"{value:.3f}") in line for line in lines)
        assert text.count("\n") < 26  # classes stand in columns


def test_columns_are_filled_from_top_to_bottom():
    per_class = {f"{'x' * 20}{k}": k / 10 for k in range(5)}
    lines = format_table({"mAP": 0.5, "per_class": per_class}, "voc10").splitlines()[3:]
    assert [line.split()[0][-1] for line in lines] == ["0", "1"]
    assert [name[-1] for name in lines[0].split()[::2]] == ["0", "2", "4"]


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="got 'voc'"):
        format_table({"mAP": 0.5, "per_class": {}}, "voc")
