"""Where attention goes: patterns, named modules, and the attention that a network has of its own."""

import copy

import pytest
import torch
from attention_networks import (
    OPEN,
    SE,
    Held,
    Small,
    assert_same,
    build,
    build_timm,
    differ,
    images,
    refuses,
)
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation

from detpipe.attention import ECA, add_attention

RESNET = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"]


# ---- where ----


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["layer[34].*"], [4, 5, 6, 7]),
        ("layer4.1", [7]),
        (["layer4.1", "layer1.0", "layer1.*"], [0, 1, 7]),
        (["*.0"], [0, 2, 4, 6]),
        (["*"], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=str,
)
def test_patterns_choose_blocks(where, expected):
    network = build("resnet18")
    assert add_attention(network, OPEN, where) == [f"{RESNET[index]}.attention" for index in expected]
    gated = [name for name, module in network.named_modules() if isinstance(module, Held)]
    assert gated == [f"{RESNET[index]}.attention" for index in expected]


@pytest.mark.parametrize("node", ["layer2", "layer2.0.bn1", "layer2.0.conv2", "maxpool", "layer2.0.downsample"])
def test_named_modules_are_gated_at_their_output(node):
    plain, x = build("resnet18"), images(1)
    network = copy.deepcopy(plain)
    (name,) = add_attention(network, SE, [node])
    assert name == f"{node}.attention"
    attention = network.get_submodule(name)
    plain.get_submodule(node).register_forward_hook(lambda module, inputs, output: attention(output))
    with torch.no_grad():
        assert_same(network, plain, x)
        assert differ(network(x), build("resnet18")(x))


def test_one_named_module_inside_another():
    network = build("densenet121")
    names = add_attention(network, OPEN, ["features.denseblock1", "features.denseblock1.denselayer2.conv2"])
    assert all(isinstance(network.get_submodule(name), Held) for name in names)
    assert names[0] == "features.denseblock1.attention"
    assert "features.denseblock1.denselayer2.conv2.weight" in network.state_dict()
    with torch.no_grad():
        network(images(1))


# ---- a network's own attention ----


def test_own_attention_stays():
    network = build("mobilenet_v3_small")
    own = sum(isinstance(module, TorchvisionSqueezeExcitation) for module in network.modules())
    add_attention(network, SE)
    assert sum(isinstance(module, TorchvisionSqueezeExcitation) for module in network.modules()) == own == 9


def test_own_attention_is_replaced_on_request():
    network = build("mobilenet_v3_small")
    own = [name for name, module in network.named_modules() if isinstance(module, TorchvisionSqueezeExcitation)]
    channels = [network.get_submodule(name).fc2.out_channels for name in own]
    names = add_attention(network, SE, replace=True)
    assert len(names) == 11
    assert [name for name in names if not name.endswith(".attention")] == own
    assert [network.get_submodule(name).squeeze.in_channels for name in own] == channels
    assert not any(isinstance(module, TorchvisionSqueezeExcitation) for module in network.modules())
    with torch.no_grad():
        assert network(images(1)).isfinite().all()


def test_timm_s_own_attention_is_replaced_on_request():
    for name, own in (("seresnet18", 8), ("mobilenetv3_small_050", 9)):
        network = build_timm(name)
        names = add_attention(network, ECA, replace=True)
        assert sum(name.endswith(".se") for name in names) == own
        assert not any(type(module).__name__ in ("SEModule", "SqueezeExcite") for module in network.modules())
        with torch.no_grad():
            assert network(images(1)).isfinite().all()


# ---- bad input ----


def test_unknown_names():
    network = Small()
    refuses(network, r"no module 'block\.1'; did you mean 'blocks\.1'", where=["blocks.0", "block.1"])
    refuses(network, r"no module 'xyz', but stem, blocks, blocks\.0, ", where=["xyz"])
    refuses(network, r"no module ''", where=[""])


def test_patterns_without_a_block():
    refuses(
        Small(), r"no block matches 'layer\*'; the blocks are blocks\.0, blocks\.1; modules other", where=["layer*"]
    )
    refuses(build("vgg11_bn"), r"no block matches 'features\.\*'; looked for ResNet", where=["features.*"])


def test_nowhere():
    refuses(Small(), "where is empty", where=[])
    refuses(build("vgg11_bn"), r"VGG has no blocks that are known: looked for ResNet.*where=\['features\.0'\]")


def test_twice():
    for network in (build("resnet18"), build("mobilenet_v2")):
        add_attention(network, SE)
        refuses(network, "has attention already")
    network = Small()
    add_attention(network, SE, ["stem"])
    refuses(network, "^stem has attention already", where=["stem"])
    refuses(network, r"^stem\.attention has attention already", where=["stem.attention"])


def test_twice_in_timm():
    for name in ("resnet18", "seresnet18", "mobilenetv3_small_050"):
        network = build_timm(name)
        add_attention(network, ECA)
        refuses(network, "has attention already")
