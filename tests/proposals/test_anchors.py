import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detpipe.proposals.anchors import Anchors


def slow(anchors: Anchors, cells, strides) -> list[list[float]]:
    """The definition: levels, rows, columns, ratios, sizes."""
    boxes = []
    for (height, width), stride, sizes in zip(cells, strides, anchors.level_sizes(strides), strict=True):
        for row in range(height):
            for column in range(width):
                x, y = (column + anchors.offset) * stride, (row + anchors.offset) * stride
                for ratio in anchors.ratios:
                    for size in sizes:
                        half_width, half_height = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
                        boxes.append([x - half_width, y - half_height, x + half_width, y + half_height])
    return boxes


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
def test_anchors_equal_a_slow_loop(offset):
    anchors = Anchors(sizes=[[20, 33], [64, 90]], ratios=[0.5, 1, 2.5], offset=offset)
    cells, strides = [(3, 5), (2, 1)], [8, 16]
    grids = anchors.grids(cells, strides)
    assert [grid.count for grid in grids] == [3 * 5 * 6, 2 * 6]
    assert [grid.size for grid in grids] == cells
    assert anchors.per_cell(strides) == 6
    boxes = torch.cat([grid.boxes() for grid in grids])
    torch.testing.assert_close(boxes, torch.tensor(slow(anchors, cells, strides)), rtol=0, atol=1e-4)


def test_anchors_by_hand():
    # stride 10, a map of 1 x 2 cells: centers (5, 5) and (15, 5); 8 x 8, then 4 wide and 16 high
    [grid] = Anchors(sizes=[[8]], ratios=[1, 4]).grids([(1, 2)], [10])
    assert grid.boxes().tolist() == [[1, 1, 9, 9], [3, -3, 7, 13], [11, 1, 19, 9], [13, -3, 17, 13]]


@pytest.mark.parametrize("levels", [1, 3])
def test_torchvisions_anchors_by_option(levels):
    sizes = [[32, 64, 128, 256, 512], [50, 60, 70, 80, 90], [1, 2, 3, 4, 5]][:levels]
    strides = [8, 16, 32][:levels]
    ratios = (0.5, 1.0, 2.0)
    features = [torch.zeros(1, 1, 96 // stride, 160 // stride) for stride in strides]
    generator = AnchorGenerator(tuple(map(tuple, sizes)), (ratios,) * levels)
    [theirs] = generator(ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)]), features)
    grids = Anchors(sizes, ratios, offset=0, rounded=True).grids([tuple(f.shape[2:]) for f in features], strides)
    assert torch.equal(torch.cat([grid.boxes() for grid in grids]), theirs)


def test_sizes_follow_the_strides_by_default():
    assert Anchors().level_sizes([16]) == [[128, 256, 512]]  # those of Ren et al.
    assert Anchors().level_sizes([4, 8, 16, 32, 64]) == [[32], [64], [128], [256], [512]]  # those of Lin et al.
    assert Anchors().per_cell([16]) == 9
    assert Anchors().per_cell([4, 8]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": []}, "ratios above 0"),
        ({"ratios": [0]}, "ratios above 0"),
        ({"ratios": [math.nan]}, "ratios above 0"),
        ({"sizes": []}, "sizes above 0"),
        ({"sizes": [[-1]]}, "sizes above 0"),
        ({"sizes": [[math.inf]]}, "sizes above 0"),
        ({"sizes": [[]]}, "as many sizes"),
        ({"sizes": [8, 0]}, "sizes above 0"),
        ({"sizes": [8, [16]]}, "not both"),
        ({"sizes": [[8], [8, 16]]}, "as many sizes"),
        ({"offset": 2}, "offset must be in 0..1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Anchors(**arguments)


def test_flat_sizes_are_dealt_in_their_order():
    assert Anchors(sizes=[8, 9, 40, 70]).level_sizes([16]) == [[8, 9, 40, 70]]
    assert Anchors(sizes=[8, 9, 40, 70]).level_sizes([4, 8]) == [[8, 9], [40, 70]]
    assert Anchors(sizes=[8, 9, 40, 70]).per_cell([4, 8]) == 6
    with pytest.raises(ValueError, match=r"4 anchor sizes cannot be dealt to 3 levels.* multiple of 3"):
        Anchors(sizes=[8, 9, 40, 70]).per_cell([4, 8, 16])


def test_sizes_for_other_levels():
    with pytest.raises(ValueError, match="given for 1 levels, but there are 2"):
        Anchors(sizes=[[8]]).grids([(1, 1), (1, 1)], [8, 16])


def test_measured_strides_are_those_of_torchvision_by_axis():
    theirs = AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0),) * 2)
    ours = Anchors(sizes=[[8.0], [16.0]], offset=0.0, rounded=True, measured=True)
    for side in ((96, 160), (100, 130), (33, 200)):
        cells = [(-(-side[0] // 16), -(-side[1] // 16)), (-(-side[0] // 32), -(-side[1] // 32))]
        images = ImageList(torch.zeros(1, 3, *side), [side])
        [wanted] = theirs(images, [torch.zeros(1, 1, *size) for size in cells])
        given = torch.cat([grid.boxes() for grid in ours.grids(cells, [16, 32], batch=side)])
        assert torch.equal(given, wanted)
    with pytest.raises(ValueError, match="measured strides need the height and width of the batch"):
        ours.grids(cells, [16, 32])
