import pytest
import torch
from samples import random_boxes

from detpipe.boxes import encode, iou
from detpipe.proposals import rpn_selection as module
from detpipe.proposals.rpn_selection import NotFiniteError, ProposalSelection

LEVELS, SIZES = [30, 12, 1], [(60, 80), (40, 50)]


def inputs(images: int = 2):
    anchors = random_boxes(sum(LEVELS), smallest=10)
    logits = torch.randn(images, len(anchors))
    deltas = encode(
        random_boxes(images * len(anchors), 70, 90, smallest=8).view(images, -1, 4), anchors, module.WEIGHTS
    )
    return logits, deltas, anchors


def slow(selection: ProposalSelection, logits, deltas, anchors, sizes, training):
    """The definition, box by box: ``(score, box)`` of each image, best first."""
    phase = 0 if training else 1
    images = []
    for image, (height, width) in enumerate(sizes):
        found, start = [], 0
        for count in LEVELS:
            rows = sorted(range(start, start + count), key=lambda row: -logits[image, row].item())
            kept = []
            for row in rows[: selection.pre_nms_top_n[phase]]:
                x1, y1, x2, y2 = anchors[row].tolist()
                dx, dy, dw, dh = deltas[image, row].tolist()
                x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
                w, h = (x2 - x1) * 2.718281828459045**dw, (y2 - y1) * 2.718281828459045**dh
                box = [
                    min(max(edge, 0), side)
                    for edge, side in zip(
                        (x - w / 2, y - h / 2, x + w / 2, y + h / 2), (width, height, width, height), strict=True
                    )
                ]
                if box[2] - box[0] <= selection.min_size or box[3] - box[1] <= selection.min_size:
                    continue
                if all(iou(torch.tensor([box]), torch.tensor([other])) <= selection.nms_iou for _, other in kept):
                    kept.append((logits[image, row].item(), box))
            found += kept
            start += count
        images.append(sorted(found, key=lambda pair: -pair[0])[: selection.post_nms_top_n[phase]])
    return images


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("min_size", [0.001, 10.0])
def test_selection_equals_a_slow_loop(training, min_size):
    selection = ProposalSelection((20, 8), (14, 9), nms_iou=0.3, min_size=min_size)
    logits, deltas, anchors = inputs()
    boxes, scores = selection(logits, deltas, anchors, LEVELS, SIZES, training)
    expected = slow(selection, logits, deltas, anchors, SIZES, training)
    assert sum(map(len, expected)) > 1
    for found, values, pairs in zip(boxes, scores, expected, strict=True):
        torch.testing.assert_close(values, torch.tensor([score for score, _ in pairs]))
        torch.testing.assert_close(found, torch.tensor([box for _, box in pairs]).view(-1, 4), rtol=1e-4, atol=1e-3)


def test_filled_up_it_has_the_same_boxes_and_then_some_without_area():
    logits, deltas, anchors = inputs(3)
    logits[0, 3] = torch.nan  # nobody looks
    sizes = [*SIZES, (70, 90)]
    selection = ProposalSelection((20, 8), (25, 100), nms_iou=0.3)
    filled, _ = selection(logits, deltas, anchors, LEVELS, sizes, training=True, fill_up=True)
    logits[0, 3] = 0.0
    deltas[0, 3] = torch.nan
    filled = [selection(logits, deltas, anchors, LEVELS, sizes, True, fill_up=True)[0][0], *filled[1:]]
    deltas[0, 3], anchors[3] = 0.0, torch.tensor([0.0, 0.0, 1e-4, 1e-4])  # one that is dropped
    found, _ = selection(logits, deltas, anchors, LEVELS, sizes, training=True)
    for got, want in zip(filled, found, strict=True):
        assert 5 < len(want) <= len(got) == 25
        assert torch.equal(got[: len(want)], want)
        assert not got[len(want) :].any()


def test_compiled_it_tells_what_fills_a_small_level_up_from_what_is_not_finite(monkeypatch):
    logits, deltas, anchors = inputs(2)
    selection = ProposalSelection((2000, 2000), (50, 50))
    expected, _ = selection(logits, deltas, anchors, LEVELS, SIZES, training=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, _ = selection(logits, deltas, anchors, LEVELS, SIZES, training=False)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)
    logits[1, 3] = -torch.inf
    with pytest.raises(NotFiniteError, match="image 1: a score is -inf"):
        selection(logits, deltas, anchors, LEVELS, SIZES, training=False)


def test_equal_scores_keep_the_order_of_the_levels():
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [20.0, 0.0, 28.0, 8.0], [40.0, 0.0, 48.0, 8.0]])
    for _ in range(3):
        boxes, _ = ProposalSelection()(
            torch.zeros(1, 3), torch.zeros(1, 3, 4), anchors, [1, 1, 1], [(60, 60)], training=False
        )
        assert torch.equal(boxes[0], anchors)


def test_an_image_does_not_depend_on_its_neighbors():
    logits, deltas, anchors = inputs(2)
    selection = ProposalSelection((20, 20), (10, 10), nms_iou=0.5)
    together = selection(logits, deltas, anchors, LEVELS, SIZES, training=False)
    for image in range(2):
        one = slice(image, image + 1)
        alone = selection(logits[one], deltas[one], anchors, LEVELS, SIZES[one], training=False)
        assert torch.equal(alone[0][0], together[0][image])
        assert torch.equal(alone[1][0], together[1][image])


def test_nothing_left():
    logits, deltas, anchors = inputs()
    boxes, scores = ProposalSelection(min_size=500)(logits, deltas, anchors, LEVELS, SIZES, training=True)
    assert [row.shape for row in boxes] == [(0, 4), (0, 4)]
    assert [row.shape for row in scores] == [(0,), (0,)]
    far = anchors + 1000  # outside the image: clipped to nothing
    boxes, _ = ProposalSelection()(logits, torch.zeros_like(deltas), far, LEVELS, SIZES, training=True)
    assert [row.shape for row in boxes] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["score", "box"])
def test_not_finite(value, what):
    logits, deltas, anchors = inputs()
    (logits if what == "score" else deltas)[1, 3] = value
    with pytest.raises(NotFiniteError, match=f"image 1: a {what} is {value}") as caught:
        ProposalSelection()(logits, deltas, anchors, LEVELS, SIZES, training=True)
    assert caught.value.image == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pre_nms_top_n": (0, 10)}, "pre_nms_top_n must be at least 1"),
        ({"post_nms_top_n": (10,)}, "two numbers each"),
        ({"nms_iou": 0.0}, "nms_iou must be in 0..1, above 0"),
        ({"min_size": -1.0}, "min_size must not be negative"),
        ({"min_size": float("nan")}, "min_size must not be negative or infinite, got nan"),
        ({"score_threshold": 1.5}, "score_threshold must be in 0..1"),
        ({"rank_by": "score"}, "rank_by must be"),
        ({"frozen_as": "test"}, "frozen_as must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProposalSelection(**arguments)


def test_a_threshold_of_probability_and_ranks_in_which_high_logits_are_equal():
    boxes = torch.tensor(
        [[0.0, 0.0, 9.0, 9.0], [20.0, 0.0, 29.0, 9.0], [0.0, 20.0, 9.0, 29.0], [20.0, 20.0, 29.0, 29.0]]
    )
    logits, deltas = torch.tensor([[30.0, -1.0, 40.0, 0.0]]), torch.zeros(1, 4, 4)

    def order(**settings) -> list[float]:
        selection = ProposalSelection(**settings)
        return selection(logits, deltas, boxes, [2, 2], [(40, 40)], training=False)[1][0].tolist()

    assert order() == [40.0, 30.0, 0.0, -1.0]
    assert order(score_threshold=0.5) == [40.0, 30.0, 0.0]  # the sigmoid of 0 is .5: at least
    assert order(rank_by="probability") == [30.0, 40.0, 0.0, -1.0]  # equal in float32: the first level comes first
