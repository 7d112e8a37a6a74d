import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from detpipe.datasets.workers import PackedBatch, collate, pack
from detpipe.types import Target

SIZES = ((4, 6), (5, 3), (1, 1))


def samples() -> tuple[list[Tensor], list[Target]]:
    random = np.random.default_rng(0)
    images = [torch.from_numpy(random.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1) for size in SIZES]
    targets = [
        Target(
            boxes=torch.rand(k, 4),
            labels=torch.arange(k) + 2**40,
            iscrowd=torch.arange(k) % 2 == 0,
            image_id=2**40 + k,
            file_name=f"ü{k}.jpg",
            content_size=SIZES[k],
        )
        for k in range(3)
    ]
    return images, targets


def assert_same(found: tuple[list[Tensor], list[Target]], wanted: tuple[list[Tensor], list[Target]]) -> None:
    assert len(found[0]) == len(wanted[0])
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.equal(one, other)
    for target, before in zip(found[1], wanted[1], strict=True):
        assert list(target) == list(before)
        for name, value in before.items():
            if isinstance(value, Tensor):
                assert torch.equal(target[name], value)  # type: ignore[literal-required]
                assert target[name].dtype == value.dtype  # type: ignore[literal-required]
            else:
                assert target[name] == value  # type: ignore[literal-required]


@pytest.mark.parametrize("channels_last", [True, False])
def test_what_is_packed_comes_out_as_it_was(channels_last: bool) -> None:
    images, targets = samples()
    given = images if channels_last else [image.contiguous() for image in images]
    packed = pack(given, targets)
    assert packed.pixels.is_shared()
    assert len(packed.pixels) == sum(image.numel() for image in images)
    found = packed.unpack()
    assert_same(found, (images, targets))
    for image in found[0]:
        assert image.untyped_storage().data_ptr() == packed.pixels.untyped_storage().data_ptr()  # nothing is copied
        assert image.permute(1, 2, 0).is_contiguous()


def test_in_the_main_process_nothing_is_copied() -> None:
    images, targets = samples()
    found = collate(list(zip(images, targets, strict=True)))
    assert not isinstance(found, PackedBatch)
    assert found[0][1] is images[1]
    assert found[1][2] is targets[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_hands_over_one_tensor_a_batch(workers: int) -> None:
    images, targets = samples()
    loader = DataLoader(list(zip(images, targets, strict=True)), 3, num_workers=workers, collate_fn=collate)
    [batch] = list(loader)
    assert isinstance(batch, PackedBatch) == bool(workers)
    found = batch.unpack() if isinstance(batch, PackedBatch) else batch
    assert_same(found, (images, targets))
    found[1][1]["boxes"].add_(1)  # may be written to


def test_all_pixels_are_pinned_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: what would be is noted instead."""
    pinned: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", note)
    images, targets = samples()
    packed = pack(images, targets)
    found = packed.pin_memory()
    assert_same(found, (images, targets))
    assert [tensor.dtype for tensor in pinned].count(torch.uint8) == 1
    assert pinned[0] is packed.pixels
    assert len(pinned) == 1 + sum(isinstance(v, Tensor) for target in targets for v in target.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_is_pinned() -> None:
    images, targets = samples()
    found = pack(images, targets).pin_memory()
    assert_same(found, (images, targets))
    assert all(image.is_pinned() for image in found[0])
    boxes = [target["boxes"] for target in found[1]]
    assert any(map(len, boxes))
    assert all(rows.is_pinned() for rows in boxes if len(rows))  # nothing cannot be pinned
