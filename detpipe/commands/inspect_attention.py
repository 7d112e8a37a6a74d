"""The ``inspect`` command: pictures of what the attention of a trained backbone does on images.

Writes, for what the backbone has: ``channel_gates.png`` (mean gate of each channel by class, the last block of each stage),
``branch_weights.png`` (weight of the widest kernel against the size of the object), ``IMAGE_maps.png`` (spatial gates over each
image), and ``attention.json`` with the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from detpipe import images as frames
from detpipe.attention.base import Attention, Gates
from detpipe.commands.parser import Parser, distinct, output_folder
from detpipe.commands.predict import choose_proposals, detect
from detpipe.detector import TwoStageDetector
from detpipe.pictures.inspection_plots import plot_branches, plot_class_gates, plot_maps
from detpipe.prediction.inputs import find_images
from detpipe.prediction.windows import ImageWindows
from detpipe.stages import Backbone
from detpipe.support.errors import UsageError
from detpipe.support.files import write_text
from detpipe.support.terminal import say
from detpipe.training.models import load_detector
from detpipe.types import RGB

SHARES = (0.25, 0.5, 1.0)


def run_inspect(arguments: Sequence[str]) -> int:
    """Draw the attention of a detector's backbone."""
    options = _parse(arguments)
    out = output_folder(options.output)
    inputs = find_images(options.images)
    paths = [one.path for one in inputs]
    detector, description = load_detector(options.checkpoint)
    if description.pixels != RGB:
        raise UsageError(
            f"{options.checkpoint} is of images of {description.pixels}; attention is drawn on 8-bit RGB alone"
        )
    boxes = choose_proposals(detector, options, paths, description)
    modules = attention_modules(detector.backbone)
    if not modules:
        raise UsageError(
            f"the backbone of {options.checkpoint}, {type(detector.backbone).__name__}, has no attention modules"
        )
    images = [one.read(RGB) for one in inputs]
    proposals = [
        None if boxes is None else boxes(path, ImageWindows(image)) for path, image in zip(paths, images, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, object] = {"checkpoint": str(options.checkpoint), "modules": list(modules)}
    written = draw_maps(detector, paths, images, out)
    objects = _find_objects(detector, images, proposals, options.score_threshold, options.max_objects)
    if len(objects.boxes):
        numbers["objects"] = len(objects.boxes)
        written += draw_gates(detector, objects, description.class_names, out, numbers)
    elif not written:
        raise UsageError(
            f"no object was found with a score of {options.score_threshold} or more; lower --score_threshold, or give other images"
        )
    write_text(out / "attention.json", json.dumps(numbers, indent=1) + "\n")
    say("\n".join(str(path) for path in [*written, out / "attention.json"]))
    return 0


def last_of_each_stage(names: Sequence[str]) -> list[str]:
    """Choose a module of each stage: the last of those whose names differ only in the number of the block.

    Example:
        >>> last_of_each_stage(["c2.0.attention", "c2.1.attention", "c3.0.attention"])
        ['c2.1.attention', 'c3.0.attention']
    """
    chosen: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        chosen[".".join(parts[: numbers[-1]]) if numbers else name] = name
    return list(chosen.values())


def _find_objects(
    detector: TwoStageDetector,
    images: Sequence[Tensor],
    proposals: Sequence[Tensor | None],
    threshold: float,
    most: int,
) -> Objects:
    """Take what the detector finds, the surest objects of each class first, at most so many of a class."""
    rows = []
    for index, image in enumerate(tqdm(images, desc="objects", unit="image", disable=not sys.stderr.isatty())):
        found = detect(detector, image, proposals[index], threshold)
        scores, labels = found["scores"].tolist(), found["labels"].tolist()
        rows += [(score, label, index, box) for score, label, box in zip(scores, labels, found["boxes"], strict=True)]
    kept, seen = [], dict[int, int]()
    for row in sorted(rows, key=lambda row: -row[0]):
        seen[row[1]] = seen.get(row[1], 0) + 1
        if seen[row[1]] <= most:
            kept.append(row)
    boxes = torch.stack([row[3] for row in kept]) if kept else torch.zeros(0, 4)
    return Objects([images[row[2]] for row in kept], boxes, torch.tensor([row[1] for row in kept], dtype=torch.int64))


def draw_maps(detector: TwoStageDetector, paths: Sequence[Path], images: Sequence[Tensor], out: Path) -> list[Path]:
    """Draw the spatial gates over images ``[3, H, W]`` uint8 RGB, and name the files; none where there are no such gates."""
    written: list[Path] = []
    taken: set[str] = set()
    for path, image in zip(paths, images, strict=True):
        maps = spatial_maps(detector.backbone, image, detector.min_size, detector.max_size)
        if maps:
            file = out / f"{distinct(f'{path.stem}_maps', taken)}.png"
            plot_maps(image, {module: maps[module] for module in last_of_each_stage(list(maps))}, file)
            written.append(file)
    return written


def draw_gates(
    detector: TwoStageDetector,
    objects: Objects,
    class_names: Sequence[str],
    out: Path,
    numbers: dict[str, object],
) -> list[Path]:
    """Draw channel gates by class and branch weights by scale on objects, name the files, and put what was drawn in ``numbers``."""
    backbone, side, written = detector.backbone, detector.min_size, []
    channel = gates_by_class(backbone, objects, side, "channel")
    if channel:
        counts = torch.bincount(objects.labels - 1, minlength=len(class_names)).tolist()
        shown = {name: channel[name] for name in last_of_each_stage(list(channel))}  # stages may have other attention
        plot_class_gates(shown, class_names, counts, out / "channel_gates.png")
        written.append(out / "channel_gates.png")
        numbers["channel_gates"] = {
            name: {
                class_names[index]: [round(value, 5) for value in row.tolist()]
                for index, row in enumerate(values)
                if counts[index]
            }
            for name, values in channel.items()
        }
    branches = branches_by_scale(backbone, objects, side, SHARES)
    if branches:
        plot_branches(branches, SHARES, len(objects.boxes), out / "branch_weights.png")
        written.append(out / "branch_weights.png")
        numbers["branch_weights"] = {"shares": SHARES, **{name: values.tolist() for name, values in branches.items()}}
    return written


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("detpipe inspect", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint of a detector whose backbone has attention")
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    parser.add_argument("-o", "--output", required=True, help="folder for the pictures")
    parser.add_argument(
        "--score_threshold", type=float, default=0.5, help="least score of the objects that are looked at"
    )
    parser.add_argument("--proposals", help="boxes for a detector that needs some, as of detpipe predict")
    parser.add_argument("--max_objects", type=int, default=50, help="most objects of a class, the surest first")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.score_threshold <= 1 or options.max_objects < 1:
        raise UsageError("expected --score_threshold in 0..1 and --max_objects of at least 1")
    return options


@dataclass(frozen=True)
class Objects:
    """Objects to look at: the image ``[3, H_i, W_i]`` uint8 RGB of each, ``[O, 4]`` xyxy in its pixels, and ``[O]`` in 1..K."""

    images: Sequence[Tensor]
    boxes: Tensor
    labels: Tensor


def attention_modules(network: nn.Module) -> dict[str, Attention]:
    """Find the attention modules of a network by name, in its order; of nested ones the outermost."""
    found: dict[str, Attention] = {}
    for name, module in network.named_modules():
        if isinstance(module, Attention) and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


@contextmanager
def recording(network: nn.Module) -> Iterator[dict[str, Gates]]:
    """Yield name -> gates of every attention module in the last forward pass while it lasts, detached, on the CPU."""
    recorded: dict[str, Gates] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Attention)
            with torch.no_grad():
                recorded[name] = {kind: gate.detach().cpu() for kind, gate in module.gates(inputs[0]).items()}

        return keep

    handles = [module.register_forward_pre_hook(keeper(name)) for name, module in attention_modules(network).items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def gates_of(backbone: Backbone, images: Sequence[Tensor], min_size: int, max_size: int) -> dict[str, Gates]:
    """Compute the gates for N images ``[3, H_i, W_i]`` uint8 RGB, resized as by a detector: name -> gates, first dimension N."""
    batch = frames.to_batch(images, backbone.pixel_format, min_size, max_size, max(backbone.strides.values()))
    with recording(backbone) as recorded:
        backbone(batch.tensors.to(backbone.device))
    return recorded


def crop_object(image: Tensor, box: Tensor, side: int, share: float) -> Tensor:
    """Cut out a box ``[4]`` of an image ``[3, H, W]`` uint8 RGB with what is around it: ``[3, side, side]``, edges go on outside.

    ``share`` is the part of the side that the longer side of the box takes up; above 1 zooms into the box.
    """
    x1, y1, x2, y2 = box.tolist()
    window = max(x2 - x1, y2 - y1) / share
    center_x, center_y = (x1 + x2) / 2, (y1 + y2) / 2
    height, width = image.shape[1:]
    steps = (torch.arange(side) + 0.5) / side - 0.5
    x = 2 * (center_x + steps * window) / width - 1
    y = 2 * (center_y + steps * window) / height - 1
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)[None]
    shrink = int(window / side)
    source = image[None].float()
    if shrink > 1:  # an average over what one pixel of the result stands for
        source = F.avg_pool2d(source, shrink, ceil_mode=True, count_include_pad=False)
    sampled = F.grid_sample(source, grid, padding_mode="border", align_corners=False)[0]
    return sampled.round().clamp(0, 255).to(torch.uint8)


def gates_by_class(
    backbone: Backbone, objects: Objects, side: int, kind: str, share: float = 0.8, batch: int = 16
) -> dict[str, Tensor]:
    """Average the gates of each class over its objects, each seen alone in cut-outs (Hu et al. 2018, figure 5).

    Returns:
        name of each attention module with gates of a kind, "channel" or "branch" -> ``[K, C]`` or ``[K, M, C]``; NaN for a class
        without objects.
    """
    count = int(objects.labels.max())
    sums: dict[str, Tensor] = {}
    for start in range(0, len(objects.boxes), batch):
        part = slice(start, start + batch)
        crops = [
            crop_object(image, box, side, share)
            for image, box in zip(objects.images[part], objects.boxes[part], strict=True)
        ]
        for name, gates in gates_of(backbone, crops, side, side).items():
            if kind in gates:
                values = gates[kind].flatten(-3)  # [N, C] or [N, M, C]
                total = sums.setdefault(name, torch.zeros(count, *values.shape[1:]))
                total.index_add_(0, objects.labels[part] - 1, values)
    numbers = torch.bincount(objects.labels - 1, minlength=count)
    return {name: total / numbers.reshape(-1, *[1] * (total.dim() - 1)) for name, total in sums.items()}


def branches_by_scale(
    backbone: Backbone, objects: Objects, side: int, shares: Sequence[float], batch: int = 16
) -> dict[str, Tensor]:
    """Average the weight of each branch over objects and channels, as the object takes up S shares of the cut-out (Li et al. 2019).

    ``[S, M]`` by name of the attention module; modules without branches are left out.
    """
    one_class = Objects(objects.images, objects.boxes, torch.ones_like(objects.labels))
    found = [gates_by_class(backbone, one_class, side, "branch", share, batch) for share in shares]
    return {name: torch.cat([by_class[name].mean(-1) for by_class in found]) for name in found[0]}


def spatial_maps(backbone: Backbone, image: Tensor, min_size: int, max_size: int) -> dict[str, Tensor]:
    """Compute the spatial gates of one image ``[3, H, W]`` uint8 RGB: name of the attention module -> ``[H, W]`` in 0..1."""
    height, width = image.shape[1:]
    inner = frames.resized_size((height, width), min_size, max_size)
    step = max(backbone.strides.values())
    padded = [-(-side // step) * step for side in inner]
    maps = {}
    for name, gates in gates_of(backbone, [image], min_size, max_size).items():
        if "spatial" in gates:
            whole = F.interpolate(gates["spatial"].float(), size=padded, mode="bilinear", align_corners=False)
            part = whole[:, :, : inner[0], : inner[1]]
            maps[name] = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    return maps
