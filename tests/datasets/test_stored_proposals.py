import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from detpipe.datasets import COCO, Augment
from detpipe.datasets.stored_proposals import StoredProposals, coco_key, voc_key
from detpipe.demo import Demo, DemoScenes
from detpipe.proposal_files import write_store
from detpipe.support.errors import DataError

from .builders import coco_content, write_coco

SIZES = ((40, 60), (60, 40), (30, 50))


def store_for(data, path, split="train", box=(1, 2, 11, 22), **changes):
    annotations = data.annotations(split)
    records = [
        (data.image_key(annotations, row), np.array([box, (0, 0, 5, 5)]), [0.9, 0.5], tuple(size))
        for row, size in enumerate(annotations.sizes.tolist())
    ]
    write_store(path, records, "by hand", {})
    return path


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, coco_content(SIZES), split)
    return COCO(str(tmp_path), "train", "val", augment=Augment(flip=1.0))


def test_boxes_of_the_store_ride_in_the_targets(data, tmp_path):
    path = store_for(data, tmp_path / "boxes.safetensors")
    with_store = COCO(data.root, "train", "val", augment=data.augment, proposals={"train": str(path)})
    with_store.setup("fit")
    _, target = with_store.dataset("train", augmented=True)[0, 0]
    torch.testing.assert_close(target["proposals"], torch.tensor([[49.0, 2, 59, 22], [55, 0, 60, 5]]))
    assert "proposals" not in with_store.dataset("val")[0, 0][1]
    again = pickle.loads(pickle.dumps(with_store.dataset("train")))
    assert torch.equal(again[0, 1][1]["proposals"], torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]))


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_images_are_found_by_what_their_format_calls_them(tmp_path, layout):
    data = Demo(str(tmp_path), layout, scenes=DemoScenes(train=4, val=4, size=64))
    annotations = data.annotations("val")
    path = store_for(data, tmp_path / "boxes.safetensors", "val")
    proposals = StoredProposals(path, annotations, data.image_key)
    assert list(proposals) == annotations.image_ids.tolist()
    assert len(proposals) == len(annotations)
    assert all(proposals[image_id].tolist() == [[1, 2, 11, 22], [0, 0, 5, 5]] for image_id in proposals)
    assert 10**9 not in proposals


def test_keys(data):
    annotations = data.annotations("train")
    assert coco_key(annotations, 1) == str(annotations.image_ids[1])
    assert (
        voc_key(annotations, 1) == annotations.file_names[1] == "1.jpg"
    )  # several folders may have images of one name
    in_voc = replace(annotations, file_names=np.array([f"JPEGImages/{name}" for name in annotations.file_names]))
    assert voc_key(in_voc, 1) == "1"


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [
        (["12"], (30, 50), r"x\.safetensors: no proposals for 2 of 3 images: the first are '10', '11'"),
        (["10", "11", "12"], (400, 600), r"x\.safetensors: 3 of 3 images have another size"),
    ],
)
def test_a_store_of_other_images_is_refused(data, tmp_path, ids, size, message):
    records = [(name, np.array([[0, 0, 5, 5]]), [1.0], size) for name in ids]
    store = write_store(tmp_path / "x.safetensors", records, "by hand", {})
    with pytest.raises(DataError, match=message):
        COCO(data.root, "train", "val", proposals={"train": str(store.path)}).setup("fit")


def test_unknown_splits_are_refused(data):
    with pytest.raises(ValueError, match=r"proposals names the splits \['trian'\]: expected train, val or test"):
        COCO(data.root, "train", "val", proposals={"trian": "boxes.safetensors"})
