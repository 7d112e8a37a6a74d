import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detpipe.backbones.fpn import FPN
from detpipe.backbones.se_resnet import SEResNet
from detpipe.backbones.vit_pyramid import LayerNorm2d, ViTPyramid
from detpipe.stages import Backbone
from detpipe.types import PixelFormat

CAFFE = PixelFormat(mean=(103.939, 116.779, 123.68), std=(1, 1, 1), channel_order="bgr", value_range=255.0)


class Map(Backbone):
    """One level; its cells are rounded up."""

    def __init__(self, channels: int = 8, stride: int = 16, name: str = "c4") -> None:
        super().__init__()
        self.out_channels, self.strides, self.pixel_format, self.name = channels, {name: stride}, CAFFE, name
        self.conv = nn.Conv2d(3, channels, 1)

    def forward(self, images):
        (stride,) = self.strides.values()
        below, right = (-side % stride for side in images.shape[-2:])
        return {self.name: self.conv(F.avg_pool2d(F.pad(images, (0, right, 0, below)), stride))}


def layer_norm(features: torch.Tensor, norm: LayerNorm2d) -> torch.Tensor:
    """Cell by cell, from the definition."""
    result = torch.empty_like(features)
    for index in range(len(features)):
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                cell = features[index, :, row, column]
                normal = (cell - cell.mean()) / (cell.var(correction=0) + 1e-6).sqrt()
                result[index, :, row, column] = normal * norm.norm.weight + norm.norm.bias
    return result


def doubled(features: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Each cell becomes 2 x 2, a matrix product for each of the four places."""
    count, _, height, width = features.shape
    result = torch.zeros(count, conv.out_channels, 2 * height, 2 * width)
    for i in range(2):
        for j in range(2):
            places = torch.einsum("nchw,cd->ndhw", features, conv.weight[:, :, i, j])
            result[:, :, i::2, j::2] = places + conv.bias[:, None, None]
    return result


def halved(features: torch.Tensor) -> torch.Tensor:
    height, width = (math.ceil(side / 2) for side in features.shape[2:])
    result = torch.empty(*features.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            result[:, :, i, j] = features[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].amax((2, 3))
    return result


def by_hand(pyramid: ViTPyramid, features: torch.Tensor) -> list[torch.Tensor]:
    up = pyramid.levels["p2"][0]
    middle = F.gelu(layer_norm(doubled(features, up[0]), up[1]))
    maps = [doubled(middle, up[3]), doubled(features, pyramid.levels["p3"][0]), features, halved(features)]
    smooth = []
    for map_, level in zip(maps, pyramid.levels.values(), strict=True):
        reduce, first, convolve, second = level[1]
        narrow = layer_norm(torch.einsum("nchw,dc->ndhw", map_, reduce.weight[:, :, 0, 0]), first)
        smooth.append(layer_norm(F.conv2d(narrow, convolve.weight, padding=1), second))
    return [*smooth, smooth[-1][:, :, ::2, ::2]]


@pytest.mark.parametrize("size", [(64, 96), (50, 71), (16, 33), (5, 7)])
def test_it_is_what_the_paper_says(size):
    pyramid = ViTPyramid(Map(), 6, extra_levels="max_pool")
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, std=0.5)
    images = torch.randn(2, 3, *size)
    got = pyramid(images)
    assert list(got) == list(pyramid.strides) == ["p2", "p3", "p4", "p5", "p6"]
    for ours, slow in zip(got.values(), by_hand(pyramid, pyramid.backbone(images)["c4"]), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


def test_a_case_worked_by_hand():
    pyramid = ViTPyramid(Map(4), 2)
    features = torch.tensor([[1.0, 2], [3, 4]]).expand(1, 4, 2, 2).clone()
    pyramid.backbone.forward = lambda images: {"c4": features}
    reduce, norm, convolve, _ = pyramid.levels["p5"][1]
    nn.init.zeros_(reduce.weight)
    reduce.weight.data[0, 0] = 1.0  # the largest value, 4, and 0
    nn.init.dirac_(convolve.weight)
    norm.norm.eps = 0.0
    got = pyramid(torch.zeros(1, 3, 32, 32))["p5"]
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0])[None, :, None, None])  # 4 and 0 normalized


@pytest.mark.parametrize("extra_levels", [None, "max_pool"])
@pytest.mark.parametrize(("stride", "first"), [(4, 0), (8, 1), (16, 2), (32, 3)])
def test_strides_follow_the_backbone(extra_levels, stride, first):
    pyramid = ViTPyramid(Map(8, stride, "whole"), 8, extra_levels)
    names = [f"p{first + index}" for index in range(4)]
    assert pyramid.roi_strides == {name: 2 ** int(name[1:]) for name in names}
    more = {f"p{first + 4}": 4 * stride} if extra_levels else {}
    assert pyramid.strides == {**pyramid.roi_strides, **more}
    assert pyramid.out_channels == 8
    assert pyramid.level_channels == dict.fromkeys(pyramid.strides, 8)
    assert pyramid.pixel_format == CAFFE
    maps = pyramid(torch.zeros(1, 3, 4 * stride, 8 * stride))
    assert {name: tuple(map_.shape) for name, map_ in maps.items()} == {
        name: (1, 8, 4 * stride // step, 8 * stride // step) for name, step in pyramid.strides.items()
    }
    pyramid.roi_strides.clear()
    assert pyramid.roi_strides


@pytest.mark.parametrize("size", [(65, 33), (101, 47), (64, 160)])
def test_on_a_backbone_of_ours(size):
    pyramid = ViTPyramid(SEResNet(18, levels=["c4"]), 16).eval()
    for name, map_ in pyramid(torch.zeros(1, 3, *size)).items():
        stride = pyramid.strides[name]
        coarse = [math.ceil(side / 16) for side in size]
        assert list(map_.shape[2:]) == [math.ceil(side * 16 / stride) for side in coarse]


def test_gradients_reach_everything_from_each_level():
    pyramid = ViTPyramid(Map(), 8, extra_levels="max_pool")
    images = torch.randn(2, 3, 50, 71)
    for name in pyramid.strides:
        pyramid.zero_grad()
        pyramid(images)[name].square().sum().backward()
        assert pyramid.backbone.conv.weight.grad.abs().sum() > 0
    own = {"p6": "p5"}.get(name, name)
    for key, parameter in pyramid.levels.named_parameters():
        assert (parameter.grad is not None) == key.startswith(own), key
    sum(map_.sum() for map_ in pyramid(images).values()).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_gradients_are_the_numerical_ones():
    pyramid = ViTPyramid(Map(4, 4), 2, extra_levels="max_pool").double()
    images = torch.rand(1, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(pyramid(x).values()), images)


def test_a_cell_stays_where_it_is():
    pyramid, images = ViTPyramid(Map(8), 8), torch.zeros(1, 3, 256, 320)
    blank = pyramid(images)
    images[:, :, 96:112, 160:176] = 1.0  # the cell of row 6 and column 10 at stride 16
    for name, map_ in pyramid(images).items():
        changed = (map_ - blank[name]).abs().sum(1)[0].nonzero()
        center = (changed.double().mean(0) + 0.5) * pyramid.strides[name]
        torch.testing.assert_close(center, torch.tensor([104.0, 168.0]).double(), rtol=0, atol=8.0)


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (
            lambda: SEResNet(18, levels=["c3", "c4"], out_channels=8),
            {},
            r"one level, got \['c3', 'c4'\]; an FPN takes several",
        ),
        (lambda: Map(8, 14), {}, "power of two, 4 or more, level 'c4' has 14"),
        (lambda: Map(8, 2), {}, "power of two, 4 or more, level 'c4' has 2"),
        (lambda: Map(6), {}, "multiple of 4 channels to halve twice, the backbone has 6"),
        (Map, {"out_channels": 0}, "out_channels must be at least 1, got 0"),
        (Map, {"extra_levels": "convolutions"}, "extra_levels of a ViTPyramid must be 'max_pool' or None, got 'conv"),
    ],
)
def test_bad_arguments(backbone, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        ViTPyramid(backbone(), **arguments)
    assert "\n" not in str(raised.value)


def test_a_plain_vision_transformer():
    pytest.importorskip("timm")
    from detpipe.backbones import Extractor

    pyramid = ViTPyramid(Extractor("timm/vit_tiny_patch16_224", ["c4"]), 16, extra_levels="max_pool")
    for size in ((64, 64), (97, 129)):
        maps = pyramid(torch.rand(1, 3, *size))
        cells = [math.ceil(side / 16) for side in size]
        assert [list(map_.shape[2:]) for map_ in maps.values()] == [
            [math.ceil(cell * 16 / stride) for cell in cells] for stride in pyramid.strides.values()
        ]
    sum(map_.square().sum() for map_ in maps.values()).backward()
    assert [name for name, parameter in pyramid.named_parameters() if parameter.grad is None] == []
    with pytest.raises(ValueError, match="an FPN needs two levels"):
        FPN(pyramid.backbone)
