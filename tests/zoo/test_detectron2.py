"""Pickles made up by detectron2's rules, read as detectors of ours, and compared with the formulas."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from detpipe import TwoStageDetector
from detpipe.images import resized_size
from detpipe.support.errors import CheckpointError
from detpipe.zoo import published
from zoo.detectron2_formulas import CLASSES, HIDDEN, WIDTH, Formulas, made_up
from zoo.random_models import scene
from zoo.test_torchvision_models import assert_same_detections

NAMES = {
    "fpn": "faster_rcnn_R_50_FPN_3x",
    "fast": "fast_rcnn_R_50_FPN_1x",
    "cascade": "cascade_mask_rcnn_R_50_FPN_3x",
    "c4": "faster_rcnn_R_50_C4_voc",
}
SIZES = {"min_size": 96, "max_size": 160, "before": 60, "after": 30}
ANCHORS = {"c4": [[16.0, 32.0, 64.0]], "fpn": [[8.0], [16.0], [32.0], [64.0], [128.0]]}


def small(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same settings for fewer channels, blocks and boxes."""
    inner = settings["backbone"]["init_args"]
    if kind != "c4":
        inner["out_channels"] = WIDTH
        inner = inner["backbone"]["init_args"]
    inner["depth"] = 26
    if kind != "fast":
        rpn = settings["proposals"]["init_args"]
        rpn["anchors"]["sizes"] = ANCHORS.get(kind, ANCHORS["fpn"])
        rpn["selection"] |= {
            "pre_nms_top_n": [SIZES["before"]] * 2,
            "post_nms_top_n": [SIZES["after"]] * 2,
        }
    head = settings["head"]["init_args"]
    if kind == "c4":
        head["conv"] |= {"width": 64, "blocks": 2}
    else:
        head["fc"] = [HIDDEN, HIDDEN]
    return settings | {"min_size": SIZES["min_size"], "max_size": SIZES["max_size"]}


def shrink(monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    """Put small settings and few classes under detectron2's name."""
    name, entries = NAMES[kind], published.entries()
    make: Callable[[], dict[str, Any]] = entries[name].settings  # pyright: ignore
    entry = replace(entries[name], settings=lambda: small(make(), kind))
    monkeypatch.setattr(published, "entries", lambda: {**entries, name: entry})
    names = tuple(f"class {label}" for label in range(CLASSES))
    monkeypatch.setattr(published, "classes_of", lambda entry: (names, tuple(range(1, CLASSES + 1))))
    return name


def write(path: Path, content: Any) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return str(path)


def as_image(tensor: torch.Tensor) -> np.ndarray:
    return (tensor * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", runs.mostly_slow(NAMES, "fast"))
def test_the_same_detections_as_the_formulas(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = shrink(monkeypatch, kind)
    model = made_up(kind, len(ANCHORS["c4"][0]) if kind == "c4" else 1)
    file = write(tmp_path / "model.pkl", {"model": model, "__author__": "made up"})
    detector, description = published.load(name, file)
    assert len(description.class_names) == CLASSES
    formulas = Formulas(model, kind, {**SIZES, "anchors": ANCHORS.get(kind, ANCHORS["fpn"])})
    # the second is limited by max_size, the third is smoothed where it shrinks
    for size, seed in (((75, 100), 0), ((40, 110), 1), ((300, 230), 2)):
        image = scene(*size, seed)
        boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(seed)) * min(size) * 0.5
        boxes[:, 2:] += boxes[:, :2] + 4
        targets = [{"proposals": boxes}] if kind == "fast" else None
        with torch.no_grad():
            pixels = detector.to_batch([(image * 255).byte()]).tensors  # compared with Pillow's below
            wanted = formulas(as_image(image), pixels, boxes if kind == "fast" else None)
            [given] = detector([(image * 255).byte()], targets)  # pyright: ignore
        assert len(wanted["scores"]) > 5
        assert_same_detections(given, wanted)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (500, 375), (333, 500), (1, 90), (1200, 1600), (50, 3000)])
def test_sizes_are_rounded_as_detectron2_does(size: tuple[int, int]) -> None:
    formulas = Formulas({}, "c4", {"min_size": 80, "max_size": 133})
    _, wanted = formulas.preprocess(np.zeros((*size, 3), np.uint8))
    assert resized_size(size, 80, 133, "detectron2") == (max(1, wanted[0]), wanted[1])


@pytest.mark.slow
def test_pixels_are_resized_as_pillow_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = shrink(monkeypatch, "c4")
    detector, _ = published.load(name, write(tmp_path / "model.pkl", {"model": made_up("c4", 3)}))
    formulas = Formulas({}, "c4", SIZES)
    for size in ((75, 100), (300, 230), (96, 96)):
        image = scene(*size, 4)
        wanted, _ = formulas.preprocess(as_image(image))
        given = detector.to_batch([(image * 255).byte()]).tensors
        assert (given - wanted).abs().max() <= 1  # a gray level
        assert (given != wanted).float().mean() < 0.01


@pytest.mark.slow
def test_other_files_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, model = shrink(monkeypatch, "fpn"), made_up("fpn", 1)
    path = tmp_path / "model.pkl"
    without = {key: value for key, value in model.items() if "anchor_deltas.bias" not in key}
    cases: dict[str, Any] = {
        r"expected a dict with 'model'": [1, 2],
        r"name -> array of numbers, got 'a' -> str": {"model": {"a": "b"}},
        r"proposals\.head\.regressor\.bias is missing": {"model": without},
        r"roi_heads\.new\.weight is unknown": {"model": {**model, "roi_heads.new.weight": np.zeros(3)}},
        r"head\.classifier\.bias has shape \[9\], expected \[6\]": {
            "model": {**model, "roi_heads.box_predictor.cls_score.bias": np.zeros(9)}
        },
    }
    for message, content in cases.items():
        write(path, content)
        assert_refused(name, path, message)
    path.write_bytes(path.read_bytes()[:5000])
    assert_refused(name, path, "not a readable pickle")


def assert_refused(name: str, path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        published.load(name, str(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


ran: list[str] = []


class Foreign:
    def __reduce__(self) -> Any:
        return ran.append, ("run",)


def test_nothing_in_a_foreign_pickle_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, path = shrink(monkeypatch, "fpn"), tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": Foreign()}}))
    assert_refused(name, path, "refused, since this pickle holds")
    assert not ran


@pytest.mark.slow
def test_the_full_settings_build() -> None:
    """Those of the real names, with the widths that the files have."""
    from jsonargparse import ArgumentParser

    from detpipe.training.allowed import only_allowed
    from detpipe.training.configuration import link_stages

    for name in NAMES.values():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--num_classes", type=int)
        parser.add_class_arguments(TwoStageDetector, "model", fail_untyped=False)
        parser.link_arguments("num_classes", "model.head.init_args.num_classes")
        link_stages(parser)
        with only_allowed(), torch.device("meta"):
            settings = {"model": published.settings_by_name(name), "num_classes": 80}
            detector = parser.instantiate(parser.parse_object(settings)).model
        assert isinstance(detector, TwoStageDetector)
        assert detector.head.get_parameter(
            "stages.0.classifier.weight" if "cascade" in name else "classifier.weight"
        ).shape == (81, 2048 if "C4" in name else 1024)
