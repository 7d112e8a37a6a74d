import math

import pytest
import torch

from detpipe.roi_pooling import precise_roi_pool, roi_align, roi_max_pool, rotated_roi_align
from detpipe.roi_pooling.layouts import LayoutError, read_boxes, read_output_size, to_rois

FEATURES = torch.zeros(2, 3, 8, 8)
BOX = [1.0, 2.0, 5.0, 4.0]


def boxes_with(row, box):
    boxes = torch.tensor([BOX] * 5)
    boxes[row] = torch.tensor(box)
    return boxes


def test_three_layouts_agree():
    boxes = torch.rand(2, 4, 4)
    boxes[..., 2:] += 1
    padded = read_boxes(boxes, FEATURES)
    listed = read_boxes([boxes[0], boxes[1]], FEATURES)
    rows = read_boxes(to_rois(boxes), FEATURES)
    assert (padded.lead, listed.lead, rows.lead) == ((2, 4), (8,), (8,))
    for read in (padded, listed, rows):
        assert read.image.tolist() == [0] * 4 + [1] * 4
        assert torch.equal(read.boxes, boxes.flatten(0, 1))


def test_unequal_lists_and_empty_ones():
    read = read_boxes([torch.zeros(0, 4), torch.tensor([BOX, BOX])], FEATURES)
    assert read.image.tolist() == [1, 1]
    assert read_boxes([torch.zeros(0, 4)] * 2, FEATURES).boxes.shape == (0, 4)
    assert read_boxes([], FEATURES[:0]).boxes.shape == (0, 4)


def test_precision_is_that_of_the_features_but_float32_at_least():
    boxes = torch.tensor([[BOX], [BOX]])
    assert read_boxes(boxes.double(), FEATURES).boxes.dtype == torch.float32
    assert read_boxes(boxes, FEATURES.double()).boxes.dtype == torch.float64
    assert read_boxes(boxes.half(), FEATURES.half()).boxes.dtype == torch.float32


def test_gradients_pass():
    boxes = torch.tensor([BOX], requires_grad=True)
    (read_boxes([boxes, boxes], FEATURES).boxes * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert boxes.grad.tolist() == [[2, 4, 6, 8]]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([1.0, math.nan, 5.0, 4.0], r"boxes: box 3, \(x1, y1, x2, y2\) = \[1.0, nan, 5.0, 4.0\], is not finite"),
        ([1.0, 2.0, math.inf, 4.0], "box 3.*is not finite"),
        ([-math.inf, 2.0, 5.0, 4.0], "box 3.*is not finite"),
        ([math.inf, 2.0, math.inf, 4.0], "box 3.*is not finite"),
        ([1.0, 2.0, 1.0, 4.0], "box 3.*has no area"),
        ([1.0, 2.0, 5.0, 1.0], "box 3.*has no area"),
    ],
)
def test_the_first_bad_box_is_named(box, message):
    boxes = boxes_with(3, box)
    boxes[4] = math.nan
    image = torch.zeros(5, 1)
    for given in (torch.cat((image, boxes), dim=1), [boxes, boxes[:0]], torch.stack((boxes, boxes))):
        with pytest.raises(ValueError, match=message):
            read_boxes(given, FEATURES)


@pytest.mark.parametrize("index", [2.0, -1.0, 0.5, math.nan])
def test_the_first_bad_image_index_is_named(index):
    rois = torch.tensor([[0.0, *BOX], [index, *BOX]])
    with pytest.raises(ValueError, match=rf"box 1 has image index {index:g}, expected a whole number in 0..1"):
        read_boxes(rois, FEATURES)


@pytest.mark.parametrize(
    "boxes",
    [
        torch.zeros(3, 4),
        torch.zeros(2, 3, 5),
        torch.zeros(4),
        [torch.zeros(3, 5)] * 2,
        [torch.zeros(4)] * 2,
        [[BOX]] * 2,
    ],
)
def test_other_layouts_are_refused(boxes):
    with pytest.raises(LayoutError, match=r"boxes(\[0\])? must be"):
        read_boxes(boxes, FEATURES)
    assert issubclass(LayoutError, ValueError)
    assert issubclass(LayoutError, AssertionError)


def test_rotated_boxes_have_five_sides():
    sides = "cx, cy, w, h, angle"
    assert read_boxes(torch.tensor([[1, 5.0, 5, 2, 3, -40]]), FEATURES, sides).boxes.tolist() == [[5, 5, 2, 3, -40]]
    with pytest.raises(ValueError, match=r"box 0.*has no area"):
        read_boxes(torch.tensor([[1, 5.0, 5, 2, 0, 30]]), FEATURES, sides)
    with pytest.raises(ValueError, match=r"box 0.*is not finite"):
        read_boxes(torch.tensor([[1, 5.0, 5, 2, 1, math.nan]]), FEATURES, sides)


def test_mismatches_are_named():
    with pytest.raises(ValueError, match="one tensor an image: 1 for 2 images"):
        read_boxes([torch.tensor([BOX])], FEATURES)
    with pytest.raises(ValueError, match="are of 3 images, features of 2"):
        read_boxes(torch.tensor([[BOX]] * 3), FEATURES)
    with pytest.raises(ValueError, match=r"boxes must be floating-point, got torch.int64"):
        read_boxes(torch.zeros(2, 5, dtype=torch.int64), FEATURES)
    with pytest.raises(ValueError, match=r"boxes\[1\] must be floating-point"):
        read_boxes([torch.tensor([BOX]), torch.zeros(1, 4, dtype=torch.int64)], FEATURES)
    with pytest.raises(ValueError, match="on meta and the features on cpu"):
        read_boxes(torch.zeros(2, 5, device="meta"), FEATURES)


def test_output_sizes():
    assert read_output_size(3) == (3, 3)
    assert read_output_size([2, 5]) == (2, 5)
    for bad in (0, -1, (3, 0), (1, 2, 3), (2.0, 2), True):
        with pytest.raises(ValueError, match="output_size must be one or two positive whole numbers"):
            read_output_size(bad)


@pytest.mark.parametrize("image", [[], [1.0]])
def test_checks_are_a_proper_operator(image):
    boxes = torch.tensor([image + BOX] * 2)
    torch.library.opcheck(torch.ops.detpipe.checked_boxes.default, (boxes, 2, "x1, y1, x2, y2"))


@pytest.mark.parametrize("call", [roi_align, precise_roi_pool, roi_max_pool, rotated_roi_align])
@pytest.mark.parametrize("name", ["features", "boxes"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # of torch.func.jvp's own
def test_forward_mode_is_refused_instead_of_a_derivative_of_zero(call, name):
    box = torch.tensor([[[3.0, 3, 6, 5, 20.0][: 5 if call is rotated_roi_align else 4]]])
    given = {"features": torch.rand(1, 2, 8, 8), "boxes": box}
    with pytest.raises(NotImplementedError, match=f"{name}: no forward-mode derivatives"):
        torch.func.jvp(lambda one: call(**{**given, name: one}, output_size=2), (given[name],), (given[name],))
