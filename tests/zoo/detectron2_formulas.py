"""detectron2's detectors from their formulas, on plain arrays by its names: what its documentation and configurations say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

CLASSES, WIDTH, HIDDEN, BLOCKS = 5, 8, 12, 2
MEAN = torch.tensor([103.53, 116.28, 123.675])
RATIOS = (0.5, 1.0, 2.0)
LIMIT = math.log(1000 / 16)
Model = dict[str, np.ndarray]


def made_up(kind: str, sizes: int) -> Model:
    """Random arrays by detectron2's names, for a network of 2 bottlenecks a stage."""
    random = np.random.default_rng(7)
    model: Model = {}

    def layer(name: str, out: int, into: int, side: int = 1, bias: bool = True, gain: float = 1.0) -> None:
        shape = (out, into, side, side) if side else (out, into)
        scale = gain * (2 / (into * max(1, side) ** 2)) ** 0.5
        model[f"{name}.weight"] = random.normal(0, scale, shape).astype(np.float32)
        if bias:
            model[f"{name}.bias"] = random.normal(0, 0.1, out).astype(np.float32)

    def normed(name: str, out: int, into: int, side: int = 1) -> None:
        layer(name, out, into, side, bias=False)
        for part, low, high in (("weight", 0.4, 0.9), ("running_var", 0.7, 1.4)):
            model[f"{name}.norm.{part}"] = random.uniform(low, high, out).astype(np.float32)
        for part in ("bias", "running_mean"):
            model[f"{name}.norm.{part}"] = random.normal(0, 0.1, out).astype(np.float32)

    def stage(name: str, into: int, inner: int, out: int) -> None:
        for block in range(BLOCKS):
            if not block:
                normed(f"{name}.{block}.shortcut", out, into)
            normed(f"{name}.{block}.conv1", inner, out if block else into)
            normed(f"{name}.{block}.conv2", inner, inner, 3)
            normed(f"{name}.{block}.conv3", out, inner)

    trunk = "backbone." if kind == "c4" else "backbone.bottom_up."
    normed(f"{trunk}stem.conv1", 64, 3, 7)
    model[f"{trunk}stem.conv1.weight"] /= 60  # pixels lie in -128..128
    into = 64
    for index in range(2, 5 if kind == "c4" else 6):
        inner = 64 * 2 ** (index - 2)
        stage(f"{trunk}res{index}", into, inner, 4 * inner)
        if kind != "c4":
            layer(f"backbone.fpn_lateral{index}", WIDTH, 4 * inner)
            layer(f"backbone.fpn_output{index}", WIDTH, WIDTH, 3)
        into = 4 * inner
    width = into if kind == "c4" else WIDTH
    if kind != "fast":
        anchors = 3 * sizes
        layer("proposal_generator.rpn_head.conv", width, width, 3)
        layer("proposal_generator.rpn_head.objectness_logits", anchors, width)
        layer("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, width, gain=0.3)
        model["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((anchors, 4), np.float32)
    model["pixel_mean"], model["pixel_std"] = MEAN.numpy()[:, None, None], np.ones((3, 1, 1), np.float32)
    hidden, agnostic = HIDDEN, kind == "cascade"
    if kind == "c4":
        stage("roi_heads.res5", into, 16, 64)
        hidden = 64
    for suffix in (".0", ".1", ".2") if agnostic else ("",):
        if kind != "c4":
            layer(f"roi_heads.box_head{suffix}.fc1", HIDDEN, WIDTH * 49, 0)
            layer(f"roi_heads.box_head{suffix}.fc2", HIDDEN, HIDDEN, 0)
        layer(f"roi_heads.box_predictor{suffix}.cls_score", CLASSES + 1, hidden, 0, gain=2)
        layer(f"roi_heads.box_predictor{suffix}.bbox_pred", 4 * (1 if agnostic else CLASSES), hidden, 0)
    model["roi_heads.mask_head.mask_fcn1.weight"] = np.zeros((2, 2, 3, 3), np.float32)
    return model


class Formulas:
    """Run a model.

    Args:
        model: arrays by name.
        kind: "fpn", "fast", "cascade" or "c4".
        settings: sizes of images and anchors and numbers of boxes, as the configuration of the test has them.
    """

    def __init__(self, model: Model, kind: str, settings: dict[str, Any]) -> None:
        self.model = {name: torch.from_numpy(value) for name, value in model.items()}
        self.kind, self.settings = kind, settings

    def __call__(self, image: np.ndarray, pixels: Tensor, given: Tensor | None = None) -> dict[str, Tensor]:
        """``[H, W, 3]`` uint8 RGB, and what is made of it -> boxes in pixels of the image, scores, labels from 1 on."""
        _, size = self.preprocess(image)
        features = self.features(pixels)
        scale = torch.tensor([size[1] / image.shape[1], size[0] / image.shape[0]] * 2)
        boxes = self.propose(features, size) if given is None else given * scale
        scores, refined = self.heads(features, boxes, size)
        return self.detections(scores, refined, size, scale, image.shape[:2])

    def preprocess(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        height, width = image.shape[:2]
        scale = self.settings["min_size"] / min(height, width)
        new = (
            (self.settings["min_size"], scale * width)
            if height < width
            else (scale * height, self.settings["min_size"])
        )
        if max(new) > self.settings["max_size"]:
            shrink = self.settings["max_size"] / max(new)
            new = (new[0] * shrink, new[1] * shrink)
        h, w = int(new[0] + 0.5), int(new[1] + 0.5)
        resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))[:, :, ::-1].copy()
        pixels = torch.from_numpy(resized).permute(2, 0, 1).float() - MEAN[:, None, None]
        if self.kind != "c4":
            pixels = F.pad(pixels, (0, -w % 32, 0, -h % 32))
        return pixels[None], (h, w)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, self.model[f"{name}.weight"], self.model.get(f"{name}.bias"), stride, padding)
        if f"{name}.norm.weight" in self.model:
            norm = [self.model[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            x = F.batch_norm(x, *norm, eps=1e-5)
        return x

    def stage(self, name: str, x: Tensor, stride: int) -> Tensor:
        for block in range(BLOCKS):
            step, where = 1 if block else stride, f"{name}.{block}"
            shortcut = x if block else self.conv(f"{where}.shortcut", x, step)
            y = self.conv(f"{where}.conv1", x, step).relu()
            y = self.conv(f"{where}.conv2", y, padding=1).relu()
            x = (self.conv(f"{where}.conv3", y) + shortcut).relu()
        return x

    def features(self, pixels: Tensor) -> list[tuple[Tensor, int]]:
        trunk = "backbone." if self.kind == "c4" else "backbone.bottom_up."
        x = F.max_pool2d(self.conv(f"{trunk}stem.conv1", pixels, 2, 3).relu(), 3, 2, 1)
        maps = []
        for index in range(2, 5 if self.kind == "c4" else 6):
            x = self.stage(f"{trunk}res{index}", x, 1 if index == 2 else 2)
            maps.append(x)
        if self.kind == "c4":
            return [(x, 16)]
        above, levels = None, []
        for index in (5, 4, 3, 2):
            lateral = self.conv(f"backbone.fpn_lateral{index}", maps[index - 2])
            above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2.0, mode="nearest")
            levels.insert(0, (self.conv(f"backbone.fpn_output{index}", above, padding=1), 2**index))
        return [*levels, (F.max_pool2d(levels[-1][0], 1, 2), 64)]

    def propose(self, features: list[tuple[Tensor, int]], size: tuple[int, int]) -> Tensor:
        head, boxes, scores, level_of = "proposal_generator.rpn_head", [], [], []
        for level, (x, stride) in enumerate(features):
            hidden = self.conv(f"{head}.conv", x, padding=1).relu()
            logits = self.conv(f"{head}.objectness_logits", hidden)[0].permute(1, 2, 0).flatten()
            deltas = self.conv(f"{head}.anchor_deltas", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
            cells = []
            for anchor in self.settings["anchors"][level]:  # size by size, then ratio by ratio
                for ratio in RATIOS:
                    w = math.sqrt(anchor**2 / ratio)
                    cells.append([-w / 2, -ratio * w / 2, w / 2, ratio * w / 2])
            y, x_ = (torch.arange(count) * stride for count in x.shape[2:])
            grid = torch.stack(torch.meshgrid(y, x_, indexing="ij")[::-1], -1).repeat(1, 1, 2)
            anchors = (grid[:, :, None] + torch.tensor(cells)).reshape(-1, 4)
            best = logits.topk(min(self.settings["before"], len(logits)))
            boxes.append(clip_boxes_to_image(decode(deltas[best.indices], anchors[best.indices], (1, 1, 1, 1)), size))
            scores.append(best.values)
            level_of.append(torch.full((len(best.values),), level))
        boxes, scores, level_of = torch.cat(boxes), torch.cat(scores), torch.cat(level_of)
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, scores, level_of = boxes[keep], scores[keep], level_of[keep]
        return boxes[batched_nms(boxes, scores, level_of, 0.7)[: self.settings["after"]]]

    def pool(self, features: list[tuple[Tensor, int]], boxes: Tensor) -> Tensor:
        if self.kind == "c4":
            [(x, stride)] = features
            return self.stage("roi_heads.res5", roi_align(x, [boxes], 14, 1 / stride, 0, True), 2).mean((2, 3))
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = (4 + (side / 224 + 1e-8).log2()).floor().clamp(2, 5).long() - 2
        pooled = torch.zeros(len(boxes), WIDTH, 7, 7)
        for index, (x, stride) in enumerate(features[:4]):
            pooled[level == index] = roi_align(x, [boxes[level == index]], 7, 1 / stride, 0, True)
        return pooled

    def predict(self, suffix: str, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = pooled
        for layer in () if self.kind == "c4" else ("fc1", "fc2"):
            x = self.linear(f"roi_heads.box_head{suffix}.{layer}", x.flatten(1)).relu()
        predictor = f"roi_heads.box_predictor{suffix}"
        deltas = self.linear(f"{predictor}.bbox_pred", x).unflatten(1, (-1, 4))
        return self.linear(f"{predictor}.cls_score", x).softmax(1)[:, :-1], deltas  # the background is last

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.model[f"{name}.weight"], self.model[f"{name}.bias"])

    def heads(self, features: list[tuple[Tensor, int]], boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if self.kind != "cascade":
            scores, deltas = self.predict("", self.pool(features, boxes))
            return scores, decode(deltas, boxes[:, None], (10, 10, 5, 5))
        all_scores = []
        for stage, factor in enumerate((1, 2, 3)):
            scores, deltas = self.predict(f".{stage}", self.pool(features, boxes))
            boxes = decode(deltas[:, 0], boxes, (10 * factor, 10 * factor, 5 * factor, 5 * factor))
            boxes = clip_boxes_to_image(boxes, size)
            all_scores.append(scores)
        return sum(all_scores) / 3, boxes[:, None].expand(-1, CLASSES, -1)

    def detections(
        self, scores: Tensor, boxes: Tensor, size: tuple[int, int], scale: Tensor, original: tuple[int, int]
    ) -> dict[str, Tensor]:
        row, label = (scores > 0.05).nonzero(as_tuple=True)
        boxes, scores = clip_boxes_to_image(boxes[row, label], size), scores[row, label]
        keep = batched_nms(boxes, scores, label, 0.5)[:100]
        boxes = clip_boxes_to_image(boxes[keep] / scale, original)
        whole = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return {"boxes": boxes[whole], "scores": scores[keep][whole], "labels": label[keep][whole] + 1}


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Apply deltas to boxes."""
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = boxes[..., 0] + 0.5 * w, boxes[..., 1] + 0.5 * h
    dx, dy, dw, dh = (deltas[..., k] / weights[k] for k in range(4))
    x, y = dx * w + x, dy * h + y
    w, h = dw.clamp(max=LIMIT).exp() * w, dh.clamp(max=LIMIT).exp() * h
    return torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h), dim=-1)
