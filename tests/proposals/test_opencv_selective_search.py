import cv2
import numpy as np

from detpipe.proposals import OpenCVSelectiveSearch
from detpipe.proposals.opencv_selective_search import MODES

from .needs import PLACES, contrib, planted


@contrib
def test_all_of_opencvs_boxes_are_there():
    image = planted(PLACES[0])
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
    search.switchToSelectiveSearchFast(150, 150, 0.8)
    theirs = {(x, y, x + w, y + h) for x, y, w, h in np.asarray(search.process()).tolist()}
    ours, _ = OpenCVSelectiveSearch(max_boxes=None, min_size=0).propose(image)
    assert {tuple(map(int, box)) for box in ours.tolist()} == theirs
    other, _ = OpenCVSelectiveSearch(max_boxes=None, min_size=0, seed=1).propose(image)
    assert not np.array_equal(ours, other)
    assert {tuple(map(int, box)) for box in other.tolist()} == theirs


@contrib
def test_modes_from_few_to_many_boxes():
    image = np.random.default_rng(1).integers(0, 256, (20, 24, 3)).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    counts = [len(OpenCVSelectiveSearch(mode, max_boxes=None).propose(image)[0]) for mode in MODES]
    assert 0 < counts[0] < counts[1] < counts[2]
