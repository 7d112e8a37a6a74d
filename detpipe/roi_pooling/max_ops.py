"""Max pooling as operators on boxes as they were given, and everything that their gradients need.

    roi_max:          out[r, i, j, c] = max over y in rows of bin i, x in columns of bin j, of  map[r][y, x, c]
    roi_max_adjoint:  the gradient to the maps; it goes to the cell that won
    roi_max_winners:  other maps, read where the cells that won are

The last two are each other's transpose, so that the operators are closed under differentiation to any order.

The kernels are in :mod:`detpipe.roi_pooling.torch_max` and, for CUDA, :mod:`detpipe.roi_pooling.cuda.maximum`, which alone
remembers the winners: one launch forward, two on the way back.

N images, L levels, R boxes, h x w bins, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import split_evenly
from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.layouts import MOST_LISTED, GivenBoxes, looks_at_values, read_values, with_images
from detpipe.roi_pooling.levels import choose_level
from detpipe.roi_pooling.maps import cell_table, cut_table
from detpipe.roi_pooling.operators import operator
from detpipe.roi_pooling.placement import is_batched, place
from detpipe.roi_pooling.torch_max import Bins, largest, read_winners, send_to_winners

FARTHEST = 1 << 30  # cells; coordinates beyond are moved there, where whole numbers are still exact


def max_pool(
    maps: list[Tensor],
    given: GivenBoxes,
    level: Tensor | None,
    scales: list[float],
    size: tuple[int, int],
    equal_step: bool,
    normalized: bool = False,
    areas: Sequence[float] = (),
) -> Tensor:
    """Take the largest cell in each bin of boxes of all levels.

    Args:
        maps: L tensors ``[N, C, H_l, W_l]``.
        given: the boxes.
        level: ``[R]`` int64, the level of each box; None if there is one, or ``areas`` choose it.
        scales: cells a pixel of each level.
        size: h x w bins.
        equal_step: how boxes and bins are rounded to cells.
        normalized: boxes are relative to the map.
        areas: of the smallest box of each level but the first.

    Returns:
        ``[R, C, h, w]``, channels last in memory, 0 for an empty bin. Differentiable in the maps, any number of times.
    """
    differentiable = torch.is_grad_enabled() and any(one.requires_grad or is_batched(one) for one in maps)
    want_winner = differentiable and kernels_for(maps[0]) == "triton"  # else they are found on the way back
    sizes = [side for one in maps for side in one.shape[2:]]
    if len(given.ends) > MOST_LISTED:
        given = with_images(given)
    boxes, rest = (
        given.boxes.detach(),
        (list(given.ends), scales, list(areas), maps[0].shape[0], sizes, *size, equal_step, normalized),
    )
    if differentiable:
        pooled, _ = _Max.apply(boxes, level, rest, want_winner, *maps)
    else:
        pooled, _ = torch.ops.detpipe.roi_max(maps, boxes, level, *rest, False)
    return pooled.permute(0, 3, 1, 2)


@operator("roi_max")
def _roi_max(
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    equal_step: bool,
    normalized: bool,
    want_winner: bool,
) -> tuple[Tensor, Tensor]:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]`` values and, if they are wanted, the cells that they are from."""
    if kernels_for(maps[0]) == "triton":
        if looks_at_values(boxes):
            read_values(GivenBoxes(boxes, tuple(ends), ()), maps[0])
        from detpipe.roi_pooling.cuda import maximum

        scene = maximum.Scene(boxes, level, ends, images, sizes, scales, areas)
        return maximum.pool(_channels_last(maps), scene, (h, w), equal_step, normalized, want_winner)
    table, bins = _bins(maps, boxes, level, ends, scales, areas, h, w, equal_step, normalized)
    return largest(table, bins), boxes.new_empty(0, dtype=torch.int16)


@operator("roi_max_adjoint")
def _roi_max_adjoint(
    grad: Tensor,
    winner: Tensor,
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    equal_step: bool,
    normalized: bool,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``, the cells of all maps, level by level; ``maps`` are empty where winners are known."""
    if not maps:
        from detpipe.roi_pooling.cuda import maximum

        scene = maximum.Scene(boxes, level, ends, images, sizes, scales, areas)
        return maximum.adjoint(grad.contiguous(), winner, scene, equal_step, normalized)
    table, bins = _bins(maps, boxes, level, ends, scales, areas, h, w, equal_step, normalized)
    return send_to_winners(grad, table, bins)


@operator("roi_max_winners")
def _roi_max_winners(
    values: Sequence[Tensor],
    winner: Tensor,
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor | None,
    ends: Sequence[int],
    scales: Sequence[float],
    areas: Sequence[float],
    images: int,
    sizes: Sequence[int],
    h: int,
    w: int,
    equal_step: bool,
    normalized: bool,
) -> Tensor:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]``: of ``values`` the cells that won in ``maps``."""
    if not maps:
        from detpipe.roi_pooling.cuda import maximum

        scene = maximum.Scene(boxes, level, ends, images, sizes, scales, areas)
        return maximum.read_winners(_channels_last(values), winner, scene, equal_step, normalized)
    table, bins = _bins(maps, boxes, level, ends, scales, areas, h, w, equal_step, normalized)
    return read_winners(cell_table(values).rows, table, bins)


def _channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
    return [one.permute(0, 2, 3, 1).contiguous() for one in maps]


# what the kernels of PyTorch work on


def _bins(maps, boxes, level, ends, scales, areas, h, w, equal_step, normalized) -> tuple[Tensor, Bins]:
    """Lay out the cells of all maps in a table, and find the cells of each bin."""
    rois = read_values(GivenBoxes(boxes, tuple(ends), ()), maps[0])
    if level is None and areas:
        level = choose_level((rois.boxes[:, 2] - rois.boxes[:, 0]) * (rois.boxes[:, 3] - rois.boxes[:, 1]), areas)
    placement = place(maps, scales, rois, level, normalized)
    cells = (rois.boxes * placement.scale.repeat(1, 2)).clamp(-FARTHEST, FARTHEST)
    if not looks_at_values(boxes):  # a box that is not a number lies behind the map
        cells = (cells + cells.sum(1, keepdim=True) * 0).nan_to_num(FARTHEST)
    corners = cells.floor() if equal_step else _round(cells)
    divide = _equal_step if equal_step else _fast_rcnn
    axes = [(corners[:, 1], corners[:, 3], placement.height), (corners[:, 0], corners[:, 2], placement.width)]
    if h == w:  # both at once
        first, last, extent = (torch.cat(pair) for pair in zip(*axes, strict=True))
        y, x = divide(first, last, extent, h).chunk(2)
    else:
        y, x = (divide(*axis, bins) for axis, bins in zip(axes, (h, w), strict=True))
    return placement.table.rows, Bins(placement.first, placement.width, y, x)


def _round(edge: Tensor) -> Tensor:
    """Round halves away from zero, as C does, and PyTorch does not."""
    whole = edge.trunc()
    return whole + ((edge - whole).abs() >= 0.5) * edge.sign()


def _fast_rcnn(first: Tensor, last: Tensor, extent: Tensor, bins: int) -> Tensor:
    """Divide ``[R]`` first and last cells into bins: ``[R, bins, 2]`` int64 first cell and the one behind the last."""
    length = (last.long() - first.long() + 1).clamp(min=1)
    step = split_evenly(length.to(first.dtype), bins)[:, None]
    index = torch.arange(bins + 1, device=first.device, dtype=first.dtype)
    edges = torch.stack(((index[:-1] * step).floor(), (index[1:] * step).ceil()), dim=2).long()
    return _on_map(edges + first.long()[:, None, None], extent)


def _equal_step(first: Tensor, end: Tensor, extent: Tensor, bins: int) -> Tensor:
    """Divide ``[R]`` first cells and those behind the last as :func:`_fast_rcnn` does, into equal whole steps."""
    first, end = first.long(), end.long()
    step = (end - first).clamp(min=0) // bins
    begin = first[:, None] + step[:, None] * torch.arange(bins, device=first.device)
    return _on_map(torch.stack((begin, torch.cat((begin[:, 1:], end[:, None]), dim=1)), dim=2), extent)


def _on_map(edges: Tensor, extent: Tensor) -> Tensor:
    """Cut ``[R, bins, 2]`` to what lies on the map; a bin that ends before it begins is empty."""
    begin, end = edges.clamp(min=0).minimum(extent[:, None, None]).unbind(2)
    return torch.stack((begin, torch.maximum(begin, end)), dim=2)


# shapes and gradients


@_roi_max.register_fake
def _(maps, boxes, level, ends, scales, areas, images, sizes, h, w, equal_step, normalized, want_winner):
    shape = (boxes.shape[:-1].numel(), h, w, maps[0].shape[1])
    most = max(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    dtype = torch.int16 if not want_winner or most <= torch.iinfo(torch.int16).max else torch.int32
    return maps[0].new_empty(shape), maps[0].new_empty(shape if want_winner else (0,), dtype=dtype)


@_roi_max_adjoint.register_fake
def _(grad, winner, maps, boxes, level, ends, scales, areas, images, sizes, h, w, equal_step, normalized):
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return grad.new_empty((cells, grad.shape[3]))


@_roi_max_winners.register_fake
def _(values, winner, maps, boxes, level, ends, scales, areas, images, sizes, h, w, equal_step, normalized):
    return values[0].new_empty((boxes.shape[:-1].numel(), h, w, values[0].shape[1]))


class _Max(torch.autograd.Function):
    """``roi_max``, differentiable in the maps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(boxes, level, rest, want_winner, *maps):
        return torch.ops.detpipe.roi_max(list(maps), boxes, level, *rest, want_winner)

    @staticmethod
    def setup_context(ctx, inputs, output):
        boxes, level, ctx.rest, want_winner, *maps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for the winners, which have no gradient
        ctx.save_for_backward(output[1], boxes, level, *(() if want_winner else maps))

    @staticmethod
    def backward(ctx, grad, _):
        winner, boxes, level, *maps = ctx.saved_tensors
        if grad is None:
            return (None,) * (4 + len(ctx.rest[4]) // 2)
        grads = cut_table(_Adjoint.apply(grad, winner, boxes, level, ctx.rest, *maps), *ctx.rest[3:5])
        if maps and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_batched(grads[0]):
            grads = [_in_layout_of(one, own) for one, own in zip(grads, maps, strict=True)]
        return None, None, None, None, *grads


class _Adjoint(torch.autograd.Function):
    """``roi_max_adjoint``, differentiable in the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad, winner, boxes, level, rest, *maps):
        return torch.ops.detpipe.roi_max_adjoint(grad, winner, list(maps), boxes, level, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *operands, ctx.rest = inputs[:5]
        ctx.save_for_backward(*operands, *inputs[5:])

    @staticmethod
    def backward(ctx, grad_rows):
        winner, boxes, level, *maps = ctx.saved_tensors
        values = cut_table(grad_rows, *ctx.rest[3:5])
        return _Winners.apply(winner, boxes, level, ctx.rest, *values, *maps), *(None,) * (4 + len(maps))


class _Winners(torch.autograd.Function):
    """``roi_max_winners``, differentiable in the values."""

    generate_vmap_rule = True

    @staticmethod
    def forward(winner, boxes, level, rest, *both):
        values, maps = both[: len(rest[4]) // 2], both[len(rest[4]) // 2 :]
        return torch.ops.detpipe.roi_max_winners(list(values), winner, list(maps), boxes, level, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, ctx.rest = inputs[:4]
        ctx.save_for_backward(*operands, *inputs[4 + len(ctx.rest[4]) // 2 :])

    @staticmethod
    def backward(ctx, grad):
        winner, boxes, level, *maps = ctx.saved_tensors
        values = cut_table(_Adjoint.apply(grad, winner, boxes, level, ctx.rest, *maps), *ctx.rest[3:5])
        return None, None, None, None, *values, *(None,) * len(maps)


def _in_layout_of(grad: Tensor, one: Tensor) -> Tensor:
    """Write a gradient, channels last, as the map is: five times as fast as what autograd does, map by map."""
    if not one.is_contiguous():
        return grad
    written = torch.empty_like(one, dtype=grad.dtype)
    for own, values in zip(written.flatten(2), grad.flatten(2), strict=True):
        own.copy_(values)
    return written


# one call for many: inside of torch.func.vmap


def _fold(info, in_dims: Sequence, args: Sequence, boxes_at: int) -> list:
    """Write a vmapped call as one call, with more images and more boxes."""
    count, images = info.batch_size, args[boxes_at + 5]

    def stack(arg, dim):
        if isinstance(arg, Tensor):
            return arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return arg

    folded = []
    for index, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
            folded.append([stack(one, own).flatten(0, 1) for one, own in zip(arg, dim, strict=True)])
        elif isinstance(arg, Tensor):
            stacked = stack(arg, dim)
            if index == boxes_at and stacked.shape[-1] == 5:
                first = stacked[..., :1] + images * torch.arange(count, device=arg.device)[:, None, None]
                stacked = torch.cat((first, stacked[..., 1:]), dim=-1)
            folded.append(stacked.flatten(0, 1))
        else:
            folded.append(arg)
    ends = args[boxes_at + 2]
    folded[boxes_at + 2] = [end + call * ends[-1] for call in range(count) for end in ends]
    folded[boxes_at + 5] = images * count
    return folded


def _unfold(result: Tensor, info) -> Tensor:
    return result.unflatten(0, (info.batch_size, result.shape[0] // info.batch_size))


@_roi_max.register_vmap
def _(info, in_dims, *args):
    pooled, winner = torch.ops.detpipe.roi_max(*_fold(info, in_dims, args, 1))
    return (_unfold(pooled, info), _unfold(winner, info)), (0, 0)


@_roi_max_adjoint.register_vmap
def _(info, in_dims, *args):
    folded = _fold(info, in_dims, args, 3)
    maps = cut_table(torch.ops.detpipe.roi_max_adjoint(*folded), *folded[8:10])
    rows = [_unfold(one.permute(0, 2, 3, 1), info).flatten(1, 3) for one in maps]
    return torch.cat(rows, dim=1), 0


@_roi_max_winners.register_vmap
def _(info, in_dims, *args):
    return _unfold(torch.ops.detpipe.roi_max_winners(*_fold(info, in_dims, args, 3)), info), 0
