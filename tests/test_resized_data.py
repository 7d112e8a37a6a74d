"""Images resized by the data workers are detected, trained on and scored as those that the detector resizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from lightning import Trainer
from PIL import Image

from detpipe import cli
from detpipe.backbones import SEResNet
from detpipe.datasets import COCO, Loader, Resize, decode
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.evaluation import CocoEvaluator
from detpipe.heads import FastRCNNHead, Postprocess, RoISampler
from detpipe.proposals import PrecomputedProposals
from detpipe.roi_pooling import RoIAlign
from detpipe.types import Annotations, Detection, Target

SMALL, LARGE = (64, 96), 3  # height, width; the files are so many times larger


def scene(number: int) -> tuple[np.ndarray, Target, torch.Tensor]:
    """A red and a blue object on a dark ground, and proposals near and off them."""
    random = np.random.default_rng(number)
    pixels = random.integers(60, 90, (*SMALL, 3), dtype=np.uint8)
    boxes = []
    for k, channel in enumerate((0, 2)):
        x, y = int(random.integers(2 + 46 * k, 18 + 46 * k)), int(random.integers(2, 30))
        box = (x, y, x + int(random.integers(18, 30)), y + int(random.integers(18, 32)))
        pixels[box[1] : box[3], box[0] : box[2], channel] = 235
        boxes.append(box)
    truth = torch.tensor(boxes, dtype=torch.float32)
    near = truth.repeat(12, 1) + torch.from_numpy(random.normal(0, 3.0, (24, 4))).float()
    corner = torch.from_numpy(random.uniform(0, (60, 40), (20, 2))).float()
    off = torch.cat([corner, corner + torch.from_numpy(random.uniform(12, 34, (20, 2))).float()], 1)
    proposals = torch.cat([near, off]).clamp(min=0).minimum(torch.tensor([96.0, 64, 96, 64]))
    return pixels, Target(boxes=truth, labels=torch.tensor([1, 2]), proposals=proposals), proposals


@pytest.fixture(scope="module")
def detector() -> TwoStageDetector:
    """Trained for a moment on twelve scenes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone = SEResNet(18, levels=["c3"], out_channels=32)
    head = FastRCNNHead(
        32,
        num_classes=2,
        strides=backbone.strides,
        pooler=RoIAlign(4, sampling_ratio=1),
        fc=[64],
        sampler=RoISampler(rois_per_image=32),
        postprocess=Postprocess(score_threshold=0.05),
    )
    model = TwoStageDetector(backbone, PrecomputedProposals(), head, min_size=SMALL[0], max_size=SMALL[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        shown = [scene(100 + (4 * step + k) % 12) for k in range(4)]
        images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels, _, _ in shown]
        loss = total_loss(model.losses(images, [target for _, target, _ in shown]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve scenes in files of three times the size, smoothly enlarged, in the layout of COCO."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "val").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for i in range(12):
        pixels, target, _ = scene(100 + i)
        height, width = SMALL[0] * LARGE, SMALL[1] * LARGE
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / "val" / f"{i}.jpg", quality=98, subsampling=0
        )
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        for label, (x1, y1, x2, y2) in enumerate((target["boxes"] * LARGE).tolist(), 1):
            box = [x1, y1, x2 - x1, y2 - y1]
            area = box[2] * box[3]
            record = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "iscrowd": 0}
            annotations.append({**record, "bbox": box, "area": area})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def predicted(
    detector: TwoStageDetector, root: Path, resize: Resize | None, workers: int = 0
) -> tuple[list[Detection], Annotations]:
    """Detections by the trainer, as the command gets them; proposals are in pixels of the files."""
    data = COCO(str(root), val="val", loader=Loader(4, num_workers=workers), resize=resize)
    data.set_proposals("val", {i: scene(100 + i)[2].numpy() * LARGE for i in range(12)})
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    found = Trainer(**settings).predict(detector, data.eval_dataloader("val"))
    return [one for batch in found for one in batch], data.annotations("val")


def scores(found: list[Detection], annotations: Annotations) -> dict[str, Any]:
    evaluator = CocoEvaluator(annotations)
    evaluator.update(found, list(range(12)))
    return evaluator.compute()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning", "ignore:.*custom batch sampler"
)
def test_map_does_not_depend_on_who_resizes(detector, root, monkeypatch):
    by_detector = scores(*predicted(detector, root, None))
    assert by_detector["AP"] > 0.4
    assert by_detector["AP50"] > 0.9
    shortest = Resize("shortest_side", [40, *SMALL[:1]], SMALL[1])
    by_workers = scores(*predicted(detector, root, shortest, workers=1))
    assert by_workers["AP"] == pytest.approx(by_detector["AP"], abs=0.03)
    assert by_workers["AP50"] == pytest.approx(by_detector["AP50"], abs=0.03)
    in_canvas = scores(*predicted(detector, root, Resize("letterbox", SMALL[1])))  # the same scale, a larger canvas
    assert in_canvas["AP"] == pytest.approx(by_detector["AP"], abs=0.03)
    monkeypatch.setattr(
        decode, "_factor", lambda *_: 1
    )  # the files are decoded whole: only the rounding to bytes is left
    whole = scores(*predicted(detector, root, shortest))
    assert whole["AP"] == pytest.approx(by_detector["AP"], abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "resize",
    [
        "{policy: shortest_side, min_size: [48, 64], max_size: 96, eval_size: 64}",
        "{policy: letterbox, min_size: [64, 96], sampling: range}",
    ],
)
def test_a_run_with_resized_data(resize, demo_root, tmp_path):
    options = [*runs.options(demo_root, epochs=1), "--data.resize", resize, "--model.max_size", "96"]
    if "letterbox" in resize:
        options += ["--model.min_size", "96"]
    folder = tmp_path / "run"
    assert cli.main(["train", runs.CONFIG, "--output", str(folder), *options]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "validation.png").is_file()
    evaluated = tmp_path / "numbers.json"
    arguments = [str(folder / "config.yaml"), "--ckpt_path", str(folder / "best.ckpt"), "--json", str(evaluated)]
    assert cli.main(["evaluate", *arguments]) == 0
    assert json.loads(evaluated.read_text())["AP"] == pytest.approx(summary["AP"])
