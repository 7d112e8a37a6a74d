"""Which samples of rotated boxes lie on the map, where each bin has as many as it has cells.

A box is a frame: a sample at offsets (u, v) from its center, as fractions of its height and width, lies at

    y = frame[0] . (1, u, v),  x = frame[1] . (1, u, v)

Convention: coordinates are in cells, and the value of cell k sits at coordinate k. A sample more than a cell outside the map
weighs nothing, and is not listed where that is seen at once.

R boxes, h x w bins, S samples of all boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.blocks import cut_boxes, list_entries

SAMPLES_AT_ONCE = 1 << 17  # bounds the memory of one pass: some 250 bytes a sample
MARGIN = 0.01  # cells by which the search for samples on the map is too generous, so that rounding loses none


class Frames(NamedTuple):
    """Boxes on the maps that they are pooled from, in cells."""

    frame: Tensor  # [R, 2, 3]: of y and of x the center, what the height adds, what the width (at right angles)
    place: Tensor  # [R, 3] int64: first row in the table of cells, height and width of the map
    counts: Tensor  # [R, 2] int64, samples of a bin along the box's height and width; 0 for a box without area

    def part(self, rows: slice) -> Frames:
        """Take some of the boxes."""
        return Frames(self.frame[rows], self.place[rows], self.counts[rows])


class Samples(NamedTuple):
    """Samples of some boxes, bin by bin."""

    box: Tensor  # [S] int64
    row: Tensor  # [S] int64, counted over the whole height of the box
    column: Tensor  # [S] int64
    bins: Tensor  # [R * h * w + 1] int64, where the samples of each bin begin


def sample_blocks(frames: Frames, size: tuple[int, int]) -> Iterator[tuple[slice, Frames, Samples]]:
    """List the samples of all bins, for a bounded number of boxes at a time; this waits for the device.

    What comes is which boxes, these boxes, and their samples.
    """
    if not len(frames.frame):
        return
    spans = [_span(frames, axis, size[axis]) for axis in (0, 1)]
    most = (spans[0][1] - spans[0][0] + 1) * (spans[1][1] - spans[1][0] + 1) + size[0] * size[1]
    for part in cut_boxes(most, SAMPLES_AT_ONCE):
        some = frames.part(part)
        yield part, some, _on_map(some, size, [(low[part], high[part]) for low, high in spans])


def offsets(frames: Frames, samples: Samples, size: tuple[int, int]) -> Tensor:
    """Where samples lie in their boxes: ``[S, 3]``, 1 and the fractions of height and width from the center."""
    total = frames.counts * torch.tensor(size, device=frames.counts.device)
    parts = []
    for axis, index in enumerate((samples.row, samples.column)):
        own = total[:, axis].index_select(0, samples.box)
        parts.append((2 * index + 1 - own).to(frames.frame.dtype) / (2 * own))  # whole numbers: rounding comes last
    return torch.stack((torch.ones_like(parts[0]), *parts), dim=-1)


def _to_index(position: Tensor, samples: Tensor) -> Tensor:
    """Offsets as fractions of the box -> which sample, counted from 0, in fractions of a sample."""
    return position * samples + (samples - 1) / 2


def _span(frames: Frames, axis: int, bins: int) -> tuple[Tensor, Tensor]:
    """``[R]`` first and last row (axis 0) or column (axis 1) of samples that may lie on the map; last < first if none."""
    center, along = frames.frame[:, :, 0], frames.frame[:, :, 1 + axis]
    length = torch.hypot(along[:, 0], along[:, 1]).clamp(min=torch.finfo(center.dtype).tiny)
    unit = along / length[:, None]
    # corners of the map on the box's axis
    ends = torch.stack(((-1 - center) * unit, (frames.place[:, 1:] - center) * unit))
    low, high = ends.amin(0).sum(1) - MARGIN, ends.amax(0).sum(1) + MARGIN
    samples = (frames.counts[:, axis] * bins).to(center.dtype)
    first, last = _to_index(low / length, samples).floor(), _to_index(high / length, samples).ceil()
    first = first.nan_to_num(0).clamp(min=0).minimum(samples).long()
    return first, last.nan_to_num(0).clamp(min=-1).minimum(samples - 1).long().maximum(first - 1)


def _part_of_bins(span: tuple[Tensor, Tensor], counts: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """``[R, B]`` first sample of the span in each bin, and how many there are."""
    begin = torch.arange(bins, device=counts.device) * counts[:, None]
    first = begin.maximum(span[0][:, None])
    return first, ((begin + counts[:, None]).minimum(span[1][:, None] + 1) - first).clamp(min=0)


def _on_map(frames: Frames, size: tuple[int, int], spans: Sequence[tuple[Tensor, Tensor]]) -> Samples:
    """List the samples that may lie on the map: bin by bin, in each by rows, in each a run of columns."""
    h, w = size
    boxes = len(frames.frame)
    (row_first, rows), (column_first, columns) = (
        _part_of_bins(spans[axis], frames.counts[:, axis], size[axis]) for axis in (0, 1)
    )
    # runs: the samples of one bin in one row
    runs = (rows[:, :, None] * (columns > 0)[:, None, :]).flatten()
    bin_of, row = list_entries(row_first[:, :, None].expand(boxes, h, w).flatten(), runs)
    box = torch.div(bin_of, h * w, rounding_mode="floor")
    first, length = (
        values[:, None, :].expand(boxes, h, w).flatten().index_select(0, bin_of) for values in (column_first, columns)
    )
    first, length = _cut_runs(frames, box, row, size, first, length)
    # samples
    run, column = list_entries(first, length)
    ends, run_ends = (torch.nn.functional.pad(counts.cumsum(0), (1, 0)) for counts in (length, runs))
    return Samples(box.index_select(0, run), row.index_select(0, run), column, ends.index_select(0, run_ends))


def _cut_runs(
    frames: Frames, box: Tensor, row: Tensor, size: tuple[int, int], first: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep of each run (first column and length) what may lie on the map."""
    frame = frames.frame[box]
    tall, wide = ((frames.counts[:, axis] * size[axis])[box].to(frame.dtype) for axis in (0, 1))
    start = frame[:, :, 0] + ((2 * row + 1 - tall) / (2 * tall))[:, None] * frame[:, :, 1]  # [runs, 2], of the middle
    ends = torch.stack((-1 - MARGIN - start, frames.place[box, 1:] + MARGIN - start)) / frame[:, :, 2]
    low = ends.amin(0).nan_to_num(-torch.inf).amax(1)
    high = ends.amax(0).nan_to_num(torch.inf).amin(1)
    last = (first + length - 1).to(frame.dtype)
    low = _to_index(low, wide).floor().maximum(first.to(frame.dtype)).minimum(last + 1).long()
    high = _to_index(high, wide).ceil().clamp(min=-1).minimum(last).long()
    return low, (high - low + 1).clamp(min=0)
