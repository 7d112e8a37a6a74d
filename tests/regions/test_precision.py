"""Models on regions and images in the data types that weights may have."""

from __future__ import annotations

import pytest
import torch

from detpipe.backbones import SEResNet
from detpipe.regions.base import BackboneModel
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.regions.superpixel_localizer import SuperpixelLocalizer

TARGETS = [{"boxes": torch.tensor([[5.0, 6.0, 40.0, 38.0]]), "labels": torch.tensor([1])}] * 2


def run(model: BackboneModel, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The losses of two images, and what is found in them."""
    if isinstance(model, ImageClassifier):
        return model.losses(images, torch.tensor([0, 1]))[0], [model.eval()(images)]
    boxes = ([target["boxes"] for target in TARGETS],) if isinstance(model, RegionClassifier) else ()
    return model.losses([*images], TARGETS), model.eval()([*images], *boxes)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [ImageClassifier, RegionClassifier, SuperpixelLocalizer])
@pytest.mark.parametrize("images", ["uint8", "float"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_any_type_take_images_of_any_type(kind, images, dtype) -> None:
    if kind is SuperpixelLocalizer:
        pytest.importorskip("skimage")
    sizes = {} if kind is ImageClassifier else {"min_size": 48, "max_size": 64}
    model = kind(SEResNet(18, levels=["c3"]), 3, **sizes)
    given = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    given = given if images == "uint8" else given / 255
    exact, _ = run(model, given)
    losses, found = run(model.train().to(dtype), given)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), exact[name].float(), rtol=0.05, atol=0.05)
    assert all(values.isfinite().all() for values in found)
