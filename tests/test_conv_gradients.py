"""Gradients on copies in PyTorch's own order: those of PyTorch, for the convolutions that gain and for others."""

import pytest
import torch
from torch import nn

from detpipe.conv_gradients import QuickGradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"bias": False},
        {"padding": 0},
        {"groups": 2},
        {"padding": "same"},
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_they_are_pytorchs(options: dict[str, object], frozen: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, **{"kernel_size": 3, "padding": 1, **options}).to(memory_format=torch.channels_last)
    conv.requires_grad_(not frozen)
    images = torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last).requires_grad_()
    inputs = [images, *(part for part in conv.parameters() if part.requires_grad)]
    wanted = conv(images)
    with QuickGradients():
        found = conv(images)
    assert torch.equal(found, wanted)
    assert ("_Convolution" in type(found.grad_fn).__name__) == (
        options.get("groups", 1) == 1 and options.get("padding") != "same"
    )
    given, right = (torch.autograd.grad(values.square().sum(), inputs) for values in (found, wanted))
    torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-3)
