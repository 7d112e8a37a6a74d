"""Quick convolutions against PyTorch's: the same numbers, and weights that are never out of date."""

import copy

import pytest
import torch
from torch import Tensor, nn

from detpipe.winograd import LEAST_CELLS, QuickConvolutions


def layer(channels: int = 128, widths: int = 128, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, widths, **{"kernel_size": 3, "padding": 1, **options})


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 50), (4, 300), (130, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_numbers_are_those_of_a_slow_sum(size: tuple[int, int], bias: bool) -> None:
    conv, quick = layer(128, 160, bias=bias), QuickConvolutions()
    images = torch.randn(2, 128, *size)
    with quick.on(images):
        found = conv(images)
    assert len(quick) == 1
    around = nn.functional.pad(images.double(), [1, 1, 1, 1])
    weight = conv.weight.double()
    wanted = (
        torch.zeros(2, 160, *size, dtype=torch.float64) if conv.bias is None else conv.bias.double().view(1, -1, 1, 1)
    )
    for row in range(3):
        for column in range(3):
            window = around[:, :, row : row + size[0], column : column + size[1]]
            wanted = wanted + torch.einsum("nchw,kc->nkhw", window, weight[:, :, row, column])
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative(found.double(), wanted) < 3e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 0}, {"groups": 2}, {"kernel_size": 1, "padding": 0},
        {"padding": "same"}, {"padding_mode": "reflect"}, {"channels": 64}, {"widths": 64},
    ],
)  # fmt: skip
def test_other_convolutions_are_pytorchs(options: dict[str, object]) -> None:
    conv, quick = layer(**options), QuickConvolutions()
    images = torch.randn(1, conv.in_channels, 40, 40)
    wanted = conv(images)
    with quick.on(images):
        found = conv(images)
    assert torch.equal(found, wanted)
    assert len(quick) == 0


def test_small_maps_other_types_and_training_are_pytorchs() -> None:
    conv, quick = layer(), QuickConvolutions()
    for images in (torch.randn(1, 128, 8, LEAST_CELLS // 8 - 1), torch.randn(1, 128, 40, 40, dtype=torch.float64)):
        with torch.no_grad(), quick.on(images):
            conv.to(images.dtype)(images)
    with quick.on(torch.randn(1, 3, 8, 8)):
        conv.float()(torch.randn(1, 128, 40, 40)).sum().backward()
    assert len(quick) == 0
    assert conv.weight.grad is not None


@pytest.mark.parametrize("change", ["in place", "data", "storage", "step"])
def test_changed_weights_are_transformed_anew(change: str) -> None:
    conv, quick, images = layer(), QuickConvolutions(), torch.randn(1, 128, 40, 40)
    with torch.no_grad(), quick.on(images):
        conv(images)
    if change == "in place":
        nn.init.normal_(conv.weight)
    elif change == "data":  # which no counter of versions sees
        conv.weight.data[3].zero_()
    elif change == "storage":
        conv.weight.data = torch.randn(128, 128, 3, 3)
    else:
        conv(images).square().sum().backward()
        torch.optim.SGD(conv.parameters(), lr=1e-5).step()
    with torch.no_grad():
        wanted = conv(images)
        with quick.on(images):
            found = conv(images)
    assert relative(found, wanted) < 3e-5


@torch.no_grad()
def test_copies_and_training_keep_nothing() -> None:
    conv, quick, images = layer(), QuickConvolutions(), torch.randn(1, 128, 40, 40)
    with quick.on(images):
        conv(images)
    assert len(quick) == 1
    assert len(copy.deepcopy(quick)) == 0
    with torch.enable_grad(), quick.on(images):
        assert len(quick) == 0
