"""Networks that others wrote, small enough for tests, and gates held at a value."""

import copy
from functools import cache, partial

import pytest
import torch
from torch import nn
from torchvision import models

from detpipe.attention import Gating, SqueezeExcitation, add_attention

SE = partial(SqueezeExcitation, reduction=8)


class Held(Gating):
    """Gates held at a value, with a weight that has no say."""

    def __init__(self, channels, value):
        super().__init__()
        self.channels, self.value, self.weight = channels, value, nn.Parameter(torch.ones(channels))

    def weights(self, features):
        assert features.shape[1] == self.channels
        return torch.full_like(features[:, :, :1, :1], self.value)

    def gates(self, features):
        return {"channel": self.weights(features)}


class Small(nn.Module):
    """A stem and two blocks of torchvision."""

    def __init__(self, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 2, 1)
        self.blocks = nn.Sequential(*(models.resnet.BasicBlock(16, 16) for _ in range(2)))

    def forward(self, images):
        return self.blocks(self.stem(images))


OPEN, SHUT = partial(Held, value=1.0), partial(Held, value=0.0)
# network -> where, how many places, the first of them
TORCHVISION = {
    "resnet18": (None, 8, "layer1.0.attention"),
    "resnet50": (None, 16, "layer1.0.attention"),
    "resnext50_32x4d": (None, 16, "layer1.0.attention"),
    "regnet_x_400mf": (None, 22, "trunk_output.block1.block1-0.f.attention"),
    "mnasnet0_5": (None, 16, "layers.8.0.layers.attention"),
    "mobilenet_v2": (None, 17, "features.1.conv.attention"),
    "mobilenet_v3_small": (None, 11, "features.1.block.attention"),
    "efficientnet_b0": (None, 16, "features.1.0.block.attention"),
    "convnext_tiny": (None, 18, "features.1.0.block.attention"),
    "vgg11_bn": (["features.5", "features.10"], 2, "features.5.attention"),
    "densenet121": (["features.denseblock1", "features.transition2"], 2, "features.denseblock1.attention"),
    "squeezenet1_1": (["features.4"], 1, "features.4.attention"),
}
TIMM = {
    "resnet18": (8, "layer1.0.se"),
    "seresnet18": (8, "layer1.0.se.attention"),
    "skresnet18": (8, "layer1.0.se"),
    "convnext_atto": (12, "stages.0.blocks.0.mlp.attention"),
    "convnextv2_atto": (12, "stages.0.blocks.0.mlp.attention"),  # without a layer scale
    "test_convnext": (9, "stages.0.blocks.0.mlp.attention"),  # [N, H, W, C] inside
    "mobilenetv3_small_050": (11, "blocks.0.0.bn2.attention"),
    "mobilenetv4_conv_small_035": (12, "blocks.2.0.dw_end.attention"),
    "regnetx_002": (13, "s1.b1.conv3.attention"),
}


def build(name):
    return copy.deepcopy(_built(name))


@cache
def _built(name):
    torch.manual_seed(0)
    if name != "vgg11_bn":
        return moved(models.get_model(name).eval())
    with torch.device("meta"):
        network = models.vgg11_bn(init_weights=False)
    network.classifier = nn.Linear(512 * 7 * 7, 10)  # instead of 120 million weights
    network.to_empty(device="cpu").apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    return moved(network.eval())


def build_timm(name, **options):
    timm = pytest.importorskip("timm")
    return moved(timm.create_model(name, **options).eval())


def moved(network):
    """Give batch normalization other statistics and layer scales a size that matters."""
    for key, value in network.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        if key.endswith("running_var"):
            value.uniform_(0.8, 1.2)
        if key.endswith(("gamma", "layer_scale")):
            value.fill_(0.5)
        if key.endswith("weight") and value.ndim == 1 and not value.any():
            value.fill_(1.0)  # timm closes the branch of new ResNet blocks by their last normalization
    return network


def images(count=2, side=64):
    return torch.randn(count, 3, side, side)


def outputs(network, x):
    found = network(x)
    return found if isinstance(found, list) else [found]


def differ(first, second):
    return (first - second).abs().max() > 1e-3 * second.abs().max() > 0


def assert_same(network, other, x):
    for ours, theirs in zip(outputs(network, x), outputs(other, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def refuses(network, message, attention=SE, where=None, error=ValueError):
    before, kinds = list(network.state_dict()), [type(module) for module in network.modules()]
    with pytest.raises(error, match=message) as raised:
        add_attention(network, attention, where)
    assert list(network.state_dict()) == before  # nothing is done by halves
    assert [type(module) for module in network.modules()] == kinds
    assert "\n" not in str(raised.value)
