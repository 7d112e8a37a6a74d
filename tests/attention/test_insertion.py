"""Attention in networks that others wrote. Images of 64 pixels; timm's networks where timm is installed."""

import copy
import io
from functools import partial

import pytest
import runs
import torch
from attention_networks import (
    OPEN,
    SE,
    SHUT,
    TIMM,
    TORCHVISION,
    Held,
    Small,
    assert_same,
    build,
    build_timm,
    differ,
    images,
    refuses,
)
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from detpipe.attention import (
    CBAM,
    ECA,
    ConcurrentSqueezeExcitation,
    SelectiveKernel,
    SpatialSqueezeExcitation,
    SqueezeExcitation,
    add_attention,
)
from detpipe.attention.insertion import PROBES

SEQUENTIAL = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny", "regnet_x_400mf", "mnasnet0_5")
QUICK = ("resnet18", "vgg11_bn", "mobilenet_v2", "mnasnet0_5")
torchvision_network = pytest.mark.parametrize("name", runs.mostly_slow(TORCHVISION, *QUICK))
timm_network = pytest.mark.parametrize("name", TIMM)


def assert_keeps_its_state(plain, network, names):
    """Old weights load into the new network and what it saves holds the old ones under the old names."""
    old, new = plain.state_dict(), network.state_dict()
    added = {f"{name}.{key}" for name in names for key in network.get_submodule(name).state_dict()}
    assert set(new) == set(old) | added
    assert not set(old) & added
    for key, value in old.items():
        torch.testing.assert_close(new[key], value, rtol=0, atol=0)
    for value in old.values():
        value.zero_()
    reported = network.load_state_dict(old, strict=False)
    assert set(reported.missing_keys) == added
    assert reported.unexpected_keys == []
    state = network.state_dict()
    assert not any(state[key].any() for key in old)
    assert any(state[key].any() for key in added)


@torchvision_network
def test_open_gates_leave_torchvision_networks_as_they_were(name):
    where, count, first = TORCHVISION[name]
    plain, network = build(name), build(name)
    names = add_attention(network, OPEN, where)
    assert (len(names), names[0]) == (count, first)
    assert all(isinstance(network.get_submodule(name), Held) for name in names)
    x = images()
    with torch.no_grad():
        assert_same(network, plain, x)
        torch.manual_seed(3)
        trained = plain.train()(x)  # stochastic depth and dropout draw the same numbers
        torch.manual_seed(3)
        torch.testing.assert_close(network.train()(x), trained, rtol=0, atol=0)
    assert_keeps_its_state(plain, network, names)


@timm_network
@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features"])
def test_open_gates_leave_timm_networks_as_they_were(name, features_only):
    plain = build_timm(name, features_only=features_only)
    network = copy.deepcopy(plain)
    names = add_attention(network, OPEN)
    count, first = TIMM[name]
    assert len(names) == count
    assert names[0] == (first.replace("stages.", "stages_") if features_only else first)
    with torch.no_grad():
        assert_same(network, plain, images())
    assert_keeps_its_state(plain, network, names)


def shortcut(block, x):
    """What is left of a block whose branch is nothing, by its own words about itself."""
    kind = type(block).__name__
    if hasattr(block, "downsample"):  # ResNets, and timm's RegNet
        x = block.downsample(x) if block.downsample is not None else x
        return torch.relu(x)
    if hasattr(block, "proj") and kind == "ResBottleneckBlock":
        return torch.relu(block.proj(x) if block.proj is not None else x)
    if hasattr(block, "shortcut"):
        return block.shortcut(x)
    for flag in ("use_res_connect", "has_skip", "apply_residual"):
        if hasattr(block, flag):
            return x if getattr(block, flag) else None
    assert kind == "CNBlock"
    return x


def assert_blocks_are_shortcuts(network, blocks, x):
    seen = {}
    for name in blocks:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0].clone(), output.clone())})
        )
    with torch.no_grad():
        network(x)
        for name in blocks:
            before, after = seen[name]
            left = shortcut(network.get_submodule(name), before)
            torch.testing.assert_close(after, torch.zeros_like(after) if left is None else left, rtol=0, atol=0)
    assert len(seen) == len(blocks)


@pytest.mark.parametrize("name", runs.mostly_slow([n for n, (where, *_) in TORCHVISION.items() if not where], *QUICK))
def test_shut_gates_leave_the_shortcut_in_torchvision_networks(name):
    network = build(name)
    names = add_attention(network, SHUT)
    assert_blocks_are_shortcuts(network, [n.rsplit(".", 2 if name in SEQUENTIAL else 1)[0] for n in names], images(1))


@timm_network
def test_shut_gates_leave_the_shortcut_in_timm_networks(name):
    network = build_timm(name)
    names = add_attention(network, SHUT)
    assert_blocks_are_shortcuts(network, [n.removesuffix(".attention").rpartition(".")[0] for n in names], images(1))


@pytest.mark.parametrize(
    ("name", "node"), [("resnet18", "layer2.1"), ("mobilenet_v3_small", "features.4"), ("vgg11_bn", "features.10")]
)
def test_torchvision_cuts_out_what_the_gates_left(name, node):
    network, x = build(name), images()
    before = create_feature_extractor(copy.deepcopy(network), {node: "level"})
    (first, *_) = add_attention(network, SE, TORCHVISION[name][0])
    body, seen = create_feature_extractor(network, {node: "level"}), []
    network.get_submodule(node).register_forward_hook(lambda *hooked: seen.append(hooked[-1].clone()))
    with torch.no_grad():
        network(x)
        cut = body(x)["level"]
        torch.testing.assert_close(cut, seen[0], rtol=0, atol=0)
        assert differ(cut, before(x)["level"])
    assert {id(p) for p in network.get_submodule(first).parameters()} <= {id(p) for p in body.parameters()}


@pytest.mark.parametrize("where", [None, ["stem", "blocks.0.bn2"]], ids=["blocks", "modules"])
@pytest.mark.parametrize(
    "make", [SE, SpatialSqueezeExcitation, ConcurrentSqueezeExcitation, ECA, partial(CBAM, batch_norm=True)]
)
def test_torchvision_cuts_every_kind_of_attention(make, where):
    network, x = Small().eval(), images()
    add_attention(network, make, where)
    with torch.no_grad():
        cut = create_feature_extractor(network, {"blocks.1": "level"})(x)["level"]
        torch.testing.assert_close(cut, network(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", runs.mostly_slow(["resnet50", "mobilenet_v2", "convnext_tiny", "efficientnet_b0"], *QUICK)
)
def test_the_cut_keeps_the_names_of_nodes_and_weights(name):
    network = build(name)
    before = get_graph_node_names(network)[1]
    modules = {node for node in before if node in dict(network.named_modules())}
    names = add_attention(network, SE)
    assert modules <= set(get_graph_node_names(network)[1])
    last = [node for node in before if node.startswith(("layer4", "features"))][-1]
    body = create_feature_extractor(network, {last: "level"})
    assert set(body.state_dict()) <= set(network.state_dict())
    added = {f"{name}.{key}" for name in names for key in network.get_submodule(name).state_dict()}
    assert added <= set(body.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "mobilenetv3_small_050"])
def test_timm_levels_see_the_gates(name):
    plain = build_timm(name, features_only=True)
    network, x = copy.deepcopy(plain), images()
    add_attention(network, SE)
    with torch.no_grad():
        for gated, level in zip(network(x), plain(x), strict=True):
            assert gated.shape == level.shape
        assert differ(gated, level)


def test_timm_hooks_see_the_gates():
    network, x = build_timm("resnet18", features_only=True, feature_cls="hook"), images()
    with torch.no_grad():
        before = [level.clone() for level in network(x)]
        add_attention(network, SHUT, ["body.act1", "body.layer4"])
        stem, *middle, last = network(x)
    assert before[0].any()
    assert not stem.any()
    assert len(middle) == 3
    assert before[-1].any()
    assert not last.any()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_gates_learn_and_change_the_output(name):
    network, x = build(name), images()
    before = network(x).detach()
    names = add_attention(network, SE, TORCHVISION[name][0])
    after = network(x)
    assert differ(after, before)
    after.square().sum().backward()
    for name in names:
        assert network.get_submodule(name).excite.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_copies_and_pickles(name):
    network, x = build(name), images(1)
    (*_, last) = add_attention(network, SE, TORCHVISION[name][0])
    stored = io.BytesIO()
    torch.save(network, stored)
    stored.seek(0)
    for other in (copy.deepcopy(network), torch.load(stored, weights_only=False)):
        with torch.no_grad():
            assert_same(other, network, x)
            other.get_submodule(last).excite.bias.add_(3)
            assert differ(other(x), network(x))


@pytest.mark.parametrize("where", [None, ["blocks.0", "stem"]], ids=["blocks", "module"])
def test_can_be_compiled(where):
    network, x = Small().eval(), images(1)
    add_attention(network, SE, where)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)


def test_attention_outlives_a_change_of_the_normalization():
    for where in (None, ["blocks.0.bn2", "blocks.1.bn2"]):
        network, x = Small().eval(), images(1)
        add_attention(network, SHUT, where)
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
        with torch.no_grad():
            torch.testing.assert_close(network(x), torch.relu(network.stem(x)), rtol=0, atol=0)


def test_state_and_modes_stay():
    network = build("mobilenet_v2").train()
    network.features[3].eval()
    before, modes = copy.deepcopy(network.state_dict()), {name: m.training for name, m in network.named_modules()}
    names = add_attention(network, SE)
    assert {name: m.training for name, m in network.named_modules() if name in modes} == modes
    for key, value in before.items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=0)
    assert not network.get_submodule("features.3.conv.attention").training
    assert network.get_submodule(names[0]).training
    assert not any(module._forward_hooks for module in network.modules())


def test_takes_the_precision_of_the_network():
    network = Small().double()
    (first, _) = add_attention(network, SE)
    assert network.get_submodule(first).excite.weight.dtype == torch.float64
    assert network(images(1).double()).dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_of_any_number_of_channels(channels):
    assert len(add_attention(Small(channels), SE)) == 2


def test_channels_are_measured():
    network = build("efficientnet_b0")
    for name in add_attention(network, SE):
        block = network.get_submodule(name.rsplit(".", 2)[0])
        assert network.get_submodule(name).squeeze.in_channels == block.out_channels


def test_networks_that_need_a_larger_image():
    class Picky(Small):
        def forward(self, images):
            if min(images.shape[2:]) < 100:
                raise RuntimeError("Output size is too small")
            return super().forward(images)

    assert len(add_attention(Picky(), SE)) == 2


# ---- bad input ----


def test_outputs_that_are_no_maps():
    network = build("resnet18")
    refuses(network, r"^fc does not return a map: .* returns \[1, 1000\]", where=["layer1.0", "fc"])
    refuses(network, r"^avgpool does not return a map: .* returns \[1, 512, 1, 1\]", where=["avgpool"])
    norm = "features.1.0.block.2"  # [N, H, W, C]
    refuses(build("convnext_tiny"), rf"^{norm} does not return a map: .* \[1, 16, 16, 96\]", where=[norm])

    class Affinity(nn.Module):
        def forward(self, features):
            cells = features.flatten(2)
            return (cells.transpose(1, 2) @ cells)[:, None]  # [N, 1, cells, cells]

    network = Small()
    network.blocks.append(Affinity())
    refuses(network, r"^blocks\.2 does not return a map: .* \[1, 1, 1024, 1024\]", where=["blocks.2"])

    class Pair(Small):
        def __init__(self):
            super().__init__()
            self.pair = nn.LSTM(16, 4, batch_first=True)

        def forward(self, images):
            return self.pair(super().forward(images).flatten(2).transpose(1, 2))

    refuses(Pair(), "^pair does not return a map: .* returns a tuple", where=["pair"])


def test_modules_that_do_not_run_once():
    refuses(build("resnet18"), r"^layer1\.0\.relu runs 2 times for one image", where=["layer1.0.relu"])
    network = Small()
    network.spare = nn.Conv2d(16, 16, 1)
    refuses(network, "^spare runs 0 times for one image", where=["spare"])


def test_attention_that_does_not_fit():
    network = build("mobilenet_v2")
    message = r"^features\.1\.conv, 16 channels: .* reduction must be in 1..channels \(16\), got 64"
    refuses(network, message, partial(SE, reduction=64))
    refuses(network, r"^SelectiveKernel is a convolution", SelectiveKernel)
    refuses(network, r"^SelectiveKernel is a convolution", lambda c: SelectiveKernel(c, c, groups=1))
    refuses(
        network, r"must keep the shape, but \[2, 16, 3, 4\] became \[2, 8, 3, 4\]", lambda c: nn.Conv2d(c, c // 2, 1)
    )
    refuses(network, "must make a module, got None", lambda c: None)
    shared = nn.Identity()
    refuses(network, "must make a new module each time", lambda c: shared)
    refuses(network, r"got a module: SqueezeExcitation\(\.\.\.\); give", SqueezeExcitation(64), error=TypeError)


def test_networks_that_do_not_run():
    class Broken(Small):
        def forward(self, images):
            raise RuntimeError("out of order")

    network = Broken()
    refuses(network, f"cannot run on probe images of {', '.join(map(str, PROBES))} pixels .*: out of order")
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
