"""The program of a detector, run as it is, finds what the detector finds; and what has no graph is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from detpipe.exporting.parity import compare, sample_images
from detpipe.exporting.program import OUTPUTS, Program
from detpipe.heads import Postprocess
from detpipe.prediction.onnx_detector import by_image
from detpipe.proposals import DenseGrid
from detpipe.roi_pooling import PreciseRoIPool, RoIAlign, RoIMaxPool
from detpipe.support.errors import UsageError
from export.detectors import detector

KINDS = ["plain", "fpn cascade", "glimpse", "fpn aod", "agnostic", "boxes", "four", "plain torchvision"]


@pytest.mark.parametrize("kind", KINDS)
def test_finds_what_the_detector_finds(kind):
    model = detector(kind)
    program = Program(model)

    def run(images: Any, boxes: Any) -> list[dict[str, Any]]:
        given = [torch.from_numpy(one) for one in (images, boxes) if one is not None]
        return by_image(program.outputs, [values.numpy() for values in program(*given)])

    parity = compare(model, run, sample_images(model), program.takes_boxes)
    assert parity.faults == ()
    assert parity.images == 10
    assert parity.detections > 30


@pytest.mark.slow
def test_compiles_as_one_graph():
    model = detector("fpn")
    program = Program(model)
    compiled = torch.compile(program, fullgraph=True, backend="eager")
    for batch in sample_images(model)[1:3]:
        torch.testing.assert_close(compiled(batch), program(batch))


def test_rows_behind_the_count_are_zero():
    model = detector()
    images = torch.cat(
        [sample_images(model)[5], torch.zeros(1, 3, *sample_images(model)[5].shape[2:], dtype=torch.uint8)]
    )
    boxes, scores, labels, count = Program(model)(images)
    absent = torch.arange(boxes.shape[1]) >= count[:, None]
    assert absent.any()
    assert not any(values[absent].any() for values in (boxes, scores, labels))
    assert (labels[~absent] > 0).all()


def test_boxes_without_area_and_repeated_ones_do_not_count():
    model = detector("boxes")
    [image] = sample_images(model)[0]
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 60.0, 20.0]])
    expected = model([image], [{"proposals": boxes[[0, 3]]}])[0]
    [found] = by_image(OUTPUTS, [values.numpy() for values in Program(model)(image[None], boxes[None])])
    assert len(expected["scores"]) > 0
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-6)


def test_vectors_are_what_the_classifier_is_given():
    model = detector("plain")
    [batch, *_] = sample_images(model)
    _, scores, labels, count, vectors = Program(model, gives_vectors=True)(batch)
    again = torch.softmax(model.head.classifier(vectors), dim=-1)
    own = again.gather(2, labels[..., None])[..., 0]
    assert count.item() > 0
    torch.testing.assert_close(own[0, : count[0]], scores[0, : count[0]])


class OwnHead(torch.nn.Module):
    def forward(self, features, proposals, image_sizes, targets=None): ...


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: setattr(d, "head", OwnHead()), "the head OwnHead cannot be written as a graph"),
        (
            lambda d: setattr(d, "proposals", DenseGrid([32])),
            "DenseGrid cannot be written as a graph; let boxes be an input: --boxes",
        ),
        (lambda d: setattr(d.head, "pooler", PreciseRoIPool(4)), "the pooler PreciseRoIPool cannot"),
        (lambda d: setattr(d.head, "pooler", RoIMaxPool(4, "equal_step")), "RoIMaxPool with bins='equal_step' cannot"),
        (lambda d: setattr(d.head, "pooler", RoIAlign(4, reduce="max")), "RoIAlign with reduce='max' cannot"),
        (
            lambda d: setattr(d.head, "postprocess", Postprocess(suppression="soft_nms")),
            "suppression 'soft_nms' takes as many steps",
        ),
    ],
)
def test_names_what_has_no_graph(change, message):
    model = detector()
    change(model)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        Program(model)
