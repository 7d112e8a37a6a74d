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
from typing import Any

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import split_evenly
from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.layouts import looks_at_values, unchecked_values
from detpipe.roi_pooling.maps import cell_table, channels_last, cut_table
from detpipe.roi_pooling.operators import fold, is_batched, unfold
from detpipe.roi_pooling.placement import place
from detpipe.roi_pooling.scene import EQUAL_STEP, Scene, scene_operator
from detpipe.roi_pooling.torch_max import Bins, largest, read_winners, send_to_winners

FARTHEST = 1 << 30  # cells; coordinates beyond are moved there, where whole numbers are still exact


def max_pool(maps: Sequence[Tensor], scene: Scene) -> Tensor:
    """Take the largest cell in each bin of boxes of all levels.

    Args:
        maps: L tensors ``[N, C, H_l, W_l]``.
        scene: the boxes and their bins; ``samples`` is ``EQUAL_STEP`` or ``FAST_RCNN``.

    Returns:
        ``[R, C, h, w]``, channels last in memory, 0 for an empty bin. Differentiable in the maps, any number of times.
    """
    scene = scene._replace(boxes=scene.boxes.detach()).for_kernels()
    # else they are found on the way back
    want_winner = kernels_for(maps[0]) == "triton" and torch.is_grad_enabled()
    want_winner = want_winner and any(one.requires_grad or is_batched(one) for one in maps)
    pooled, _ = torch.ops.detpipe.roi_max(maps, want_winner, *scene)
    return pooled.permute(0, 3, 1, 2)


@scene_operator("roi_max", "Tensor[] maps, bool want_winner", "(Tensor, Tensor)")
def _roi_max(maps: Sequence[Tensor], want_winner: bool, *fields: Any) -> tuple[Tensor, Tensor]:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]`` values and, if they are wanted, the cells that they are from."""
    scene = Scene(*fields)
    if kernels_for(maps[0]) == "triton":
        if looks_at_values(scene.boxes):
            scene.read(maps[0])
        from detpipe.roi_pooling.cuda import maximum

        return maximum.pool(channels_last(maps), scene, want_winner)
    return largest(*_bins(maps, scene)), scene.boxes.new_empty(0, dtype=torch.int16)


@scene_operator("roi_max_adjoint", "Tensor grad, Tensor winner, Tensor[] maps")
def _roi_max_adjoint(grad: Tensor, winner: Tensor, maps: Sequence[Tensor], *fields: Any) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``, the cells of all maps, level by level; ``maps`` are empty where winners are known."""
    if not maps:
        from detpipe.roi_pooling.cuda import maximum

        return maximum.adjoint(grad.contiguous(), winner, Scene(*fields))
    with unchecked_values():  # they have been checked on the way forward
        return send_to_winners(grad, *_bins(maps, Scene(*fields)))


@scene_operator("roi_max_winners", "Tensor[] values, Tensor winner, Tensor[] maps")
def _roi_max_winners(values: Sequence[Tensor], winner: Tensor, maps: Sequence[Tensor], *fields: Any) -> Tensor:
    """L x ``[N, C, H_l, W_l]`` -> ``[R, h, w, C]``: of ``values`` the cells that won in ``maps``."""
    if not maps:
        from detpipe.roi_pooling.cuda import maximum

        return maximum.read_winners(channels_last(values), winner, Scene(*fields))
    with unchecked_values():
        return read_winners(cell_table(values).rows, *_bins(maps, Scene(*fields)))


# what the kernels of PyTorch work on


def _bins(maps: Sequence[Tensor], scene: Scene) -> tuple[Tensor, Bins]:
    """Lay out the cells of all maps in a table, and find the cells of each bin."""
    placement = place(maps, scene)
    cells = (placement.boxes * placement.scale.repeat(1, 2)).clamp(-FARTHEST, FARTHEST)
    if not looks_at_values(scene.boxes):  # a box that is not a number lies behind the map
        cells = (cells + cells.sum(1, keepdim=True) * 0).nan_to_num(FARTHEST)
    equal_step = scene.samples == EQUAL_STEP
    corners = cells.floor() if equal_step else _round(cells)
    divide = _equal_step if equal_step else _fast_rcnn
    axes = [(corners[:, 1], corners[:, 3], placement.height), (corners[:, 0], corners[:, 2], placement.width)]
    if scene.h == scene.w:  # both at once
        first, last, extent = (torch.cat(pair) for pair in zip(*axes, strict=True))
        y, x = divide(first, last, extent, scene.h).chunk(2)
    else:
        y, x = (divide(*axis, bins) for axis, bins in zip(axes, (scene.h, scene.w), strict=True))
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
def _(maps, want_winner, *fields):
    scene = Scene(*fields)
    shape = (scene.count, scene.h, scene.w, maps[0].shape[1])
    most = max(height * width for height, width in scene.levels)
    dtype = torch.int16 if not want_winner or most <= torch.iinfo(torch.int16).max else torch.int32
    return maps[0].new_empty(shape), maps[0].new_empty(shape if want_winner else (0,), dtype=dtype)


@_roi_max_adjoint.register_fake
def _(grad, winner, maps, *fields):
    return grad.new_empty((Scene(*fields).cells, grad.shape[3]))


@_roi_max_winners.register_fake
def _(values, winner, maps, *fields):
    scene = Scene(*fields)
    return values[0].new_empty((scene.count, scene.h, scene.w, values[0].shape[1]))


def _keep_maps(ctx, inputs, output):
    maps, want_winner, boxes, level, *ctx.rest = inputs
    ctx.set_materialize_grads(False)  # no zeros for the winners, which have no gradient
    ctx.save_for_backward(output[1], boxes, level, *(() if want_winner else maps))


def _keep(ctx, inputs, output):
    _, winner, maps, boxes, level, *ctx.rest = inputs
    ctx.save_for_backward(winner, boxes, level, *maps)


def _saved(ctx) -> tuple[Tensor, list[Tensor], Scene]:
    winner, boxes, level, *maps = ctx.saved_tensors
    return winner, maps, Scene(boxes, level, *ctx.rest)


def _none(ctx) -> list:
    """No gradients to the fields of a scene; PyTorch takes an empty list for one of tensors."""
    return [None, None, *([] if one == [] else None for one in ctx.rest)]


def _send(grad: Tensor, winner: Tensor, maps: Sequence[Tensor], scene: Scene) -> list[Tensor]:
    return cut_table(torch.ops.detpipe.roi_max_adjoint(grad, winner, maps, *scene), scene.images, scene.sizes)


def _max_backward(ctx, grad, _):
    winner, maps, scene = _saved(ctx)
    if grad is None:
        return [None] * len(scene.levels), None, *_none(ctx)
    grads = _send(grad, winner, maps, scene)
    if maps and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_batched(grads[0]):
        grads = [_in_layout_of(one, own) for one, own in zip(grads, maps, strict=True)]
    return grads, None, *_none(ctx)


def _adjoint_backward(ctx, rows):
    winner, maps, scene = _saved(ctx)
    values = cut_table(rows, scene.images, scene.sizes)
    return torch.ops.detpipe.roi_max_winners(values, winner, maps, *scene), None, [None] * len(maps), *_none(ctx)


def _winners_backward(ctx, grad):
    winner, maps, scene = _saved(ctx)
    return _send(grad, winner, maps, scene), None, [None] * len(maps), *_none(ctx)


_roi_max.register_autograd(_max_backward, setup_context=_keep_maps)
_roi_max_adjoint.register_autograd(_adjoint_backward, setup_context=_keep)
_roi_max_winners.register_autograd(_winners_backward, setup_context=_keep)


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
    count, scene = info.batch_size, Scene(*args[boxes_at:])
    has_images = scene.boxes.ndim - (in_dims[boxes_at] is not None) == 2 and not scene.ends
    folded = fold(info, in_dims, args, {boxes_at: scene.images} if has_images else None)
    ends = [end + call * scene.ends[-1] for call in range(count) for end in scene.ends]
    return [*folded[:boxes_at], *Scene(*folded[boxes_at:])._replace(ends=ends, images=scene.images * count)]


@_roi_max.register_vmap
def _(info, in_dims, *args):
    pooled, winner = torch.ops.detpipe.roi_max(*_fold(info, in_dims, args, 2))
    return (unfold(pooled, info), unfold(winner, info)), (0, 0)


@_roi_max_adjoint.register_vmap
def _(info, in_dims, *args):
    folded = _fold(info, in_dims, args, 3)
    scene = Scene(*folded[3:])
    maps = cut_table(torch.ops.detpipe.roi_max_adjoint(*folded), scene.images, scene.sizes)
    return torch.cat([unfold(one.permute(0, 2, 3, 1), info).flatten(1, 3) for one in maps], dim=1), 0


@_roi_max_winners.register_vmap
def _(info, in_dims, *args):
    return unfold(torch.ops.detpipe.roi_max_winners(*_fold(info, in_dims, args, 3)), info), 0
