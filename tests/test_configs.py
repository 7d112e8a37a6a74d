"""Every file in configs/ does what its header says: it parses, builds, and trains with the command that is shown there."""

from __future__ import annotations

import json
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import yaml
from datasets.builders import coco_content, voc_object, write_coco, write_voc, write_yolo

from detpipe import cli, load_detector
from detpipe.commands import ablation, training
from detpipe.demo import Demo, DemoScenes
from detpipe.proposal_files import write_store
from detpipe.proposals import Anchors
from detpipe.training.configuration import CLI
from detpipe.types import Target

OTHERS = ("region_classifier", "superpixel_weak", "stn_digits")  # no detectors: their commands have tests of their own
MODELS = sorted(path for path in runs.CONFIGS.glob("*.yaml") if path.stem not in OTHERS)
AUGMENT = runs.CONFIGS / "data" / "augment_strong.yaml"
OVERLAYS = sorted(path for path in (runs.CONFIGS / "data").glob("*.yaml") if path != AUGMENT)
BACKBONES = sorted((runs.CONFIGS / "backbones").glob("*.yaml"))
RECIPES = sorted((runs.CONFIGS / "ablation").glob("recipe_*.yaml"))
STUDIES = sorted({*(runs.CONFIGS / "ablation").glob("*.yaml")} - {*RECIPES})
SOURCES = sorted((runs.CONFIGS / "proposals").glob("*.yaml"))
SHORT = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.max_steps", "-1"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--model.min_size", "64", "--model.max_size", "96"),
    *("--data.loader.batch_size", "2", "--data.loader.num_workers", "0"),
]
SCHEDULES = {"voc07": 40_000, "voc0712": 60_000, "coco": 240_000}  # steps of Fast R-CNN


def name_of(path: Path) -> str:
    return path.stem


@cache
def parse(*arguments: Path | str) -> Any:
    """The configuration; whoever changes it copies it before."""
    return runs.Parsed([str(argument) for argument in arguments], training.add_arguments).config


def shown_bases(overlay: Path) -> list[Path]:
    """The model configurations that the commands in an overlay's header put before it."""
    found = re.findall(rf"configs/(\w+)\.yaml configs/data/{overlay.stem}\.yaml", overlay.read_text())
    return [runs.CONFIGS / f"{name}.yaml" for name in dict.fromkeys(found)]


def train(folder: Path, *arguments: Path | str) -> dict[str, Any]:
    output = folder / "run"
    assert cli.main(["train", *(str(argument) for argument in arguments), "--output", str(output), *SHORT]) == 0
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "validation.png"} <= {path.name for path in output.iterdir()}
    return json.loads((output / "summary.json").read_text())


def test_there_are_configurations():
    assert {"fast_rcnn_se", "fast_rcnn_squeezenet", "faster_rcnn_se_fpn"} <= set(map(name_of, MODELS))
    assert {"fast_rcnn_se_stn", "aod", "cascade"} <= set(map(name_of, MODELS))
    assert all((runs.CONFIGS / f"{name}.yaml").is_file() for name in OTHERS)
    assert {"voc07", "voc0712", "coco", "voc_custom", "coco_custom", "yolo_custom", "csv_custom", "shards"} <= set(
        map(name_of, OVERLAYS)
    )


@pytest.mark.parametrize("path", [*MODELS, *OVERLAYS, AUGMENT, *SOURCES, *BACKBONES], ids=name_of)
def test_the_header_shows_the_command(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert len(header.splitlines()) >= 3
    assert re.search(
        rf"^#\s+python tools/train\.py .*configs/((data|proposals|backbones)/)?{path.stem}\.yaml", header, re.MULTILINE
    )


@pytest.mark.parametrize("path", runs.mostly_slow(MODELS, "fast_rcnn_se", "aod"), ids=name_of)
def test_a_model_runs_two_steps_on_the_demo_set(path, demo_root, tmp_path):
    config = parse(path)
    assert config.data.class_path == "detpipe.Demo"  # as it is, without anything to download
    assert config.seed_everything == 0
    result = train(tmp_path, path, *runs.demo(demo_root))
    assert set(result["per_class"]) == set("0123456789")


def test_the_main_job_takes_at_most_30_tflop(demo_root, capsys):
    path = runs.CONFIGS / "fast_rcnn_se.yaml"
    count = runpy.run_path(str(runs.CONFIGS.parent / "benchmarks" / "main_job_flops.py"))
    count["main"]([str(path), *runs.demo(demo_root)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "  " in line]
    table = {name: [float(value) for value in row] for name, *row in rows[1:]}
    parts = ("stem", "stages.c2", "stages.c3", "laterals", "proposals", "head")
    assert [sum(table[name][column] for name in parts) for column in range(2)] == pytest.approx(table["sum"], abs=0.01)
    gflop = DemoScenes.train * table["sum"][0] + DemoScenes.val * table["sum"][1]
    assert parse(path).trainer.max_epochs * gflop / 1000 <= 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "want"),
    [
        ("fast_rcnn_se_stn", ["--model.head.glimpse.kind", "tps"], ("glimpse", "settings", "kind", "tps")),
        ("fast_rcnn_se", ["--model.head.glimpse", "projective"], ("glimpse", "settings", "kind", "projective")),
        ("aod", ["--model.head.glimpses.length", "3"], ("glimpses", "length", 3)),
        (
            "aod",
            ["--model.head.estimator", "Pathwise", "--model.head.pooler", "RoIAlign"],
            ("pooler", "sampling_ratio", 2),
        ),
        ("aod", ["--model.head.estimator.episodes", "4"], ("estimator", "episodes", 4)),
        ("cascade", ["--model.head.later.ious", "[0.6, 0.65]"], ("later", "ious", [0.6, 0.65])),
    ],
)
def test_heads_are_changed_as_their_headers_show(name, changes, want):
    value = CLI([str(runs.CONFIGS / f"{name}.yaml"), *changes], training.add_arguments).model.head
    *path, expected = want
    for part in path:
        value = getattr(value, part)
    assert value == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", BACKBONES, ids=name_of)
def test_a_backbone_takes_the_place_of_se_resnet(path, demo_root, tmp_path):
    if "timm/" in path.read_text():
        pytest.importorskip("timm")
    base = runs.CONFIGS / "fast_rcnn_se.yaml"
    config = parse(base, path)
    assert config.model.backbone != parse(base).model.backbone
    train(tmp_path, base, path, *runs.demo(demo_root))
    detector, _ = load_detector(tmp_path / "run" / "best.ckpt")
    assert type(detector.backbone).__name__ == config.model.backbone.class_path.rpartition(".")[2]
    [found] = detector.eval()([torch.rand(3, 96, 128)])
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize("path", runs.mostly_slow(STUDIES, "attention_demo", "heads_demo"), ids=name_of)
def test_variants_of_a_study_differ_in_one_stage_only(path, tmp_path):
    study = ablation.read_study(path)
    stage = path.stem.partition("_")[0].replace("attention", "backbone").replace("heads", "head")
    models = []
    for name, change in study.variants.items():
        overlay = tmp_path / f"{name}.yaml"
        overlay.write_text(yaml.safe_dump(change))
        models.append(parse(*study.base, overlay).model.as_dict())
    chosen = [model.pop(stage) for model in models]
    assert all(model == models[0] for model in models)
    assert all(one != other for k, one in enumerate(chosen) for other in chosen[:k])
    if stage == "head":
        for key in ("pooler", "fc", "sampler", "postprocess"):
            assert all(head["init_args"][key] == chosen[0]["init_args"][key] for head in chosen), key


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_variants_of_a_recipe_differ(path, tmp_path):
    study, models = ablation.read_study(path), []
    for name, change in study.variants.items():
        overlay = tmp_path / f"{name}.yaml"
        overlay.write_text(yaml.safe_dump(change))
        config = parse(*study.base, overlay).as_dict()
        models.append({key: config[key] for key in ("model", "data", "ema")})
        assert yaml.safe_dump(change) == "{}\n" or models[-1] != models[0], name
    assert all(one != other for k, one in enumerate(models) for other in models[:k])


def test_there_are_backbones():
    assert {"se_inception", "sknet50", "se_resnet50_fpn", "convnext_tiny", "mobilenet_v3"} <= set(
        map(name_of, BACKBONES)
    )


@pytest.mark.parametrize("path", runs.mostly_slow(SOURCES, "dense_grid"), ids=name_of)
def test_a_proposal_source_takes_the_place_of_the_rpn(path, demo_root, tmp_path):
    base = runs.CONFIGS / "fast_rcnn_squeezenet.yaml"
    config = parse(base, path)
    assert config.model.proposals.class_path != parse(base).model.proposals.class_path
    stores = make_stores(demo_root, tmp_path) if path.stem == "store" else []
    train(tmp_path, base, path, *runs.demo(demo_root), *stores)
    detector, _ = load_detector(tmp_path / "run" / "best.ckpt")
    assert type(detector.proposals).__name__ == config.model.proposals.class_path.rpartition(".")[2]
    targets = [Target(proposals=torch.tensor([[5.0, 6.0, 50.0, 60.0]]))]
    [found] = detector.eval()([torch.rand(3, 96, 128)], targets)
    assert found["boxes"].shape[1] == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_follows_every_data_overlay(path):
    source = parse(runs.CONFIGS / "fast_rcnn_squeezenet.yaml", path).model.proposals
    for overlay in OVERLAYS:
        for base in (shown_bases(overlay) or MODELS)[:1]:
            assert parse(base, overlay, path, "--data.root", "ROOT").model.proposals == source


def make_stores(demo_root: Path, folder: Path) -> list[str]:
    """Stores for both splits of the demo set, as the arguments that name them."""
    data, stores = Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)), {}
    for split in ("train", "val"):
        annotations = data.annotations(split)  # type: ignore[arg-type]
        stores[split] = str(folder / f"{split}.safetensors")
        boxes = np.array([[10, 10, 50, 60], [30, 5, 60, 40]])
        records = [(data.image_key(annotations, row), boxes, [0.9, 0.8]) for row in range(len(annotations))]
        write_store(stores[split], records, "by hand", {})
    return ["--data.proposals", json.dumps(stores)]


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_follows_the_models_that_its_header_shows(path):
    bases = shown_bases(path)
    if "any model" in path.read_text().lower():
        bases = [base for base in MODELS if base.stem in ("fast_rcnn_squeezenet", "faster_rcnn_se_fpn")]
    assert bases
    for base in bases:
        alone, config = parse(base), parse(base, path, "--data.root", "ROOT")
        assert config.data.init_args.root == "ROOT"
        assert config.data.class_path in (
            "detpipe.VOC",
            "detpipe.COCO",
            "detpipe.YOLO",
            "detpipe.CSVBoxes",
            "detpipe.Shards",
        )
        assert config.model.backbone.class_path == alone.model.backbone.class_path
        sizes = config.model.proposals.init_args.anchors.sizes
        assert sizes != alone.model.proposals.init_args.anchors.sizes
        levels = 4 if "fpn" in base.stem else 1
        assert len(Anchors(sizes).level_sizes([4, 8, 16, 32][:levels])) == levels
        assert (config.model.min_size, config.model.max_size) != (160, 160)
        assert config.data.init_args.augment.flip == 0.5


@pytest.mark.parametrize("path", [path for path in OVERLAYS if path.stem in SCHEDULES], ids=name_of)
def test_published_schedules(path):
    config = parse(shown_bases(path)[0], path)
    assert (config.trainer.max_steps, config.trainer.max_epochs) == (SCHEDULES[path.stem], -1)
    optimizer, schedule = config.model.optimizer, config.model.lr_scheduler
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.001, 0.9, 0.0005)
    assert (schedule.name, list(schedule.milestones), schedule.gamma) == ("step", [0.75], 0.1)
    assert (config.model.min_size, config.model.max_size) == (600, 1000)
    sampler = config.model.head.init_args.sampler
    assert config.data.init_args.loader.batch_size * sampler.rois_per_image == 128
    assert (sampler.positive_fraction, sampler.positive_iou, list(sampler.negative_iou)) == (0.25, 0.5, [0.0, 0.5])


def test_published_splits():
    splits = {
        "voc07": (["2007:trainval"], ["2007:test"]),
        "voc0712": (["2007:trainval", "2012:trainval"], ["2007:test"]),
        "coco": ("train2017", "val2017"),
    }
    for name, (train_split, val_split) in splits.items():
        path = runs.CONFIGS / "data" / f"{name}.yaml"
        data = parse(shown_bases(path)[0], path).data.init_args
        assert (data.train, data.val) == (train_split, val_split)


def test_voc_years_train_together(tmp_path):
    root = tmp_path / "VOCdevkit"
    for year, split in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        names = [f"{year}_{split}_{number}" for number in range(2)]
        write_voc(root / f"VOC{year}", {name: [voc_object("cat", (5, 5, 40, 35))] for name in names}, split)
    path = runs.CONFIGS / "data" / "voc0712.yaml"
    result = train(tmp_path, shown_bases(path)[0], path, "--data.root", root)
    assert len(result["per_class"]) == 20


def test_the_pyramid_is_linked_to_proposals_and_head(demo_root):
    path = runs.CONFIGS / "faster_rcnn_se_fpn.yaml"
    sizes = ["--model.proposals.anchors.sizes", "[[8],[16],[32],[64],[128]]"]
    extra = ["--model.backbone.extra_levels", "max_pool", *sizes]
    detector = CLI([str(path), *runs.demo(demo_root), *SHORT, *extra], training.add_arguments).model.eval()
    assert detector.backbone.out_channels == 128
    assert list(detector.proposals.strides) == ["p2", "p3", "p4", "p5", "p6"]
    assert list(detector.head.strides) == ["p2", "p3", "p4", "p5"]
    [found] = detector([torch.rand(3, 75, 101)])
    assert found["boxes"].shape[1] == 4


@pytest.mark.parametrize(  # of VOC's layout, tables and shards: commands/test_data_advice.py
    ("overlay", "splits", "classes"),
    [
        pytest.param("coco_custom", ("train", "val"), {"cat", "dog", "owl"}, marks=pytest.mark.slow),
        pytest.param("coco", ("train2017", "val2017"), {"cat", "dog", "owl"}, marks=pytest.mark.slow),
        pytest.param("yolo_custom", ("train", "val"), {"cat", "dog"}, marks=pytest.mark.slow),
    ],
)
def test_a_coco_or_yolo_folder_of_ones_own(overlay, splits, classes, tmp_path):
    for split in splits:
        if "coco" in overlay:
            write_coco(tmp_path / "own", coco_content(), split)
        else:
            write_yolo(tmp_path / "own", split=split)
    path = runs.CONFIGS / "data" / f"{overlay}.yaml"
    result = train(tmp_path, shown_bases(path)[0], path, "--data.root", tmp_path / "own")
    assert set(result["per_class"]) == classes


@pytest.mark.slow
def test_strong_augmentation_follows_every_data_set(demo_root, tmp_path):
    base = runs.CONFIGS / "fast_rcnn_se.yaml"
    for overlay in OVERLAYS:
        model = (shown_bases(overlay) or [base])[0]
        config = parse(model, overlay, AUGMENT, "--data.root", "ROOT")
        augment = config.data.init_args.augment
        assert (augment.combine.mosaic.p, augment.combine.mixup.p, augment.safe_crop.p) == (0.5, 0.15, 0.3)
        assert config.data.class_path == parse(model, overlay, "--data.root", "ROOT").data.class_path
    extra = ["--data.augment.transforms", "[{name: Rotate, arguments: {limit: [-5, 5], p: 0.5}}]"]
    result = train(tmp_path, base, AUGMENT, *runs.demo(demo_root), *extra)
    assert set(result["per_class"]) == set("0123456789")
    detector, _ = load_detector(tmp_path / "run" / "best.ckpt")
    assert detector.eval()([torch.rand(3, 96, 128)])


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ("[{name: Lambda}]", "transforms: Lambda runs code of the configuration"),
        ("[{name: Afine}]", "did you mean 'Affine'"),
        ("[{name: Affine, arguments: {rotat: 3}}]", "Affine has no argument 'rotat'; did you mean 'rotate'"),
        (
            "[{name: Affine, arguments: {rotate: {class_path: os.system, init_args: {command: ls}}}}]",
            "data.augment.transforms",
        ),
    ],
)
def test_transforms_that_may_not_be_named_stop_the_command(transforms, message, demo_root, tmp_path, capsys):
    options = ["--data.augment.transforms", transforms, "--output", str(tmp_path / "run")]
    code = cli.main(["train", str(runs.CONFIGS / "fast_rcnn_se.yaml"), *runs.demo(demo_root), *SHORT, *options])
    told = capsys.readouterr().err.strip()
    assert code == 2
    assert message in told
    assert len(told.splitlines()) == 1


@pytest.mark.slow
def test_the_blood_cells_train_as_shown(shared_data, tmp_path):
    path = runs.CONFIGS / "data" / "bccd.yaml"
    weights = shared_data / "weights" / "squeezenet1_1_features.pth"
    given = ["--data.root", shared_data / "bccd", "--model.backbone.weights", weights]
    result = train(tmp_path, runs.CONFIGS / "fast_rcnn_squeezenet.yaml", path, *given)
    assert set(result["per_class"]) == {"RBC", "WBC", "Platelets"}
