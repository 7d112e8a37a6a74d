"""Files that version 0.1 of 2026-11-28 wrote, commit 11a88df, still work: ``tests/earlier`` holds them.

A detector and a region classifier, trained for an epoch on 8 scenes of 64 pixels (optimizer left out), the configuration of the
first, answers of both, a proposal store, and shards.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import runs
import torch

import detpipe
from detpipe import cli
from detpipe.training.allowed import where_classes_are

FILES = Path(__file__).with_name("earlier")
EXPECTED = json.loads((FILES / "expected.json").read_text())
IMAGE = (torch.arange(3 * 64 * 64).reshape(3, 64, 64) * 7919 % 256).to(torch.uint8)


def test_a_detector_finds_what_it_found():
    detector, description = detpipe.load_detector(FILES / "detector.ckpt")
    assert description.class_names == tuple("0123456789")
    detector.head.postprocess = dataclasses.replace(detector.head.postprocess, score_threshold=0.0)
    [found] = detector([IMAGE])
    for key, want in EXPECTED["detections"].items():
        torch.testing.assert_close(found[key][:5], torch.tensor(want), rtol=1e-4, atol=1e-4)


def test_a_region_classifier_says_what_it_said():
    model, _ = detpipe.load_region_classifier(FILES / "regions.ckpt")
    [logits] = model([IMAGE], [torch.tensor([[4.0, 8.0, 40.0, 50.0], [10.0, 10.0, 30.0, 20.0]])])
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["regions"]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_configuration_trains_and_evaluates(demo_root, tmp_path):
    data = ["--data.root", str(demo_root), "--data.scenes", str(runs.SCENES)]
    train = ["train", str(FILES / "config.yaml"), *data, "--init_from", str(FILES / "detector.ckpt")]
    assert cli.main([*train, "--output", str(tmp_path / "run")]) == 0
    evaluate = ["evaluate", str(FILES / "config.yaml"), *data, "--ckpt_path", str(FILES / "detector.ckpt")]
    assert cli.main([*evaluate, "--json", str(tmp_path / "a.json"), "--detections_out", str(tmp_path / "d.json")]) == 0


def test_a_store_and_shards_are_read():
    store = detpipe.ProposalStore(FILES / "store.safetensors")
    assert [len(store[name][0]) for name in store] == [93] * 4
    data = detpipe.Shards(str(FILES / "shards"), train="val", val="val")
    annotations = data.annotations("val")
    assert annotations.file_names.tolist() == [f"JPEGImages/{number:06d}.jpg" for number in (9, 10, 11, 12)]
    assert annotations.labels.tolist() == [6, 5, 1, 4, 3, 2, 4, 5, 4, 5]
    assert annotations.boxes[:2].tolist() == [[42.0, 32.0, 60.0, 57.0], [27.0, 43.0, 48.0, 64.0]]
    image, target = data.dataset("val")[0, 0]
    assert image.shape == (3, 64, 64)
    assert len(target["boxes"]) == len(annotations.boxes[annotations.offsets[0] : annotations.offsets[1]])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("detpipe.datasets.voc.VOC", "detpipe.VOC"),
        ("detpipe.VOC", "detpipe.VOC"),
        ("detpipe.datasets.demo.Demo", "detpipe.Demo"),
        ("detpipe.datasets.Demo", "detpipe.Demo"),
        ("detpipe.datasets.shards.Shards", "detpipe.Shards"),
        ("detpipe.classifier.ImageClassifier", "detpipe.ImageClassifier"),
        ("detpipe.heads.superpixel_pooling.Localization", "detpipe.Localization"),
        ("detpipe.superpixels.Segmentation", "detpipe.Segmentation"),
        ("detpipe.datasets.augment_settings.Mosaic", "detpipe.datasets.augment.settings.Mosaic"),
        ("detpipe.backbones.extractor.Level", "detpipe.Level"),
        ("detpipe.nonsense.FastRCNNHead", "detpipe.nonsense.FastRCNNHead"),
        ("my_head.VOC", "my_head.VOC"),
    ],
)
def test_class_paths_lead_to_where_the_class_is(before, now):
    settings = where_classes_are({"class_path": before, "init_args": {"of": [before]}})
    assert settings == {"class_path": now, "init_args": {"of": [now]}}


@pytest.mark.parametrize("path", ["detpipe.nonsense.FastRCNNHead", "detpipe.heads.nonsense.FastRCNNHead"])
def test_a_path_that_never_was_is_refused_with_the_right_one(path, capsys):
    assert cli.main(["train", str(FILES / "config.yaml"), "--model.head.class_path", path]) == 2
    message = f"class '{path}' is not one of detpipe's; it is detpipe.heads.fast_rcnn.FastRCNNHead"
    assert message in capsys.readouterr().err
