from __future__ import annotations

import pytest

from detpipe.evaluation import PROTOCOLS, evaluate, evaluate_coco, evaluate_lvis, evaluate_voc
from detpipe.support.errors import DataError

from .builders import found, truth
from .test_lvis import federated

TRUTH = truth([(1, 1, (0, 0, 10, 10)), (1, 2, (20, 0, 30, 10))], [1, 2], "ab")
FOUND = found([(1, 1, 0.9, (0, 0, 10, 5)), (1, 2, 0.8, (20, 0, 30, 10)), (2, 2, 0.9, (0, 0, 3, 3))])


def test_each_name_calls_its_protocol():
    assert PROTOCOLS == ("coco", "voc07", "voc10", "lvis")
    assert evaluate(TRUTH, FOUND) == evaluate(TRUTH, FOUND, "coco") == evaluate_coco(TRUTH, FOUND)
    assert evaluate(TRUTH, FOUND, "coco", backend="pycocotools") == evaluate_coco(TRUTH, FOUND, "pycocotools")
    assert evaluate(TRUTH, FOUND, "voc07") == evaluate_voc(TRUTH, FOUND, "voc07")
    assert evaluate(TRUTH, FOUND, "voc10") == evaluate_voc(TRUTH, FOUND, "voc10")
    searched = federated(TRUTH, [(2, 2)], [], "ff")
    assert evaluate(searched, FOUND, "lvis") == evaluate_lvis(searched, FOUND)
    with pytest.raises(DataError, match="evaluate by the protocol 'coco'"):
        evaluate(TRUTH, FOUND, "lvis")
    assert evaluate(TRUTH, FOUND, "voc10", strict=True)["per_class"]["a"] == 0.0
    assert evaluate(TRUTH, FOUND, "voc10", iou_threshold=0.6)["per_class"]["a"] == 0.0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="one of coco, voc07, voc10, lvis; got 'voc'"):
        evaluate(TRUTH, FOUND, "voc")
