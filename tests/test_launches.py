"""What a training step asks of a device: nothing that makes the host wait for it, and no more operations for more images."""

from __future__ import annotations

import runpy
from collections.abc import Callable

import pytest
import runs
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

launches = runpy.run_path(str(runs.CONFIGS.parent / "benchmarks" / "launches.py"))
CONFIGS = {
    "main job": ["fast_rcnn_se.yaml"],
    "pyramid": ["fast_rcnn_se.yaml", "backbones/se_resnet50_fpn.yaml"],
    "glimpse": ["fast_rcnn_se_stn.yaml"],
    "attentional": ["aod.yaml"],
    "cascade": ["cascade.yaml"],
}
SIZE = (64, 96)

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "truth": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copied from the host": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_seen(name: str) -> None:
    counter = launches["Launches"]("cuda")
    try:
        with FakeTensorMode(), counter:
            WAITS[name](torch.ones(3, device="cuda"))
    except (DataDependentOutputException, DynamicOutputShapeException):
        return
    assert counter.waits.total() == 1


def test_what_does_not_wait_is_not() -> None:
    counter = launches["Launches"]("cuda")
    with FakeTensorMode(), counter:
        x = torch.ones(3, device="cuda")
        torch.zeros(3).to(x.device, non_blocking=True)
        x[torch.zeros(2, dtype=torch.int64, device="cuda")] + x.new_full((2,), 2.0)
        x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda"), output_size=3)
    assert not counter.waits
    assert counter.forward == {"elsewhere": 9}  # ones twice, copy, zeros, index, full, sum, two of repeat_interleave


@pytest.mark.parametrize("name", runs.mostly_slow(CONFIGS, "main job"))
def test_a_training_step_waits_for_nothing_and_asks_for_as_much_with_more_images(name: str) -> None:
    configs = [runs.CONFIGS / config for config in CONFIGS[name]]
    two, three = (launches["count"](configs, images, SIZE, "cuda") for images in (2, 3))
    assert not two.waits
    assert not three.waits
    for stage in two.forward.keys() | three.forward.keys():
        if stage != "pooling":  # numbers its boxes image by image
            assert two.forward[stage] == three.forward[stage], stage


@pytest.mark.parametrize("name", runs.mostly_slow(["main job", "pyramid"], "main job"))
def test_a_backward_pass_waits_for_nothing_either(name: str) -> None:
    configs = [runs.CONFIGS / config for config in CONFIGS[name]]
    two, three = (launches["count"](configs, images, SIZE, "cpu") for images in (2, 3))
    assert two.backward == three.backward
    assert two.backward.total() > 50
    assert not [wait for wait in two.waits if wait[0] == "backward"]
