from __future__ import annotations

import pytest
import torch

from detpipe.evaluation import concatenate, evaluate_coco, pack
from detpipe.types import Detection

from .builders import truth


def detection(count: int, seed: int = 0) -> Detection:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat((corner, corner + 10), dim=1).requires_grad_()
    return {"boxes": boxes, "scores": torch.rand(count, generator=generator), "labels": torch.full((count,), 2)}


def test_values_are_kept_exactly() -> None:
    first, none, second = detection(3, 1), detection(0), detection(2, 2)
    packed = pack([first, none, second], [8, 4, 2**40])
    assert packed.image_ids.tolist() == [8, 8, 8, 2**40, 2**40]
    assert packed.boxes.tolist() == [*first["boxes"].tolist(), *second["boxes"].tolist()]
    assert packed.scores.tolist() == [*first["scores"].tolist(), *second["scores"].tolist()]
    assert packed.labels.tolist() == [2] * 5
    assert (packed.boxes.dtype, packed.labels.dtype, packed.image_ids.dtype) == ("float64", "int64", "int64")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_come_from_the_gpu() -> None:
    here = detection(3, 1)
    there: Detection = {key: value.detach().cuda() for key, value in here.items()}  # type: ignore[assignment]
    assert pack([there], [8]).boxes.tolist() == here["boxes"].tolist()


def test_nothing_packs_to_nothing_and_can_be_evaluated() -> None:
    annotations = truth([(1, 1, (0, 0, 9, 9))], [1])
    for empty in (pack([], []), pack([detection(0)], [1]), concatenate([])):
        assert empty.boxes.shape == (0, 4)
        assert evaluate_coco(annotations, empty)["AP"] == 0.0


def test_faulty_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 images and 2 ids"):
        pack([detection(1)], [1, 2])
    with pytest.raises(ValueError, match=r"must differ.*\[1, 1\]"):
        pack([detection(1), detection(1)], [1, 1])
    with pytest.raises(ValueError, match="image id 7: boxes, scores and labels must be equally many"):
        pack([{**detection(2), "scores": torch.rand(3)}], [7])


def test_parts_are_joined_and_repeated_images_dropped_on_request() -> None:
    first, second = pack([detection(2, 1), detection(1, 2)], [1, 2]), pack([detection(1, 2), detection(3, 3)], [2, 3])
    assert concatenate([first, second]).image_ids.tolist() == [1, 1, 2, 2, 3, 3, 3]
    once = concatenate([first, second], drop_repeated_images=True)
    assert once.image_ids.tolist() == [1, 1, 2, 3, 3, 3]
    assert once.boxes.tolist() == [*first.boxes.tolist(), *second.boxes[1:].tolist()]
