import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models import _api
from torchvision.ops import StochasticDepth

from detpipe.backbones import Extractor, Level
from detpipe.backbones.regime import Regime
from detpipe.backbones.weights import read_state
from detpipe.images import to_batch
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.types import PixelFormat

CAFFE = PixelFormat(mean=(103.939, 116.779, 123.68), std=(1, 1, 1), channel_order="bgr", value_range=255.0)
SQUEEZE = {"c4": Level("features.12", 16)}


@pytest.mark.parametrize(
    ("network", "levels", "widths"),
    [
        ("resnet18", {"c3": Level("layer2", 8), "c4": Level("layer3", 16), "c5": Level("layer4", 32)}, (128, 256, 512)),
        ("squeezenet1_1", {"c3": Level("features.7", 8), "c4": Level("features.12", 16)}, (256, 512)),
        ("mobilenet_v3_small", {"c3": Level("features.3", 8), "c5": Level("features.12", 32)}, (24, 576)),
    ],
)
def test_networks_are_cut_where_wanted(network, levels, widths):
    backbone = Extractor(network, levels, out_channels=16, padding=8 if "squeeze" in network else 0)
    assert backbone.strides == {name: level.stride for name, level in levels.items()}
    assert [p.in_channels for p in backbone.laterals.projections.values()] == list(widths)
    assert not any(
        isinstance(module, nn.BatchNorm2d) for module in backbone.modules()
    )  # frozen, if nothing else is said
    features = backbone(torch.zeros(2, 3, 96, 160))
    assert list(features) == list(levels)
    for name, level in levels.items():
        assert features[name].shape[:2] == (2, 16)
        assert abs(features[name].shape[2] - 96 / level.stride) <= 1
        assert abs(features[name].shape[3] - 160 / level.stride) <= 1


@pytest.mark.usefixtures("_offline")
def test_a_weights_file_with_its_own_recipe(shared_data):
    path = shared_data / "weights" / "squeezenet1_1_features.pth"
    backbone = Extractor("squeezenet1_1", SQUEEZE, weights=str(path), pixel_format=CAFFE).eval()
    plain = models.squeezenet1_1(weights=None).eval()
    missing, unexpected = plain.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert missing == ["classifier.1.weight", "classifier.1.bias"]
    assert not unexpected
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    batch = to_batch([image], backbone.pixel_format, 64, 80, 16).tensors
    by_hand = image.flip(0).float() - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    torch.testing.assert_close(batch[0], by_hand, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(backbone(batch)["c4"], plain.features(batch))


def test_padding_is_added_before_the_network():
    backbone = Extractor("squeezenet1_1", SQUEEZE, padding=8).eval()
    images = torch.randn(1, 3, 64, 96)
    framed = torch.zeros(1, 3, 80, 112)
    framed[:, :, 8:-8, 8:-8] = images
    assert torch.equal(backbone(images)["c4"], backbone.body(framed)["c4"])
    assert backbone(images)["c4"].shape[2:] == (4, 6)  # no cell is lost at the border


def test_checking_the_strides_leaves_no_trace_in_the_statistics():
    backbone = Extractor("resnet18", {"c4": Level("layer3", 16)}, regime=Regime(norm="batch"))
    assert backbone.training
    assert not any(value.any() for key, value in backbone.state_dict().items() if key.endswith("running_mean"))


def test_drop_path_is_what_is_given():
    for rate in (0.0, 0.4):  # torchvision's own default for this network is 0.2
        backbone = Extractor("efficientnet_b0", {"c3": Level("features.3", 8)}, regime=Regime("frozen", drop_path=rate))
        rates = [module.p for module in backbone.body.modules() if isinstance(module, StochasticDepth)]
        assert len(rates) == 2  # of the first five blocks of 16; the others have no shortcut
        torch.testing.assert_close(rates, [rate * 3 / 16, rate * 5 / 16])
        images = torch.randn(4, 3, 64, 64)
        same = torch.equal(backbone.train()(images)["c3"], backbone(images)["c3"])
        assert same == (rate == 0)
    with pytest.raises(ValueError, match="drop_path: torchvision's resnet18 has no paths to drop"):
        Extractor("resnet18", {"c4": Level("layer3", 16)}, regime=Regime(drop_path=0.1))


def test_images_that_are_too_small():
    backbone = Extractor("resnet18", {"c4": Level("layer3", 16)})
    with pytest.raises(ValueError, match="15 x 64 pixels are smaller than the stride 16"):
        backbone(torch.zeros(1, 3, 15, 64))
    backbone = Extractor("squeezenet1_1", SQUEEZE)  # its convolutions are not padded
    with pytest.raises(
        ValueError, match=r"16 x 90 pixels is too small for level 'c4' of squeezenet1_1, whose stride is 16"
    ):
        backbone(torch.zeros(2, 3, 16, 90))
    with pytest.raises(RuntimeError, match="expected input"):  # another mistake is not taken for this one
        backbone(torch.zeros(1, 1, 64, 64))


def test_only_what_is_used_is_trained():
    names = {name for name, _ in Extractor("squeezenet1_1", {"c3": Level("features.7", 8)}).named_parameters()}
    assert not any("classifier" in name or "features.9" in name for name in names)


@pytest.mark.parametrize(("suffix", "nested"), [(".pth", True), (".pt", False), (".safetensors", False)])
@pytest.mark.usefixtures("_offline")
def test_weights_files_of_every_kind(tmp_path, suffix, nested):
    state = models.get_model("mobilenet_v3_small", weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if nested else state, path)
    backbone = Extractor("mobilenet_v3_small", {"c5": Level("features.12", 32)}, str(path), regime=Regime(norm="batch"))
    own = backbone.body.state_dict()
    assert len(own) > 100
    assert all(torch.equal(value, state[key]) for key, value in own.items())


def test_a_weights_name_downloads_what_torchvision_names(monkeypatch):
    state = models.squeezenet1_1(weights=None).state_dict()
    asked = []

    def download(url, *args, **kwargs):
        asked.append((url, kwargs.get("check_hash")))
        return state

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    backbone = Extractor("squeezenet1_1", SQUEEZE, weights="DEFAULT")
    assert asked == [(models.SqueezeNet1_1_Weights.DEFAULT.url, True)]
    assert torch.equal(backbone.body.state_dict()["features.0.weight"], state["features.0.weight"])


@pytest.mark.usefixtures("_offline")
def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError, match=r"unknown network 'resnet_18'.*; did you mean 'resnet18'"):
        Extractor("resnet_18", SQUEEZE)
    with pytest.raises(UsageError, match=r"squeezenet1_1 has no node 'feature\.12'; did you mean 'features\.12"):
        Extractor("squeezenet1_1", {"c4": Level("feature.12", 16)})
    with pytest.raises(
        UsageError, match=r"unknown weights 'IMAGENET_V1'.*squeezenet1_1's .*; did you mean 'IMAGENET1K_V1'"
    ):
        Extractor("squeezenet1_1", SQUEEZE, weights="IMAGENET_V1")


@pytest.mark.parametrize("weights", ["squeeze.pth", "folder/squeeze", "https://example.org/squeeze.pth"])
@pytest.mark.usefixtures("_offline")
def test_a_missing_file_is_named_and_an_address_is_not_followed(weights):
    with pytest.raises(CheckpointError, match=r"weights (file \S+: no such file|\S+: addresses are not loaded)"):
        Extractor("squeezenet1_1", SQUEEZE, weights=weights)


def test_weights_beyond_the_cut_may_be_missing_or_of_another_class_count(tmp_path):
    state = models.squeezenet1_1(weights=None, num_classes=7).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("features.12")}, tmp_path / "w.pth")
    Extractor("squeezenet1_1", {"c3": Level("features.7", 8)}, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"not a weights file", b"\x80\x04\x95", b"PK\x03\x04" + bytes(30)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights file .*weights.* cannot be read as a state dict of tensors"):
        Extractor("squeezenet1_1", SQUEEZE, str(path))


@pytest.mark.slow
def test_a_cut_or_altered_file_never_ends_in_another_error(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(
        {key: value[:1] for key, value in models.squeezenet1_1(weights=None).state_dict().items()},
        path,
        _use_new_zipfile_serialization=False,
    )
    content, refused = path.read_bytes(), 0
    for position in torch.randint(0, 2000, (300,)).tolist():
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            read_state(path)  # an altered number is not noticed, an altered structure is
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "got list"), ({"a": 1}, "got 'a' -> int"), ({1: torch.zeros(1)}, "got 1 -> Tensor")],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"must hold a state dict \(name -> tensor\), {message}"):
        Extractor("squeezenet1_1", SQUEEZE, str(tmp_path / "weights.pth"))


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_file_runs_nothing(tmp_path, save):
    marker, path = tmp_path / "marker", tmp_path / "weights.pth"
    save({"features.0.weight": Malicious(marker)}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Extractor("squeezenet1_1", SQUEEZE, str(path))
    assert not marker.exists()
    if save is not torch.save:  # the file does what it says where it is trusted
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    ("network", "levels", "options", "message"),
    [
        (
            "vit_b_32",
            {"c5": Level("encoder.ln", 32)},
            {},
            "vit_b_32 does not take images of any size: Wrong image height",
        ),
        ("squeezenet1_1", SQUEEZE, {"padding": -1}, "padding must be at least 0, got -1"),
        (
            "squeezenet1_1",
            {"c4": Level("features.12", 8)},
            {},
            "stride 8 is declared, but it is 16",
        ),  # borders are lost
        ("resnet18", {"c4": Level("layer3", 17)}, {}, "level 'c4': stride 17 is declared, but it is 16"),
        ("resnet18", {"c4": Level("layer4", 16)}, {}, "level 'c4': stride 16 is declared, but it is 32"),
        ("resnet18", {"c4": Level("flatten", 32)}, {}, r"expected a map .* cut elsewhere"),
        ("resnet18", {"c4": Level("avgpool", 32)}, {}, r"expected a map .* cut elsewhere"),
        ("resnet18", {}, {}, "levels must name"),
        ("resnet18", {"c3": Level("layer2", 8), "c4": Level("layer3", 16)}, {}, r"unequal width .* need out_channels"),
    ],
)
def test_bad_arguments(network, levels, options, message):
    with pytest.raises(ValueError, match=message):
        Extractor(network, levels, **options)


@pytest.mark.parametrize("network", ["resnet18", "timm/resnet10t"])
def test_weights_of_a_network_of_groups_have_no_statistics(network, tmp_path):
    if network.startswith("timm/"):
        pytest.importorskip("timm")
    levels = ["c4"] if network.startswith("timm/") else {"c4": Level("layer3", 16)}
    first = Extractor(network, levels, regime=Regime(norm="group"))
    path = tmp_path / "weights.pth"
    torch.save(first.body.state_dict(), path)
    again = Extractor(network, levels, str(path), regime=Regime(norm="group"))
    for name, value in again.body.state_dict().items():
        assert torch.equal(value, first.body.state_dict()[name]), name
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors, .*running_mean"):
        Extractor(network, levels, str(path), regime=Regime(norm="frozen"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_have_the_mode_of_their_original(training, copied):
    regime = Regime(norm="batch", frozen=("features.0",))
    original = Extractor("mobilenet_v3_small", {"c4": Level("features.8", 16)}, regime=regime).train(training)
    other, images = copied(original), torch.rand(2, 3, 64, 64)
    leaves = [
        (mine, its) for mine, its in zip(other.modules(), original.modules(), strict=True) if not [*its.children()]
    ]
    assert all(mine.training == its.training for mine, its in leaves)
    torch.testing.assert_close(other(images), original(images), rtol=0, atol=0)
