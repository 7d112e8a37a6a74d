from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch
from backbones.residual_cases import random_norms
from PIL import Image

from detpipe import cli
from detpipe import images as frames
from detpipe.attention import ConcurrentSqueezeExcitation, SelectiveKernel
from detpipe.backbones import SEResNet
from detpipe.commands import inspect_attention
from detpipe.commands.inspect_attention import (
    Objects,
    attention_modules,
    branches_by_scale,
    crop_object,
    gates_by_class,
    gates_of,
    last_of_each_stage,
    spatial_maps,
)
from detpipe.detector import TwoStageDetector
from detpipe.heads import FastRCNNHead
from detpipe.proposals import DenseGrid

MIXED = {"c2": "cbam", "c3": "se", "c4": "sk"}


@pytest.fixture(scope="module")
def backbone() -> SEResNet:
    torch.manual_seed(0)
    return random_norms(SEResNet(18, MIXED, levels=["c4"])).eval()  # type: ignore[return-value]


def some_images(count: int = 2) -> list[torch.Tensor]:
    return [torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8) for _ in range(count)]


def test_modules_are_found_and_nested_ones_are_not():
    network = SEResNet(18, {"c2": "scse", "c3": "sk"}, levels=["c3"])
    found = attention_modules(network)
    assert list(found) == [
        *("stages.c2.0.attention", "stages.c2.1.attention"),
        *("stages.c3.0.residual.conv1", "stages.c3.1.residual.conv1"),
    ]
    assert [type(module) for module in found.values()] == [ConcurrentSqueezeExcitation] * 2 + [SelectiveKernel] * 2


def test_gates_are_those_that_were_applied(backbone):
    [image] = some_images(1)
    found = gates_of(backbone, [image], 64, 96)
    assert list(found) == list(attention_modules(backbone))
    batch = frames.to_batch([image], backbone.pixel_format, 64, 96, 16).tensors
    with torch.no_grad():
        x = backbone.stages["c2"](backbone.stem(batch))
        residual = backbone.stages["c3"][0].residual(x)
        expected = backbone.stages["c3"][0].attention.weights(residual)
    torch.testing.assert_close(found["stages.c3.0.attention"]["channel"], expected)
    assert not any(module._forward_pre_hooks for module in backbone.modules())


def test_gates_by_class_are_means_over_its_objects(backbone):
    images = some_images(3)
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 5, 80, 60], [0, 0, 96, 64]])
    found = gates_by_class(backbone, Objects(images, boxes, torch.tensor([1, 3, 1])), 64, "channel", batch=2)
    assert {name.split(".")[1] for name in found} == {"c2", "c3"}
    values = found["stages.c3.1.attention"]
    assert values.shape == (3, 128)
    assert values[1].isnan().all()
    crops = [crop_object(image, box, 64, 0.8) for image, box in zip(images, boxes, strict=True)]
    alone = [gates_of(backbone, [crop], 64, 64)["stages.c3.1.attention"]["channel"].flatten() for crop in crops]
    torch.testing.assert_close(values[0], (alone[0] + alone[2]) / 2)
    torch.testing.assert_close(values[2], alone[1])


def test_branch_weights_sum_to_one_at_every_scale(backbone):
    objects = Objects(some_images(), torch.tensor([[10.0, 10, 40, 50], [30, 5, 80, 60]]), torch.tensor([1, 2]))
    found = branches_by_scale(backbone, objects, 64, (0.5, 1.0))
    assert list(found) == ["stages.c4.0.residual.conv1", "stages.c4.1.residual.conv1"]
    for weights in found.values():
        assert weights.shape == (2, 2)
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        assert not torch.allclose(weights[0], weights[1], atol=1e-7)


def test_spatial_maps_have_the_size_of_the_image(backbone):
    image = torch.randint(0, 255, (3, 50, 77), dtype=torch.uint8)
    maps = spatial_maps(backbone, image, 64, 128)
    assert list(maps) == ["stages.c2.0.attention", "stages.c2.1.attention"]
    for values in maps.values():
        assert values.shape == (50, 77)
        assert 0 <= values.min() < values.max() <= 1


def test_an_object_is_cut_out_at_its_share():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:40, 30:50] = 200  # a square of 20 pixels
    crop = crop_object(image, torch.tensor([30.0, 20, 50, 40]), 40, 0.5)
    assert crop.shape == (3, 40, 40)
    inside = crop[0] == 200
    assert inside[11:29, 11:29].all()
    assert not inside[:9].any()
    assert not inside[:, 31:].any()
    whole = crop_object(image, torch.tensor([0.0, 0, 400, 400]), 40, 1.0)  # reaches over the border, and is shrunk
    assert whole.shape == (3, 40, 40)


def test_the_last_of_each_stage():
    names = ["stages.c2.0.attention", "stages.c2.1.attention", "stages.c3.Mixed_5b.gate", "stages.c3.Mixed_5c.gate"]
    assert last_of_each_stage(names) == ["stages.c2.1.attention", "stages.c3.Mixed_5b.gate", "stages.c3.Mixed_5c.gate"]


def test_the_command(demo_root, trained, tmp_path, capsys):
    pictures = demo_root / "coco" / "val"
    out = tmp_path / "out"
    command = ["inspect", str(trained / "best.ckpt"), str(pictures), "-o", str(out), "--score_threshold", "0.01"]
    assert cli.main(command) == 0
    assert {path.name for path in out.iterdir()} == {"channel_gates.png", "attention.json"}
    with Image.open(out / "channel_gates.png") as picture:
        assert min(picture.size) > 200
    numbers = json.loads((out / "attention.json").read_text())
    assert numbers["modules"] == ["stages.c2.0.attention", "stages.c2.1.attention"]
    assert all(
        0 <= value <= 1 for by_class in numbers["channel_gates"].values() for row in by_class.values() for value in row
    )
    assert str(out / "channel_gates.png") in capsys.readouterr().out


def test_what_the_command_refuses(demo_root, trained, tmp_path, capsys, monkeypatch):
    pictures = str(demo_root / "coco" / "val")
    command = ["inspect", str(trained / "best.ckpt"), pictures, "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--score_threshold", "1"]) == 2
    assert "no object was found with a score of 1.0 or more; lower --score_threshold" in capsys.readouterr().err
    assert cli.main([*command, "--max_objects", "0"]) == 2
    assert "--max_objects of at least 1" in capsys.readouterr().err
    (tmp_path / "empty.png").touch()
    assert cli.main([*command[:2], str(tmp_path / "empty.png"), *command[3:]]) == 1
    assert capsys.readouterr().err.endswith("(not a known image format, or empty)\n")  # no advice about data sets
    monkeypatch.setattr("detpipe.commands.inspect_attention.attention_modules", lambda network: {})
    assert cli.main(command) == 2
    assert "SEResNet, has no attention modules" in capsys.readouterr().err


def test_a_detector_that_needs_boxes_is_given_some(demo_root, trained, tmp_path, capsys):
    content = torch.load(trained / "best.ckpt", weights_only=True)
    content["detpipe"]["model"]["proposals"] = {"class_path": "detpipe.proposals.PrecomputedProposals", "init_args": {}}
    weights = content["state_dict"]
    content["state_dict"] = {name: value for name, value in weights.items() if not name.startswith("proposals.")}
    path, picture = tmp_path / "needs_boxes.ckpt", min((demo_root / "coco" / "val").iterdir())
    torch.save(content, path)
    boxes, out = tmp_path / "boxes.json", tmp_path / "out"
    boxes.write_text(json.dumps({picture.name: [[5, 5, 30, 40], [20, 10, 60, 60]]}))
    command = ["inspect", str(path), str(picture), "-o", str(out), "--score_threshold", "0.01"]
    assert cli.main(command) == 2
    assert "needs boxes for the images: add --proposals" in capsys.readouterr().err
    assert cli.main([*command, "--proposals", str(boxes)]) == 0
    assert (out / "channel_gates.png").is_file()


@pytest.mark.slow
def test_pictures_of_every_kind(backbone, tmp_path):
    from detpipe.pictures.inspection_plots import plot_branches, plot_class_gates, plot_maps

    [image, other] = some_images()
    objects = Objects([image, other], torch.tensor([[10.0, 10, 40, 50], [30, 5, 80, 60]]), torch.tensor([1, 3]))
    plot_class_gates(gates_by_class(backbone, objects, 64, "channel"), ["a", "b", "c"], [1, 0, 1], tmp_path / "g.png")
    plot_branches(branches_by_scale(backbone, objects, 64, (0.5, 1.0)), (0.5, 1.0), 2, tmp_path / "b.png")
    plot_maps(image, spatial_maps(backbone, image, 64, 96), tmp_path / "m.png")
    for name in ("g", "b", "m"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_of_many_classes_those_with_most_objects_have_a_curve(monkeypatch, tmp_path):
    from detpipe.pictures import inspection_plots

    figures = []
    monkeypatch.setattr(inspection_plots, "save_figure", lambda figure, out: figures.append(figure))
    names = [f"class {k}" for k in range(30)]
    inspection_plots.plot_class_gates({"c2": torch.rand(30, 4)}, names, list(range(30)), tmp_path / "g.png")
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [f" class {k} ({k})" for k in range(10, 30)]
    assert figures[0].get_suptitle().endswith("; 20 classes with most objects")


@pytest.mark.parametrize("size", runs.mostly_slow([(3000, 1), (1, 3000), (8000, 16)], (1, 3000)))
def test_maps_of_slim_images_are_bounded(size, tmp_path):
    from detpipe.pictures.inspection_plots import plot_maps

    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    plot_maps(image, {"c2": torch.rand(size)}, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        assert max(picture.size) <= 3.2 * 6 * 120 + 100
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("kinds", [{"c2": "sse", "c3": "se"}, {"c2": "sk", "c3": "scse"}, {"c2": "cbam", "c3": "sk"}])
def test_stages_of_other_attention_are_left_out_of_a_picture(kinds, tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = SEResNet(18, kinds, levels=["c3"]).eval()
    detector = TwoStageDetector(
        backbone, DenseGrid([16]), FastRCNNHead(128, 2, backbone.strides), min_size=32, max_size=48
    )
    [image] = some_images(1)
    objects = Objects([image] * 2, torch.tensor([[10.0, 10, 40, 50], [30, 5, 80, 60]]), torch.tensor([1, 2]))
    drawn = {}
    monkeypatch.setattr(inspect_attention, "plot_class_gates", lambda gates, *rest: drawn.update(channel=list(gates)))
    monkeypatch.setattr(inspect_attention, "plot_maps", lambda image, maps, out: drawn.update(spatial=list(maps)))
    inspect_attention.draw_gates(detector, objects, ["a", "b"], tmp_path, {})
    inspect_attention.draw_maps(detector, [Path("a.png")], [image], tmp_path)
    for form, having in (("channel", ("se", "scse", "cbam")), ("spatial", ("sse", "scse", "cbam"))):
        stages = [name.split(".")[1] for name in drawn.get(form, [])]
        assert stages == [stage for stage, kind in kinds.items() if kind in having]


def test_attention_modules_of_a_plain_network():
    assert attention_modules(SEResNet(18, None, levels=["c2"])) == {}
    assert list(attention_modules(ConcurrentSqueezeExcitation(8, 2))) == [""]
