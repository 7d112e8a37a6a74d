"""What the attention of a backbone does on images: its gates, recorded while the network runs.

N images, C channels, M branches, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe import images as frames
from detpipe.attention.base import Attention, Gates
from detpipe.stages import Backbone


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
