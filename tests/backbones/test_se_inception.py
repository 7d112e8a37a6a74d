"""Inception-v3 with gates: torchvision's arithmetic, sizes and places of cells, gates, weights, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import runs
import torch
from torch import nn
from torchvision.models import Inception3, Inception_V3_Weights

from backbones.residual_cases import largest_difference, random_norms, saved
from detpipe.attention import SqueezeExcitation
from detpipe.attention.base import Attention
from detpipe.attention.choice import GATINGS
from detpipe.backbones import Pretrained, Regime, SEInceptionV3
from detpipe.backbones.inception_blocks import STRIDES, UNPADDED, best_paddings, offset, unpadded_until
from detpipe.images import normalize
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.types import PixelFormat

LEVELS = ("c2", "c3", "c4", "c5")
CHANNELS = [256, 288, 288, 768, 768, 768, 768, 768, 1280, 2048, 2048]
HIDDEN = {256: 16, 288: 16, 768: 48, 1280: 80, 2048: 128}  # a sixteenth, to the nearest multiple of 8


def peer(classes: int = 7, **options) -> Inception3:
    """torchvision's network, with batch norms that do something."""
    torch.manual_seed(1)
    theirs = random_norms(Inception3(classes, init_weights=False, dropout=0.0, **options))
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return theirs


def peer_maps(theirs: Inception3, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torchvision's network computes on the way."""
    maps = {}
    ends = {"Conv2d_4a_3x3": "c2", "Mixed_5d": "c3", "Mixed_6e": "c4", "Mixed_7c": "c5"}
    hooks = [
        getattr(theirs, name).register_forward_hook(lambda _m, _i, out, level=level: maps.update({level: out}))
        for name, level in ends.items()
    ]
    theirs(images)
    for hook in hooks:
        hook.remove()
    return maps


def set_gates(backbone: nn.Module, bias: float, weight: float = 0.0) -> None:
    for gate in backbone.modules():
        if isinstance(gate, SqueezeExcitation):
            nn.init.constant_(gate.excite.weight, weight)
            nn.init.constant_(gate.excite.bias, bias)


@pytest.fixture(scope="module")
def theirs() -> Inception3:
    return peer()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory) -> str:
    return saved(theirs, tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def gated() -> SEInceptionV3:
    """All levels with gates, in evaluation; tests leave it as it is."""
    torch.manual_seed(0)
    return random_norms(SEInceptionV3(levels=LEVELS, out_channels="own")).eval()


@pytest.fixture(scope="module")
def shapes_only() -> SEInceptionV3:
    with torch.device("meta"):
        return SEInceptionV3(levels=LEVELS, out_channels="own", auxiliary_classes=10).eval()


# --- torchvision's arithmetic


@torch.no_grad()
def test_unpadded_with_open_gates_every_level_is_torchvisions(theirs, file):
    ours = SEInceptionV3(
        levels=LEVELS, out_channels="own", padded=False, weights=Pretrained(file, new_gates=True)
    ).eval()
    set_gates(ours, 1e4)
    images = torch.randn(1, 3, 123, 98)
    expected = peer_maps(theirs.eval(), images)
    for level, map_ in ours(images).items():
        assert map_.shape == expected[level].shape
        assert largest_difference(map_, expected[level]) <= 1e-5, level


@pytest.mark.parametrize("side", runs.mostly_slow([299, 320], 299))
@torch.no_grad()
def test_as_a_classifier_it_is_torchvisions(theirs, file, side):
    ours = classifier(theirs, file).eval()
    theirs = copy.deepcopy(theirs).eval()
    theirs.transform_input = True
    images = torch.rand(1, 3, side, side)
    assert largest_difference(ours(images), theirs(normalize_all(images, PixelFormat()))) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("side", [299, 320])
@torch.no_grad()
def test_with_the_auxiliary_classifier_it_trains_as_torchvisions(theirs, file, side):
    ours, theirs = classifier(theirs, file).double().train(), copy.deepcopy(theirs).double().train()
    theirs.transform_input = True  # float64, for two cells of a channel are too few for batch norm in float32
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    logits, auxiliary = theirs(normalize_all(images, PixelFormat()))
    seen = []
    ours.backbone.auxiliary.register_forward_hook(lambda _module, _input, output: seen.append(output))
    losses, got = ours.losses(images, torch.tensor([0, 1]))
    assert set(losses) == {"loss_classifier", "loss_auxiliary"}
    assert largest_difference(seen[0], auxiliary) <= 1e-9
    assert largest_difference(got, logits) <= 1e-9


def classifier(theirs: Inception3, file: str) -> ImageClassifier:
    """Ours with torchvision's weights and open gates."""
    backbone = SEInceptionV3(levels=["c5"], padded=False, auxiliary_classes=7, weights=Pretrained(file, new_gates=True))
    set_gates(backbone, 1e4)
    ours = ImageClassifier(backbone, num_classes=7)
    ours.classifier.load_state_dict(theirs.fc.state_dict())
    return ours


def normalize_all(images: torch.Tensor, pixel_format: PixelFormat) -> torch.Tensor:
    return torch.stack([normalize(image, pixel_format) for image in images])


def test_the_pixel_format_is_torchvisions_transform_input(shapes_only):
    image = torch.rand(3, 5, 4)
    with torch.device("meta"):
        theirs = Inception3(init_weights=False, transform_input=True)
    expected = theirs._transform_input(normalize(image, PixelFormat())[None])[0]
    assert torch.allclose(normalize(image, shapes_only.pixel_format), expected, atol=1e-6)
    assert torch.allclose(normalize(torch.ones(3, 1, 1), shapes_only.pixel_format), torch.ones(3, 1, 1))


def test_parameters_are_torchvisions_and_the_gates():
    with torch.device("meta"):
        theirs = Inception3(init_weights=False)
        plain, ours = (SEInceptionV3(kind, levels=["c5"]) for kind in (None, "se"))
    wanted = sum(p.numel() for name, p in theirs.named_parameters() if name.split(".")[0] not in ("fc", "AuxLogits"))
    assert sum(p.numel() for p in plain.parameters()) == wanted
    wanted += sum(2 * channels * HIDDEN[channels] + HIDDEN[channels] + channels for channels in CHANNELS)
    assert sum(p.numel() for p in ours.parameters()) == wanted
    gates = [module for module in ours.modules() if isinstance(module, SqueezeExcitation)]
    assert [gate.squeeze.in_channels for gate in gates] == CHANNELS
    assert ours.out_channels == 2048


# --- sizes and places of cells


@pytest.mark.parametrize("level", LEVELS)
def test_sizes_do_not_depend_on_which_levels_are_built(level):
    with torch.device("meta"):
        backbone = SEInceptionV3(None, levels=[level]).eval()
    for height, width in ((64, 97), (98, 67), (75, 101)):
        stride = STRIDES[level]
        map_ = backbone(torch.empty(1, 3, height, width, device="meta"))[level]
        assert tuple(map_.shape[2:]) == (-(-height // stride), -(-width // stride))


@torch.no_grad()
def test_an_image_smaller_than_torchvision_takes(gated):
    features = gated(torch.randn(1, 3, 33, 74))
    assert {level: tuple(map_.shape[2:]) for level, map_ in features.items()} == {
        "c2": (9, 19),
        "c3": (5, 10),
        "c4": (3, 5),
        "c5": (2, 3),
    }
    assert all(map_.isfinite().all() and map_.std() > 0 for map_ in features.values())


def linear(backbone: SEInceptionV3, monkeypatch: pytest.MonkeyPatch) -> SEInceptionV3:
    """Constant positive weights and means in the place of maxima: what a cell sees is then symmetric around its middle."""
    monkeypatch.setattr(
        nn.functional,
        "max_pool2d",
        lambda x, kernel_size, stride, *_, **__: nn.functional.avg_pool2d(x, kernel_size, stride),
    )
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return backbone.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("levels", "padded", "axis", "expected"),
    [
        (["c4"], True, 2, [0.5]),
        (LEVELS, True, 3, [0.5, -1.5, 2.5, -5.5]),
        (LEVELS, False, 3, [7.5, 9.5, 13.5, 21.5]),  # torchvision's own
    ],
)
def test_cells_lie_where_the_offsets_say(levels, padded, axis, expected, monkeypatch):
    backbone = linear(SEInceptionV3(None, levels=levels, out_channels="own", padded=padded), monkeypatch)
    assert list(backbone.offsets.values()) == expected
    size = [1, 3, 79, 79]
    size[axis] = 1333
    images = torch.ones(size, requires_grad=True)
    features = backbone(images)
    for level, map_ in features.items():
        cell = map_.shape[axis] // 2
        row = map_.select(axis, cell).sum()
        [seen] = torch.autograd.grad(row, images, retain_graph=True)
        profile = seen.double().sum([d for d in range(4) if d != axis])  # [1333]
        center = (profile * (torch.arange(1333) + 0.5)).sum() / profile.sum()
        wanted = (cell + 0.5) * STRIDES[level] + backbone.offsets[level]
        assert center.item() == pytest.approx(wanted, abs=0.02), level


@pytest.mark.parametrize("level", LEVELS)
def test_a_single_level_is_half_a_pixel_from_its_place(level):
    assert offset(level, best_paddings([level])) == 0.5  # cells around whole pixels cannot come nearer


@pytest.mark.parametrize("levels", [c for n in (1, 2, 3, 4) for c in itertools.combinations(LEVELS, n)])
def test_no_paddings_are_better(levels):
    def badness(offsets):
        return max(abs(o) / STRIDES[level] for level, o in offsets.items())

    best = badness({level: offset(level, best_paddings(levels)) for level in levels})
    parts = [name for name, _ in unpadded_until(levels[-1])]
    for leading in itertools.product(*((-1, 0, 1, 2) if UNPADDED[name] == 2 else (0, 1) for name in parts)):
        paddings = {name: (before, 0) for name, before in zip(parts, leading, strict=True)}
        assert badness({level: offset(level, paddings) for level in levels}) >= best
    assert best <= 0.22  # of a cell; half a cell without a choice


@torch.no_grad()
def test_paddings_only_move_cells():
    """The same weights with other paddings: an image moved by the difference of the offsets gives the same map."""
    one = SEInceptionV3(None, levels=["c3"]).eval()
    two = SEInceptionV3(None, levels=["c2", "c3"], out_channels="own").eval()
    two.load_state_dict(one.state_dict())
    assert one.offsets == {"c3": 0.5}
    assert two.offsets == {"c2": 0.5, "c3": -1.5}
    images = torch.randn(1, 3, 160, 160)
    moved = nn.functional.pad(images, (-2, 2, -2, 2))  # by two pixels to the left and up
    inner = (..., slice(8, 12), slice(8, 12))  # farther from every border than a cell of c3 sees
    expected = one(images)["c3"][inner]
    assert largest_difference(two(moved)["c3"][inner], expected) <= 1e-5
    assert largest_difference(two(images)["c3"][inner], expected) > 0.1


# --- gates


@torch.no_grad()
def test_closed_gates_give_zeros():
    backbone = SEInceptionV3(levels=LEVELS[1:], out_channels="own").eval()
    set_gates(backbone, -1e4)
    features = backbone(torch.randn(1, 3, 64, 64))
    assert {level: map_.abs().max().item() for level, map_ in features.items()} == {"c3": 0, "c4": 0, "c5": 0}


@torch.no_grad()
def test_every_gate_changes_the_output(gated):
    images = torch.randn(1, 3, 64, 64)
    before = gated(images)["c5"]
    gates = [module for module in gated.modules() if isinstance(module, Attention)]
    assert len(gates) == len(CHANNELS)
    for gate in gates:
        kept = gate.excite.bias.clone()
        gate.excite.bias[::2] = 20.0
        assert largest_difference(gated(images)["c5"], before) > 1e-4
        gate.excite.bias.copy_(kept)
    assert torch.equal(gated(images)["c5"], before)


def test_float64_gradients_reach_every_parameter():
    backbone = SEInceptionV3(levels=["c3", "c5"], out_channels=16).double()
    features = backbone(torch.randn(2, 3, 64, 75, dtype=torch.float64))
    sum((map_ * torch.randn_like(map_)).sum() for map_ in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("kind", "module"), GATINGS.items())
@torch.no_grad()
def test_every_kind_of_attention_in_one_stage(kind, module):
    backbone = SEInceptionV3({"c3": kind}, levels=["c4"]).eval()
    gates = {name: part for name, part in backbone.named_modules() if name.endswith(".gate")}
    assert list(gates) == [f"stages.c3.Mixed_5{block}.gate" for block in "bcd"]
    assert {type(gate) for gate in gates.values()} == {module}
    plain = SEInceptionV3(None, levels=["c4"]).eval()
    plain.load_state_dict({name: value for name, value in backbone.state_dict().items() if ".gate." not in name})
    images = torch.randn(1, 3, 32, 48)
    assert largest_difference(backbone(images)["c4"], plain(images)["c4"]) > 1e-3


# --- weights


def test_torchvisions_weights_have_no_gates_and_new_ones_start_open(theirs, file):
    with pytest.raises(
        CheckpointError, match=r"lacks \d+ tensors, stages\.c3\.Mixed_5b\.gate.*attention null.*new_gates"
    ):
        SEInceptionV3(weights=file)
    ours = SEInceptionV3(weights=Pretrained(file, new_gates=True))
    variance = ours.state_dict()["stages.c4.Mixed_6e.block.branch_pool.bn.running_var"]
    assert torch.equal(variance, theirs.Mixed_6e.branch_pool.bn.running_var)
    gates = [module for module in ours.modules() if isinstance(module, SqueezeExcitation)]
    with torch.no_grad():
        opened = [gate.weights(torch.rand(1, gate.squeeze.in_channels, 3, 3)).mean().item() for gate in gates]
    assert len(opened) == 8
    assert min(opened) > 0.9


def test_torchvisions_weights_by_name(theirs, monkeypatch):
    monkeypatch.setattr(Inception_V3_Weights, "get_state_dict", lambda self, **_: theirs.state_dict())
    ours = SEInceptionV3(levels=["c2"], weights="IMAGENET1K_V1")
    assert torch.equal(ours.stem.Conv2d_1a_3x3.block.conv.weight, theirs.Conv2d_1a_3x3.conv.weight)
    with pytest.raises(UsageError, match="did you mean 'IMAGENET1K_V1'"):
        SEInceptionV3(levels=["c2"], weights="IMAGENET1K_V2")


@pytest.mark.parametrize(("classes", "same"), [(7, True), (9, False)])
def test_the_auxiliary_classifier_is_taken_as_a_whole_or_not(theirs, file, classes, same):
    ours = SEInceptionV3(None, auxiliary_classes=classes, weights=file)
    assert torch.equal(ours.auxiliary.conv1.conv.weight, theirs.AuxLogits.conv1.conv.weight) == same
    assert ours.auxiliary.fc.out_features == classes


@pytest.mark.parametrize(("classes", "same"), [(3, True), (5, False), (None, False)])
def test_our_auxiliary_classifier_is_taken_as_a_whole_or_not(tmp_path, classes, same):
    full = SEInceptionV3(levels=["c4"], auxiliary_classes=classes)
    again = SEInceptionV3(levels=["c4"], auxiliary_classes=3, weights=saved(full, tmp_path))
    assert torch.equal(again.stem.Conv2d_1a_3x3.block.conv.weight, full.stem.Conv2d_1a_3x3.block.conv.weight)
    if classes is not None:
        assert torch.equal(again.auxiliary.conv1.conv.weight, full.auxiliary.conv1.conv.weight) == same


def test_our_weights_are_loaded_whole_or_not_at_all(tmp_path):
    full = SEInceptionV3(levels=["c3"], out_channels=8)
    path = saved(full, tmp_path)
    again = SEInceptionV3(levels=["c2", "c3"], out_channels="own", weights=path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, full.state_dict()[name]), name
    state = full.state_dict()
    del state["stages.c3.Mixed_5c.gate.excite.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, stages\.c3\.Mixed_5c\.gate\.excite\.bias"):
        SEInceptionV3(levels=["c3"], weights=path)
    torch.save({name: value for name, value in state.items() if ".gate." not in name}, path)
    with pytest.raises(CheckpointError, match=r"lacks 12 tensors.*new_gates"):
        SEInceptionV3(levels=["c3"], weights=path)
    SEInceptionV3(levels=["c3"], weights=Pretrained(path, new_gates=True))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors, stages\.c4\.Mixed_6a"):
        SEInceptionV3(None, levels=["c4"], weights=path)


def test_gates_do_not_vanish_without_a_word(tmp_path):
    path = saved(SEInceptionV3(levels=["c3"]), tmp_path)
    with pytest.raises(CheckpointError, match=r"has unknown 12 tensors, stages\.c3\.Mixed_5b\.gate"):
        SEInceptionV3(None, levels=["c3"], weights=path)


def test_a_deeper_network_of_ours_lends_its_weights(tmp_path):
    full = SEInceptionV3(levels=["c4"], auxiliary_classes=3)
    again = SEInceptionV3(levels=["c3"], weights=saved(full, tmp_path))
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_damaged_weights_of_torchvision_are_named(theirs, tmp_path, change):
    state = dict(theirs.state_dict())
    if change == "missing":
        del state["Mixed_5b.branch1x1.conv.weight"]
    elif change == "unknown":
        state["Mixed_8a.conv.weight"] = torch.zeros(1)
    else:
        state["Mixed_5b.branch1x1.conv.weight"] = torch.zeros(3, 192, 1, 1)
    torch.save(state, tmp_path / "w.pth")
    name = {"unknown": "Mixed_8a.conv.weight"}.get(change, "stages.c3.Mixed_5b.block.branch1x1.conv.weight")
    with pytest.raises(CheckpointError, match=f"1 tensors, {name}"):
        SEInceptionV3(None, levels=["c3"], weights=str(tmp_path / "w.pth"))


@torch.no_grad()
def test_weights_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    other = random_norms(timm.create_model("inception_v3", num_classes=5)).eval()
    ours = SEInceptionV3(None, levels=["c5"], padded=False, weights=saved(other, tmp_path)).eval()
    images = torch.randn(1, 3, 80, 91)
    assert largest_difference(ours(images)["c5"], other.forward_features(images)) <= 1e-5


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ["c6"]}, r"levels must be distinct names out of \['c2', 'c3', 'c4', 'c5'\], got \['c6'\]"),
        ({"levels": []}, "levels must be distinct names"),
        ({"levels": "c4"}, "levels must be distinct names"),
        ({"levels": ["c4", "c4"]}, "levels must be distinct names"),
        ({"levels": ["c3", "c4"]}, "levels of unequal width"),
        ({"reduction": 300}, r"reduction must be in 1\.\.channels \(256\), got 300"),
        ({"attention": "sek"}, "unknown kind 'sek'.*did you mean 'se'"),
        ({"attention": {"c2": "se"}}, "unknown stage 'c2', expected some of"),
        ({"auxiliary_classes": 0}, "auxiliary_classes must be at least 1, got 0"),
        ({"auxiliary_classes": 5, "levels": ["c3"]}, r"auxiliary_classes needs level c4 or c5, got levels \['c3'\]"),
        ({"regime": Regime(drop_path=0.1)}, r"drop_path must be 0.*got 0\.1"),
        ({"regime": Regime(frozen=("c5",))}, "frozen: no stage 'c5'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SEInceptionV3(**options)


def test_images_that_are_too_small(shapes_only):
    with pytest.raises(ValueError, match="images of 64 x 31 pixels are smaller than the stride 32 of level c5"):
        shapes_only(torch.empty(1, 3, 64, 31, device="meta"))
    with torch.device("meta"):
        unpadded = SEInceptionV3(levels=["c5"], padded=False).eval()
    with pytest.raises(ValueError, match=r"images of 74 x 80 pixels.*level c5 of stride 32 needs.*75 x 75"):
        unpadded(torch.empty(1, 3, 74, 80, device="meta"))
    assert unpadded(torch.empty(1, 3, 75, 75, device="meta"))["c5"].shape == (1, 2048, 1, 1)


@pytest.mark.parametrize(("padded", "side"), [(True, 257), (False, 299)])
def test_the_auxiliary_classifier_says_what_it_needs(padded, side):
    with torch.device("meta"):
        backbone = SEInceptionV3(padded=padded, auxiliary_classes=10).eval()
    features, logits = backbone.forward_with_auxiliary(torch.empty(2, 3, side, side, device="meta"))
    assert features["c4"].shape == (2, 768, 17, 17)
    assert logits.shape == (2, 10)
    with pytest.raises(ValueError, match=rf"at least {side} x {side} pixels, got {side} x {side - 1}"):
        backbone.forward_with_auxiliary(torch.empty(2, 3, side, side - 1, device="meta"))
    with torch.device("meta"), pytest.raises(ValueError, match="give auxiliary_classes"):
        SEInceptionV3(levels=["c2"]).forward_with_auxiliary(torch.empty(1, 3, 299, 299))
