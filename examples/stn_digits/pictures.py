"""Pictures of what a spatial transformer does: the paper's four columns, for some digits and over the epochs of a training.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025, figure 1: the input, the region of it that is sampled, the
transformer's output, and the prediction.

Deviation: the region may reach beyond the image, so the second column shows the image smaller, with what is around it; the edge
that becomes the upper one of the output is blue, so that rotations can be seen.

N digits, S pixels a side of the image, G of the output, M points of an outline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detpipe.support.files import atomic_write
from stn_digits.classifier import DigitClassifier

Color = tuple[int, int, int]

INK, PAPER, AROUND = (32, 32, 32), (255, 255, 255), (74, 74, 84)
EDGE, UPPER, RIGHT, WRONG = (255, 150, 40), (70, 160, 255), (30, 140, 60), (200, 40, 40)
CELL, WIDE, GAP, LINE = 84, 120, 6, 20  # pixels: a cell, the one with the region, between cells, a line of text
DETAIL = 3  # times as large as a cell is drawn before it is shrunk
LABEL = 66  # pixels for the name of a row
COLUMNS = (("input", CELL), ("sampled region", WIDE), ("output", CELL), ("prediction", CELL))
EXAMPLE = sum(width + GAP for _, width in COLUMNS)
POINTS = 24  # along each edge of an outline
GRAYS, STEPS = 48, 8  # colors of an animation: grays, and steps from each color of the pen to what it is drawn on
FRAME_MILLISECONDS, LAST_MILLISECONDS = 220, 3000


@dataclass(frozen=True)
class Look:
    """What a classifier did with N digits."""

    images: Tensor  # [N, 1, S, S] in 0..1
    labels: Tensor  # [N] in 0..9
    outlines: Tensor  # [N, M, 2] (x, y), -1..1: around what was sampled, closed, beginning with the upper edge
    outputs: Tensor  # [N, 1, G, G]
    predicted: Tensor  # [N] in 0..9
    confidence: Tensor  # [N] in 0..1, of what is predicted

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def look(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> Look:
    """Classify digits and keep, on the CPU, what the transformer did; the mode of the classifier stays what it was.

    Args:
        classifier: with a transformer, or it is a ValueError.
        images: ``[N, 1, S, S]`` floating point in 0..1.
        labels: ``[N]`` int64 in 0..9.
    """
    training = classifier.training
    classifier.eval()
    seen = classifier.transform(images.to(classifier.device))
    confidence, predicted = classifier(images.to(classifier.device)).softmax(dim=1).max(dim=1)
    classifier.train(training)
    assert classifier.transformer is not None  # else transform has raised
    outlines = classifier.transformer.grid.warp(seen.theta, _around().to(seen.theta))
    return Look(images, labels, outlines.cpu(), seen.output.cpu(), predicted.cpu(), confidence.cpu())


def draw_looks(rows: Mapping[str, Look], title: str) -> Image.Image:
    """Draw named rows of digits, each with the four columns, under a title; where all names are blank, they take no place."""
    examples = max(map(len, rows.values()))
    head, label = 2 * LINE + GAP, LABEL if any(name.strip() for name in rows) else GAP
    canvas = Image.new("RGB", (label + examples * (EXAMPLE + 2 * GAP), head + len(rows) * (WIDE + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, LINE / 2 + 3), title, fill=INK, font=_font(15), anchor="lm")
    for example in range(examples):
        x = label + example * (EXAMPLE + 2 * GAP)
        for name, width in COLUMNS:
            pen.text((x + width / 2, LINE * 1.5 + 2), name, fill=INK, font=_font(12), anchor="mm")
            x += width + GAP
    for row, (name, found) in enumerate(rows.items()):
        y = head + row * (WIDE + GAP)
        pen.text((GAP, y + WIDE / 2), name, fill=INK, font=_font(14), anchor="lm")
        for index in range(len(found)):
            _draw_example(canvas, (label + index * (EXAMPLE + 2 * GAP), y), found, index)
    return canvas


def save_png(picture: Image.Image, out: Path) -> None:
    """Write a picture as PNG; it is complete when it is visible."""
    with atomic_write(out) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def save_gif(frames: Sequence[Image.Image], out: Path) -> None:
    """Write pictures of one size as an animation that is repeated, of which the last one stays longer; complete when visible."""
    first, *rest = [_in_palette(frame, _palette()) for frame in frames]
    durations = [FRAME_MILLISECONDS] * len(rest) + [LAST_MILLISECONDS]
    with atomic_write(out) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


class Film(Callback):
    """Draw the same digits before training and after each epoch, and write them as an animation at its end.

    Args:
        images: ``[N, 1, S, S]``, N even: they are drawn two in a row.
        labels: ``[N]``.
        title: over each picture, before the epoch.
        out: the GIF.
    """

    def __init__(self, images: Tensor, labels: Tensor, title: str, out: Path) -> None:
        self.images, self.labels, self.title, self.out = images, labels, title, out
        self.frames: list[Image.Image] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the untrained transformer."""
        self._draw(pl_module, 0, trainer.max_epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the epoch has changed."""
        self._draw(pl_module, trainer.current_epoch + 1, trainer.max_epochs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the animation."""
        save_gif(self.frames, self.out)

    def _draw(self, classifier: LightningModule, epoch: int, epochs: int | None) -> None:
        assert isinstance(classifier, DigitClassifier)
        rows = {
            " " * row: look(classifier, self.images[row : row + 2], self.labels[row : row + 2])
            for row in range(0, len(self.labels), 2)
        }
        self.frames.append(draw_looks(rows, f"{self.title}: epoch {epoch} of {epochs}"))


def _draw_example(canvas: Image.Image, corner: tuple[int, int], found: Look, index: int) -> None:
    x, y = corner
    middle = y + (WIDE - CELL) // 2
    for (name, width), cell in zip(COLUMNS, _cells(found, index), strict=True):
        canvas.paste(cell, (x, y if name == "sampled region" else middle))
        x += width + GAP


def _cells(found: Look, index: int) -> list[Image.Image]:
    """The four columns of one digit."""
    image, size = _gray(found.images[index, 0]), (CELL, CELL)
    return [
        image.resize(size, Image.Resampling.BICUBIC),
        _region(image, found.outlines[index]),
        _gray(found.outputs[index, 0]).resize(size, Image.Resampling.BICUBIC),
        _prediction(int(found.predicted[index]), float(found.confidence[index]), int(found.labels[index])),
    ]


def _region(image: Image.Image, outline: Tensor) -> Image.Image:
    """The image with what is around it, and the outline on both."""
    side, inner = DETAIL * WIDE, DETAIL * CELL
    cell = Image.new("RGB", (side, side), AROUND)
    cell.paste(image.resize((inner, inner), Image.Resampling.BICUBIC), ((side - inner) // 2, (side - inner) // 2))
    pen = ImageDraw.Draw(cell)
    # far beyond the cell a point is as good as any: the pen wants numbers of a few digits
    places = (side / 2 + outline * (inner / 2)).clamp(-4 * side, 5 * side)
    points = [(float(x), float(y)) for x, y in places]
    pen.line(points, fill=EDGE, width=2 * DETAIL, joint="curve")
    pen.line(points[: POINTS + 1], fill=UPPER, width=2 * DETAIL, joint="curve")
    return cell.resize((WIDE, WIDE), Image.Resampling.LANCZOS)


def _prediction(predicted: int, confidence: float, label: int) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    pen, color = ImageDraw.Draw(cell), RIGHT if predicted == label else WRONG
    pen.text((CELL / 2, 32), str(predicted), fill=color, font=_font(40), anchor="mm")
    text = f"{100 * confidence:.0f} %" + ("" if predicted == label else f", is {label}")
    pen.text((CELL / 2, 68), text, fill=color, font=_font(13), anchor="mm")
    return cell


def _palette() -> npt.NDArray[np.int64]:
    """The colors of an animation, ``[C, 3]``: the same for all frames, so that what stays does not flicker."""
    grays = [(level, level, level) for level in np.linspace(0, 255, GRAYS)]
    pens = [(pen, ground) for pen in (EDGE, UPPER) for ground in (AROUND, (0, 0, 0), PAPER)]
    pens += [(pen, PAPER) for pen in (INK, RIGHT, WRONG)]
    blends = [np.linspace(pen, ground, STEPS, endpoint=False) for pen, ground in pens]
    return np.concatenate([grays, [AROUND], *blends]).round().astype(np.int64)


def _in_palette(frame: Image.Image, palette: npt.NDArray[np.int64]) -> Image.Image:
    """Give each pixel the nearest color; Pillow's own way takes a near one, and white is then no longer white."""
    pixels = np.asarray(frame, dtype=np.int64) @ (1 << 16, 1 << 8, 1)
    packed, inverse = np.unique(pixels, return_inverse=True)
    colors = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    nearest = np.square(colors[:, None] - palette).sum(axis=2).argmin(axis=1)
    indexed = Image.fromarray(nearest[inverse].reshape(pixels.shape).astype(np.uint8))
    indexed.putpalette(palette.astype(np.uint8).tobytes())
    return indexed


def _around() -> Tensor:
    """``[4 POINTS + 1, 2]``: around the output, clockwise from its upper left corner and back to it."""
    side, one = torch.linspace(-1, 1, POINTS + 1)[:-1], torch.ones(POINTS)
    edges = [(side, -one), (one, side), (-side, one), (-one, -side)]
    points = torch.cat([torch.stack(edge, dim=1) for edge in edges])
    return torch.cat([points, points[:1]])


def _gray(image: Tensor) -> Image.Image:
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8).numpy()
    return Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
