import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detpipe.backbones import FPN, Extractor, Level, Regime, SEResNet
from detpipe.commands.training import add_arguments
from detpipe.heads import FastRCNNHead
from detpipe.optimization import Optimizer
from detpipe.stages import Backbone
from detpipe.training.checkpoint import describe_model
from detpipe.training.configuration import CLI
from detpipe.types import PixelFormat

LEVELS = ("c2", "c3", "c4", "c5")
EXTRA = {
    None: lambda: None,
    "max_pool": LastLevelMaxPool,
    "convolutions": lambda: LastLevelP6P7(16, 16),
}
NAMES = {None: "p2 p3 p4 p5", "max_pool": "p2 p3 p4 p5 p6", "convolutions": "p2 p3 p4 p5 p6 p7"}
CAFFE = PixelFormat(mean=(103.939, 116.779, 123.68), std=(1, 1, 1), channel_order="bgr", value_range=255.0)


class Maps(nn.Module):  # a subclass of Backbone would be listed among the classes that a configuration may name
    """A backbone of random maps, the same for images of one size, of any widths and strides; no weights."""

    def __init__(self, widths, strides):
        super().__init__()
        self.widths, self.strides, self.pixel_format = widths, strides, CAFFE

    @property
    def level_channels(self):
        return dict(zip(self.strides, self.widths, strict=True))

    def forward(self, images):
        generator = torch.Generator().manual_seed(0)
        sides = {level: [-(-side // stride) for side in images.shape[2:]] for level, stride in self.strides.items()}
        return {
            level: torch.randn(len(images), width, *sides[level], generator=generator)
            for level, width in self.level_channels.items()
        }


def unequal() -> Maps:
    return Maps((6, 24, 10, 16), {level: 4 << index for index, level in enumerate(LEVELS)})


def resnet(**arguments) -> SEResNet:
    return SEResNet(18, **{"levels": LEVELS, "out_channels": "own", **arguments})


def randomize(network: nn.Module) -> None:
    """Biases too, which start at zero."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)


def by_hand(fpn: FPN, features: dict[str, torch.Tensor], extra_levels: str | None) -> list[torch.Tensor]:
    """Equation by equation, cell by cell where the upsampling is."""
    laterals = [
        F.conv2d(features[level], block[0].weight, block[0].bias)
        for level, block in zip(features, fpn.pyramid.inner_blocks, strict=True)
    ]
    sums = [laterals[-1]]
    for lateral in laterals[-2::-1]:
        coarse, (height, width) = sums[0], lateral.shape[2:]
        upsampled = torch.empty_like(lateral)
        for i in range(height):
            for j in range(width):
                row, column = i * coarse.shape[2] // height, j * coarse.shape[3] // width
                upsampled[:, :, i, j] = coarse[:, :, row, column]
        sums.insert(0, lateral + upsampled)
    maps = [
        F.conv2d(total, block[0].weight, block[0].bias, padding=1)
        for total, block in zip(sums, fpn.pyramid.layer_blocks, strict=True)
    ]
    if extra_levels == "max_pool":
        maps.append(maps[-1][:, :, ::2, ::2])
    if extra_levels == "convolutions":
        for conv in (fpn.pyramid.extra_blocks.p6, fpn.pyramid.extra_blocks.p7):
            before = maps[-1] if len(maps) == 4 else maps[-1].clamp(min=0)
            maps.append(F.conv2d(before, conv.weight, conv.bias, stride=2, padding=1))
    return maps


@pytest.mark.parametrize(
    ("extra_levels", "size"), [(None, (128, 192)), ("max_pool", (101, 67)), ("convolutions", (33, 190))]
)
def test_it_is_torchvisions_pyramid_and_a_loop_by_hand(extra_levels, size):
    fpn, images = FPN(unequal(), 16, extra_levels), torch.zeros(2, 3, *size)
    theirs = FeaturePyramidNetwork([6, 24, 10, 16], 16, EXTRA[extra_levels]())
    randomize(theirs)
    fpn.pyramid.load_state_dict(theirs.state_dict())
    features = fpn.backbone(images)
    got, expected = fpn(images), theirs(OrderedDict(features))
    assert list(got) == list(fpn.strides) == NAMES[extra_levels].split()
    loop = by_hand(fpn, features, extra_levels)
    for ours, library, slow in zip(got.values(), expected.values(), loop, strict=True):
        torch.testing.assert_close(ours, library, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-5)  # sums of 144 products in another order


def test_a_case_worked_by_hand():
    fpn = FPN(Maps((1, 1), {"c4": 16, "c5": 32}), 1)
    for block in fpn.pyramid.inner_blocks:
        nn.init.ones_(block[0].weight)
    for block in fpn.pyramid.layer_blocks:  # leaves a map as it is
        nn.init.dirac_(block[0].weight)
    fine, coarse = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([[10.0, 20], [30, 40]])
    fpn.backbone.forward = lambda images: {"c4": fine[None, None], "c5": coarse[None, None]}
    got = fpn(torch.zeros(1, 3, 48, 48))
    assert got["p5"][0, 0].tolist() == coarse.tolist()
    assert got["p4"][0, 0].tolist() == [[11, 12, 23], [14, 15, 26], [37, 38, 49]]


@pytest.mark.parametrize(
    ("extra_levels", "size"),
    [(None, (65, 33)), ("max_pool", (101, 47)), ("convolutions", (33, 32)), ("max_pool", (160, 97))],
)
def test_declared_strides_are_the_real_ones(extra_levels, size):
    fpn = FPN(resnet(), 16, extra_levels).eval()
    features = fpn(torch.zeros(2, 3, *size))
    assert list(features) == list(fpn.strides) == NAMES[extra_levels].split()
    for level, stride in fpn.strides.items():
        assert stride == 2 ** int(level[1:])
        assert features[level].shape == (2, 16, math.ceil(size[0] / stride), math.ceil(size[1] / stride))


@pytest.mark.parametrize(
    ("network", "levels", "names"),
    [
        ("resnet50", {"c4": Level("layer3", 16), "c5": Level("layer4", 32)}, ["p4", "p5", "p6"]),
        ("mobilenet_v3_small", {"low": Level("features.3", 8), "top": Level("features.12", 32)}, ["p3", "p5", "p6"]),
        ("squeezenet1_1", {"c3": Level("features.7", 8), "c4": Level("features.12", 16)}, ["p3", "p4", "p5"]),
    ],
)
def test_a_pyramid_on_a_torchvision_network(network, levels, names):
    padding = 8 if "squeeze" in network else 0
    backbone = Extractor(network, levels, out_channels="own", padding=padding, pixel_format=CAFFE)
    fpn = FPN(backbone, 16, "max_pool").eval()
    assert fpn.pixel_format == CAFFE
    assert [block[0].in_channels for block in fpn.pyramid.inner_blocks] == list(backbone.level_channels.values())
    features = fpn(torch.zeros(1, 3, 96, 160))
    assert list(features) == list(fpn.strides) == names
    for level, stride in fpn.strides.items():
        assert abs(features[level].shape[2] - 96 / stride) <= 1


def test_unequal_widths_reach_the_pyramid_unprojected():
    backbone = resnet()
    assert backbone.level_channels == {"c2": 64, "c3": 128, "c4": 256, "c5": 512}
    assert not list(backbone.laterals.parameters())
    raw = backbone.eval()(torch.zeros(1, 3, 64, 64))
    assert [level.shape[1] for level in raw.values()] == [64, 128, 256, 512]
    assert [block[0].in_channels for block in FPN(backbone, 8).pyramid.inner_blocks] == [64, 128, 256, 512]


def test_a_projected_backbone_and_one_that_knows_a_single_width_do_too():
    assert resnet(out_channels=24).level_channels == dict.fromkeys(LEVELS, 24)

    class Equal(Maps):
        level_channels = Backbone.level_channels  # what a backbone gets that does not say more
        out_channels = 6

        def forward(self, images):
            return {level: torch.ones(1, 6, 64 // stride, 64 // stride) for level, stride in self.strides.items()}

    fpn = FPN(Equal((), {"a": 8, "b": 16}), 4)
    assert {level: tuple(map_.shape) for level, map_ in fpn(torch.zeros(1, 3, 64, 64)).items()} == {
        "p3": (1, 4, 8, 8),
        "p4": (1, 4, 4, 4),
    }


def test_levels_of_their_own_width_are_for_a_pyramid_only():
    with pytest.raises(ValueError, match=r"unequal width \{'c2': 64, .*which only an FPN takes; give a number"):
        _ = resnet().out_channels
    with pytest.raises(ValueError, match="out_channels must be a whole number, 'own' or None, got 'each'"):
        resnet(out_channels="each")
    assert resnet(levels=["c4"]).out_channels == 256  # one width, whoever asks


@pytest.mark.parametrize("extra_levels", EXTRA)
def test_gradients_reach_all_laterals_and_the_network_from_the_finest_level(extra_levels):
    fpn = FPN(resnet(), 16, extra_levels)
    features = fpn(torch.rand(2, 3, 64, 64))
    features["p2"].square().sum().backward(retain_graph=True)
    for name, parameter in fpn.named_parameters():
        coarser = "layer_blocks" in name and "layer_blocks.0" not in name
        beyond = "extra_blocks" in name
        assert (parameter.grad is None) == (coarser or beyond), name
    assert all(block[0].weight.grad.abs().sum() > 0 for block in fpn.pyramid.inner_blocks)
    list(features.values())[-1].square().sum().backward(retain_graph=True)
    sum(level.sum() for level in features.values()).backward()
    assert [name for name, parameter in fpn.named_parameters() if parameter.grad is None] == []


def test_what_is_frozen_stays_frozen():
    fpn = FPN(resnet(regime=Regime(frozen=("stem", "c2", "c3"))), 16, "convolutions").train()
    fixed = {name for name, parameter in fpn.named_parameters() if not parameter.requires_grad}
    assert fixed
    assert all(name.startswith(("backbone.stem", "backbone.stages.c2", "backbone.stages.c3")) for name in fixed)
    before = copy.deepcopy(fpn.state_dict())
    optimizer = Optimizer(name="sgd", lr=0.1).build(fpn)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(fpn.parameters())) - len(fixed)
    sum(level.square().mean() for level in fpn(torch.rand(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    moved = {key for key, value in fpn.state_dict().items() if not torch.equal(value, before[key])}
    assert any(key.startswith("pyramid.") for key in moved)
    assert any(key.startswith("backbone.stages.c5") for key in moved)
    frozen = ("backbone.stem.", "backbone.stages.c2.", "backbone.stages.c3.")
    assert [key for key in moved if key.startswith(frozen)] == []  # statistics included


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norms(norm, kind):
    fpn = FPN(unequal(), 32, norm=norm)
    norms = [module for module in fpn.pyramid.modules() if isinstance(module, kind)]
    assert len(norms) == 8
    assert all(block[0].bias is None for block in (*fpn.pyramid.inner_blocks, *fpn.pyramid.layer_blocks))
    for level in fpn.eval()(torch.zeros(1, 3, 64, 64)).values():
        assert level.isfinite().all()


def test_rois_are_not_pooled_from_extra_levels():
    boxes = [torch.tensor([[0.0, 0.0, 1000.0, 1000.0], [0.0, 0.0, 40.0, 40.0]])]  # p6 would suit the first by its size
    for extra_levels in EXTRA:
        fpn = FPN(unequal(), 4, extra_levels)
        assert fpn.roi_strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
        head = FastRCNNHead(fpn.out_channels, 2, fpn.roi_strides, fc=[8]).eval()
        features = fpn(torch.zeros(1, 3, 1024, 1024))
        pooled = head.pooler(features, boxes, head.strides)
        poisoned = {name: level if name in fpn.roi_strides else level * math.nan for name, level in features.items()}
        assert torch.equal(head.pooler(poisoned, boxes, head.strides), pooled)
        fpn.roi_strides.clear()
        assert fpn.roi_strides
    assert resnet(levels=["c4"]).roi_strides == {"c4": 16}


@pytest.mark.parametrize(
    ("strides", "arguments", "message"),
    [
        ({"c4": 16}, {}, r"an FPN needs two levels of its backbone or more, got \['c4'\]"),
        ({"c3": 8, "c4": 24}, {}, r"strides are powers of two.*\{'c3': 8, 'c4': 24\}; leave 'c4' out"),
        ({"c3": 6, "c4": 12}, {}, r"strides are powers of two.*leave 'c3' out"),
        ({"c4": 8, "c5": 8}, {}, r"each coarser than the one before.*leave 'c5' out"),
        ({"c5": 32, "c4": 16}, {}, r"each coarser than the one before.*leave 'c4' out"),
        (None, {"out_channels": 0}, "out_channels must be at least 1, got 0"),
        (None, {"extra_levels": "pool"}, "extra_levels must be 'max_pool' or 'convolutions' or None, got 'pool'"),
        (None, {"norm": "layer"}, "norm must be 'batch' or 'group' or None, got 'layer'"),
        (None, {"norm": "group", "out_channels": 48}, "multiple of 32, got 48"),
    ],
)
def test_bad_arguments(strides, arguments, message):
    backbone = unequal() if strides is None else Maps([4] * len(strides), strides)
    with pytest.raises(ValueError, match=message) as raised:
        FPN(backbone, **{"out_channels": 16, **arguments})
    assert "\n" not in str(raised.value)


def test_a_dilated_network_is_refused():
    with pytest.raises(ValueError, match=r"each coarser than the one before.*leave 'c5' out"):
        FPN(resnet(output_stride=16))


YAML = """
model:
  backbone:
    class_path: FPN
    init_args:
      backbone: {class_path: SEResNet, init_args: {depth: 18, levels: [c3, c4], out_channels: own, regime: {frozen: [stem, c2]}}}
      out_channels: 16
      extra_levels: max_pool
  proposals: {class_path: RPN, init_args: {anchors: {sizes: [[16], [32], [64]]}}}
  head: {class_path: FastRCNNHead, init_args: {fc: [8]}}
  optimizer: {backbone_scale: 0.5, lr: 0.01}
data: {class_path: Demo}
"""


def test_widths_and_strides_follow_the_pyramid_from_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text(YAML)
    arguments = [str(tmp_path / "c.yaml"), "--data.root", str(tmp_path / "d"), "--data.scenes"]
    model = CLI([*arguments, "{train: 4, val: 2, size: 64}"], add_arguments).model
    assert model.proposals.strides == model.backbone.strides == {"p3": 8, "p4": 16, "p5": 32}
    assert model.head.strides == {"p3": 8, "p4": 16}
    assert model.head.shared[1].in_features == 16 * 49
    assert model.proposals.head.convs[0].in_channels == 16
    optimizer = model.optimizer.build(model.backbone, model.proposals, model.head)
    assert [group["lr"] for group in optimizer.param_groups] == [
        0.005,
        0.005,
        0.01,
        0.01,
        0.01,
        0.01,
    ]  # network, pyramid, rest
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_checkpoint_keeps_no_path_of_weights_inside_a_pyramid():
    inner = {"class_path": "Extractor", "init_args": {"network": "resnet18", "weights": "somewhere.pth"}}
    model = {"backbone": {"class_path": "FPN", "init_args": {"backbone": inner, "out_channels": 8}}}
    stored = describe_model(model)["backbone"]["init_args"]
    assert stored["backbone"]["init_args"] == {"network": "resnet18", "weights": None}
    assert stored["out_channels"] == 8
    assert inner["init_args"]["weights"] == "somewhere.pth"


def test_levels_of_equal_stride_on_request():
    fpn = FPN(Maps([4, 6, 6], {"c4": 16, "c5": 32, "c5b": 32}), 8, extra_levels="max_pool", equal_strides=True)
    assert fpn.strides == {"p4": 16, "p5": 32, "p5b": 32, "p6": 64}
    assert fpn.roi_strides == {"p4": 16, "p5": 32}  # RoIs are pooled from the first of equal ones
    levels = fpn(torch.zeros(1, 3, 64, 96))
    assert [list(level.shape[2:]) for level in levels.values()] == [[4, 6], [2, 3], [2, 3], [1, 2]]
    with pytest.raises(ValueError, match=r"each coarser than the one before.*leave 'c5' out"):
        FPN(Maps([4, 6], {"c4": 32, "c5": 16}), 8, equal_strides=True)
