"""Which cells the bins of rotated boxes read, and with what weight.

A box is a frame: a sample at offsets (u, v) from its center, as fractions of its height and width, lies at

    y = frame[0] . (1, u, v),  x = frame[1] . (1, u, v)

and reads the four cells around it, with a weight that is linear in y and linear in x. Directional derivatives of the weights
along changes of the frame are therefore products of the same few numbers, and vanish from the third on.

Convention: coordinates are in cells, and the value of cell k sits at coordinate k. A sample more than a cell outside the map
weighs nothing, one less far is moved onto its border; both count in the average.

R boxes, h x w bins, S samples of all boxes, D directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES_AT_ONCE = 1 << 17  # bounds the memory of one pass: some 250 bytes a sample
MARGIN = 0.01  # cells by which the search for samples on the map is too generous, so that rounding loses none


class Frames(NamedTuple):
    """Boxes on the maps that they are pooled from, in cells."""

    frame: Tensor  # [R, 2, 3]: of y and of x the center, what the height adds, what the width (at right angles)
    place: Tensor  # [R, 3] int64: first row in the table of cells, height and width of the map
    counts: Tensor  # [R, 2] int64, samples of a bin along the box's height and width

    def part(self, rows: slice) -> Frames:
        """Take some of the boxes."""
        return Frames(self.frame[rows], self.place[rows], self.counts[rows])


class Samples(NamedTuple):
    """Samples of some boxes, bin by bin."""

    box: (
        Tensor | None
    )  # [S] int64; None where each box has the same samples, then ``row`` and ``column`` are of one box
    row: Tensor  # [S] or [S / R] int64, counted over the whole height of the box
    column: Tensor  # [S] or [S / R] int64
    bins: Tensor  # [R * h * w + 1] int64, where the samples of each bin begin


class Taps(NamedTuple):
    """The four cells around each sample, and what their weights are products of."""

    cell: Tensor  # [S, 2, 2] int64, rows of the table
    near: tuple[Tensor, Tensor]  # [S, 2] along y and along x: how near the two rows, the two columns are
    slope: tuple[Tensor, Tensor]  # [S, 2] the derivatives of these
    share: Tensor  # [S], of the sample in its bin's average; 0 outside the map
    offset: Tensor  # [S, 3]: 1, u, v


def sample_blocks(frames: Frames, size: tuple[int, int], regular: int) -> Iterator[tuple[slice, Frames, Samples]]:
    """List the samples of all bins, for a bounded number of boxes at a time.

    Args:
        frames: the boxes.
        size: h x w bins.
        regular: samples along each axis of every bin, which is then what ``counts`` says; 0 leaves out samples outside
            the map, which waits for the device.

    Yields:
        Which boxes, these boxes, and their samples.
    """
    boxes = len(frames.frame)
    if regular:
        row, column = _regular(size, regular, frames.place.device)
        step = max(1, SAMPLES_AT_ONCE // len(row))
        for begin in range(0, boxes, step):
            part = slice(begin, min(boxes, begin + step))
            bins = torch.arange((part.stop - begin) * size[0] * size[1] + 1, device=row.device) * regular**2
            yield part, frames.part(part), Samples(None, row, column, bins)
        return
    if not boxes:
        return
    spans = [_span(frames, axis, size[axis]) for axis in (0, 1)]
    most = (spans[0][1] - spans[0][0] + 1) * (spans[1][1] - spans[1][0] + 1) + size[0] * size[1]
    ends = most.cumsum(0).contiguous()
    steps = torch.tensor(range(SAMPLES_AT_ONCE, int(ends[-1]), SAMPLES_AT_ONCE), device=ends.device, dtype=ends.dtype)
    cuts = sorted({0, *torch.searchsorted(ends, steps).tolist(), boxes})
    for begin, end in pairwise(cuts):
        part = slice(begin, end)
        some = frames.part(part)
        yield part, some, _on_map(some, size, [(low[part], high[part]) for low, high in spans])


def taps_of(frames: Frames, samples: Samples, size: tuple[int, int]) -> Taps:
    """Find the cells around each sample.

    Args:
        frames: the boxes.
        samples: of these boxes.
        size: h x w bins.

    Returns:
        The cells, with all that their weights are made of.
    """
    frame, counts = frames.frame, frames.counts
    total = counts * torch.stack([torch.full_like(counts[:, 0], bins) for bins in size], dim=1)
    # twice the offsets in steps between samples: whole numbers, so that rounding comes last
    along = [
        (2 * index + 1 - _of_box(samples, total[:, axis])).to(frame.dtype)
        for axis, index in enumerate((samples.row, samples.column))
    ]
    steps = [_of_box(samples, 2 * total[:, axis]).to(frame.dtype) for axis in (0, 1)]
    points, limits = [], []
    for axis in (0, 1):
        center, by_height, by_width = (_of_box(samples, frame[:, axis, part]) for part in range(3))
        points.append(center + along[0] * by_height / steps[0] + along[1] * by_width / steps[1])
        limits.append(_of_box(samples, frames.place[:, 1 + axis]))
    inside_y, inside_x = ((point >= -1) & (point <= limit) for point, limit in zip(points, limits, strict=True))
    inside = inside_y & inside_x
    along_y, along_x = (_neighbors(point.where(inside, 0), limit) for point, limit in zip(points, limits, strict=True))
    first = _of_box(samples, frames.place[:, 0])
    cell = (first[..., None] + along_y[0] * limits[1][..., None])[..., :, None] + along_x[0][..., None, :]
    share = inside.to(frame.dtype) / _of_box(samples, counts[:, 0] * counts[:, 1])
    offset = torch.stack((torch.ones_like(points[0]), *(a / s for a, s in zip(along, steps, strict=True))), dim=-1)
    return Taps(
        cell.reshape(-1, 2, 2),
        (along_y[1].reshape(-1, 2), along_x[1].reshape(-1, 2)),
        (along_y[2].reshape(-1, 2), along_x[2].reshape(-1, 2)),
        share.reshape(-1),
        offset.reshape(-1, 3),
    )


def moves(taps: Taps, samples: Samples, directions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Find how far each sample moves when the frames change.

    Args:
        taps: of the samples.
        samples: of some boxes.
        directions: ``[R, D, 2, 3]``, changes of the frames of these boxes.

    Returns:
        D pairs of ``[S]``, along y and x.
    """
    along = []
    for direction in directions.unbind(1):  # [R, 2, 3]
        if samples.box is None:
            offset = taps.offset.view(len(direction), -1, 3)
            moved = [(offset * direction[:, axis, None]).sum(-1).flatten() for axis in (0, 1)]
        else:
            moved = [(taps.offset * direction[:, axis].index_select(0, samples.box)).sum(-1) for axis in (0, 1)]
        along.append((moved[0], moved[1]))
    return along


def weights(taps: Taps, along: Sequence[tuple[Tensor | float, Tensor | float]]) -> Tensor:
    """Weigh the four cells around each sample, or differentiate these weights.

    Args:
        taps: of the samples.
        along: D moves of the samples along y and x; the result is the derivative along all of them.

    Returns:
        ``[S, 2, 2]``.
    """
    (near_y, near_x), (slope_y, slope_x) = taps.near, taps.slope
    if not along:
        factors = [(near_y * taps.share[:, None], near_x)]
    elif len(along) == 1:
        [(y, x)] = along
        factors = [(slope_y * (taps.share * y)[:, None], near_x), (near_y * (taps.share * x)[:, None], slope_x)]
    elif len(along) == 2:
        (y, x), (other_y, other_x) = along
        factors = [(slope_y * (taps.share * (y * other_x + other_y * x))[:, None], slope_x)]
    else:
        factors = [(torch.zeros_like(near_y), near_x)]
    products = [left[:, :, None] * right[:, None, :] for left, right in factors]
    return products[0] if len(products) == 1 else products[0] + products[1]


def _of_box(samples: Samples, values: Tensor) -> Tensor:
    """``[R]`` -> ``[S]``, or ``[R, 1]`` where all boxes have the same samples."""
    return values[:, None] if samples.box is None else values.index_select(0, samples.box)


def _neighbors(point: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells along an axis, how near they are, and how that changes; nothing changes beyond the border."""
    last = limit - 1
    on_map = point.clamp(min=0).minimum(last.to(point.dtype))
    low = on_map.floor().minimum((last - 1).clamp(min=0).to(point.dtype))
    beyond = on_map - low
    moving = (on_map == point).to(point.dtype)
    cell = low.long()
    high = (cell + 1).minimum(last)
    return torch.stack((cell, high), -1), torch.stack((1 - beyond, beyond), -1), torch.stack((-moving, moving), -1)


def _regular(size: tuple[int, int], samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each sample of a box, bin by bin."""
    rows, columns = (torch.arange(bins * samples, device=device).view(bins, samples) for bins in size)
    shape = (size[0], size[1], samples, samples)
    return rows[:, None, :, None].expand(shape).flatten(), columns[None, :, None, :].expand(shape).flatten()


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
    boxes, device = len(frames.frame), frames.place.device
    (row_first, rows), (column_first, columns) = (
        _part_of_bins(spans[axis], frames.counts[:, axis], size[axis]) for axis in (0, 1)
    )
    # runs: the samples of one bin in one row
    runs = (rows[:, :, None] * (columns > 0)[:, None, :]).flatten()
    run_ends = runs.cumsum(0)
    bin_of = torch.repeat_interleave(torch.arange(len(runs), device=device), runs, output_size=int(run_ends[-1]))
    begin = row_first[:, :, None].expand(boxes, h, w).flatten() - (run_ends - runs)
    row = begin.index_select(0, bin_of) + torch.arange(len(bin_of), device=device)
    box = torch.div(bin_of, h * w, rounding_mode="floor")
    first, length = (
        values[:, None, :].expand(boxes, h, w).flatten().index_select(0, bin_of) for values in (column_first, columns)
    )
    first, length = _cut_runs(frames, box, row, size, first, length)
    # samples
    ends = length.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    run = torch.repeat_interleave(torch.arange(len(length), device=device), length, output_size=total)
    column = (first - (ends - length)).index_select(0, run) + torch.arange(total, device=device)
    bins = torch.nn.functional.pad(ends, (1, 0)).index_select(0, torch.nn.functional.pad(run_ends, (1, 0)))
    return Samples(box.index_select(0, run), row.index_select(0, run), column, bins)


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
