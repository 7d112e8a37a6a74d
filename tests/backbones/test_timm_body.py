import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detpipe.backbones.extractor import Extractor, Level
from detpipe.backbones.regime import Regime
from detpipe.backbones.timm_body import TimmBody
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.types import PixelFormat

timm = pytest.importorskip("timm")

BATCH = Regime(norm="batch")
C3_C4 = ["c3", "c4"]


def classifier(name: str, **options) -> nn.Module:
    """A network with random weights and statistics that no fresh one has."""
    network = timm.create_model(name, **options).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def reached(backbone: Extractor) -> set[str]:
    backbone.zero_grad()
    sum(level.sum() for level in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    return {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}


# --- levels


@pytest.mark.parametrize(
    ("network", "widths"),
    [
        ("resnet10t", (128, 256, 512)),
        ("convnext_atto", (80, 160, 320)),
        ("mobilenetv3_small_050", (16, 24, 288)),
        ("regnety_002", (56, 152, 368)),
    ],
)
def test_levels_by_name(network, widths):
    backbone = Extractor(f"timm/{network}", ["c3", "c4", "c5"], out_channels="own").eval()
    assert backbone.strides == {"c3": 8, "c4": 16, "c5": 32}
    assert tuple(backbone.level_channels.values()) == widths
    features = backbone(torch.zeros(2, 3, 96, 160))
    assert list(features) == ["c3", "c4", "c5"]
    for (level, stride), width in zip(backbone.strides.items(), widths, strict=True):
        assert features[level].shape == (2, width, 96 // stride, 160 // stride)


def test_levels_by_node():
    backbone = Extractor("timm/resnet10t", {"fine": Level("layer1", 4), "top": Level("layer3", 16)}, out_channels=8)
    assert {name: tuple(level.shape) for name, level in backbone(torch.zeros(1, 3, 64, 64)).items()} == {
        "fine": (1, 8, 16, 16),
        "top": (1, 8, 4, 4),
    }
    with pytest.raises(ValueError, match="level 'top': stride 8 is declared, but it is 16"):
        Extractor("timm/resnet10t", {"top": Level("layer3", 8)})


@pytest.mark.parametrize("network", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_a_cell_lies_where_the_box_is(network):
    torch.manual_seed(0)
    backbone, images = Extractor(f"timm/{network}", ["c4"]).eval(), torch.zeros(1, 3, 160, 208)
    blank = backbone(images)["c4"]
    images[:, :, 64:80, 112:128] = 3.0  # row 4, column 7
    changed = (backbone(images)["c4"] - blank).abs().sum(1)[0]
    assert divmod(int(changed.argmax()), changed.shape[1]) == (4, 7)


def test_a_plain_vision_transformer_yields_its_last_block():
    network = classifier("vit_tiny_patch16_224", dynamic_img_size=True)
    backbone = Extractor("timm/vit_tiny_patch16_224", ["c4"]).eval()
    keys = backbone.body.load_state_dict(
        {f"model.{key}": value for key, value in network.state_dict().items()}, strict=False
    )
    assert not keys.missing_keys
    images = torch.randn(1, 3, 60, 90)
    padded = nn.functional.pad(images, (0, 6, 0, 4))
    (expected,) = network.forward_intermediates(padded, indices=[11], norm=False, intermediates_only=True)
    torch.testing.assert_close(backbone(images)["c4"], expected)
    assert backbone.pixel_format == PixelFormat((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@torch.no_grad()
def test_maps_with_channels_at_the_end_are_turned():
    backbone = Extractor("timm/swin_tiny_patch4_window7_224", ["c4"]).eval()
    assert backbone(torch.zeros(1, 3, 70, 100))["c4"].shape == (1, 384, 5, 7)


@pytest.mark.parametrize("network", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "hrnet_w18_small"])
def test_only_what_is_used_is_trained(network):
    backbone = Extractor(f"timm/{network}", ["c4"], regime=BATCH).train()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert reached(backbone) == trained
    if "hrnet" not in network:  # whose branches depend on each other to the end
        assert len(trained) == len(list(backbone.parameters()))


def test_a_network_whose_branches_must_fit_sees_whole_cells():
    backbone = Extractor("timm/hrnet_w18_small", ["c2"]).eval()
    assert backbone(torch.zeros(1, 3, 70, 101))["c2"].shape[2:] == (24, 32)  # of 96 x 128 pixels


@pytest.mark.usefixtures("_offline")
def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError, match=r"timm has no network 'resnt10t'; did you mean 'resnet10t'"):
        Extractor("timm/resnt10t", C3_C4)
    with pytest.raises(UsageError, match=r"timm/resnet10t has no node 'layr3'; did you mean 'layer3'.*'layer1', "):
        Extractor("timm/resnet10t", {"c4": Level("layr3", 16)})
    with pytest.raises(UsageError, match=r"timm/convnext_atto has no level 'c1'; expected some of \['c2', 'c3', 'c4'"):
        Extractor("timm/convnext_atto", ["c1"])
    with pytest.raises(UsageError, match=r"unknown weights 'c3_in1' of timm's resnet10t: .* did you mean 'c3_in1k'"):
        Extractor("timm/resnet10t", C3_C4, weights="c3_in1")
    with pytest.raises(UsageError, match=r"unknown weights 'c4_in1k' of timm's resnet10t"):
        Extractor("timm/resnet10t.c4_in1k", C3_C4)


@pytest.mark.parametrize("levels", ["c4", ["c4", "c4"]])
def test_bad_lists_of_levels(levels):
    with pytest.raises(ValueError, match="levels must be distinct names"):
        Extractor("timm/resnet10t", levels)


def test_levels_of_unequal_width_need_a_projection():
    with pytest.raises(ValueError, match=r"unequal width \{'c3': 128, 'c4': 256\} need out_channels"):
        Extractor("timm/resnet10t", C3_C4)


def test_torchvision_networks_need_nodes():
    with pytest.raises(
        ValueError, match=r"levels of torchvision's resnet18 need the node and stride of each.*\['c4'\]"
    ):
        Extractor("resnet18", ["c4"])


@pytest.mark.parametrize("network", ["hiera_tiny_224", "maxvit_pico_rw_256"])
def test_a_network_of_one_image_size_is_refused(network):
    with pytest.raises(
        ValueError, match=rf"timm/{network} does not take images of any size: .*; give a network"
    ) as raised:
        Extractor(f"timm/{network}", ["c4"])
    assert "\n" not in str(raised.value)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"network timm/resnet10t needs timm: pip install 'detpipe\[timm\]'"):
        Extractor("timm/resnet10t", ["c4"])


# --- weights


@pytest.mark.parametrize(
    ("network", "node"),
    [
        ("resnet10t", "layer3"),
        ("convnext_atto", "stages.2"),
        ("mobilenetv3_small_050", "blocks.3"),
        ("skresnet18", "layer3"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.usefixtures("_offline")
def test_weights_of_a_whole_classifier(tmp_path, network, node, suffix):
    whole, path = classifier(network, num_classes=7), tmp_path / f"weights{suffix}"
    save_file(whole.state_dict(), path) if suffix == ".safetensors" else torch.save(whole.state_dict(), path)
    backbone = Extractor(f"timm/{network}", ["c4"], weights=str(path)).eval()
    heard = []
    whole.get_submodule(node).register_forward_hook(lambda module, inputs, output: heard.append(output))
    images = torch.randn(1, 3, 64, 96)
    whole(images)
    torch.testing.assert_close(backbone(images)["c4"], heard[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.usefixtures("_offline")
def test_weights_of_features_alone(tmp_path, network):
    features, path = classifier(network, features_only=True), tmp_path / "weights.pth"
    torch.save(features.state_dict(), path)
    backbone = Extractor(f"timm/{network}", C3_C4, str(path), out_channels="own").eval()
    images = torch.randn(1, 3, 64, 96)
    for got, expected in zip(backbone(images).values(), features(images)[-3:-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_offline")
def test_beyond_the_last_level_weights_may_be_missing(tmp_path):
    state = {k: v for k, v in classifier("resnet10t").state_dict().items() if not k.startswith(("layer4", "fc"))}
    torch.save(state, tmp_path / "weights.pth")
    Extractor("timm/resnet10t", ["c4"], weights=str(tmp_path / "weights.pth"))
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors, layer4"):
        Extractor("timm/resnet10t", ["c5"], weights=str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("network", "weights", "asked"),
    [
        ("resnet10t", "DEFAULT", "resnet10t"),
        ("resnet10t", "c3_in1k", "resnet10t.c3_in1k"),
        ("resnet10t.c3_in1k", "DEFAULT", "resnet10t.c3_in1k"),
    ],
)
@pytest.mark.usefixtures("_offline")
def test_a_weights_name_downloads_what_timm_names(monkeypatch, network, weights, asked):
    create, downloads, whole = timm.create_model, [], classifier("resnet10t")

    def instead(name, pretrained=False, **options):
        if not pretrained:
            return create(name, **options)
        downloads.append(name)
        return whole

    monkeypatch.setattr(timm, "create_model", instead)
    backbone = Extractor(f"timm/{network}", ["c4"], weights=weights, regime=BATCH)
    assert downloads == [asked]
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


@pytest.mark.usefixtures("_offline")
def test_pixels_follow_the_network_and_its_tag():
    torchvisions = PixelFormat()
    assert Extractor("timm/mobilenetv3_large_100", ["c4"]).pixel_format == torchvisions
    other = Extractor("timm/mobilenetv3_large_100.miil_in21k", ["c4"])
    assert other.pixel_format == PixelFormat((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert Extractor("timm/resnet10t", ["c4"], pixel_format=other.pixel_format).pixel_format == other.pixel_format
    with pytest.raises(
        ValueError, match=r"mean \(0.0, .*network timm/mobilenetv3_large_100.miil_in21k and weights DEFAULT"
    ):
        Extractor("timm/mobilenetv3_large_100", ["c4"], weights="miil_in21k")


@pytest.mark.usefixtures("_offline")
def test_networks_without_pretrained_weights():
    name = next(name for name in ("resnet26t", *timm.list_models()) if not timm.list_pretrained(f"{name}*"))
    with pytest.raises(UsageError, match=f"unknown weights 'DEFAULT' of timm's {name}: .* timm has none of it"):
        Extractor(f"timm/{name}", ["c4"], weights="DEFAULT")


# --- regime


@pytest.mark.parametrize("network", ["convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_drop_path(network):
    backbone = Extractor(f"timm/{network}", ["c4"], regime=Regime(norm="frozen", drop_path=0.5))
    rates = [module.drop_prob for module in backbone.body.modules() if hasattr(module, "drop_prob")]
    assert rates == sorted(rates)
    assert 0 < rates[-1] <= 0.5
    images = torch.randn(2, 3, 64, 64)
    first, second = backbone.train()(images)["c4"], backbone(images)["c4"]
    assert not torch.equal(first, second)
    backbone.eval()
    assert torch.equal(backbone(images)["c4"], backbone(images)["c4"])


@pytest.mark.parametrize("network", ["dla46_c", "ghostnet_050"])
def test_networks_without_paths_to_drop(network):
    with pytest.raises(ValueError, match=f"drop_path: timm/{network} has no paths to drop"):
        Extractor(f"timm/{network}", ["c4"], regime=Regime(drop_path=0.1))


def test_a_network_without_blocks_cannot_be_checkpointed():
    body = TimmBody("resnet10t", ["c4"], None, Regime())
    body.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="checkpointing: timm/resnet10t has no blocks to compute again"):
        body.checkpoint()
