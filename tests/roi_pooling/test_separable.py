import pytest
import torch

from detpipe.roi_pooling import torch_separable
from detpipe.roi_pooling.axis import AxisTaps
from detpipe.roi_pooling.maps import CellTable, cell_table
from detpipe.roi_pooling.separable import pool_separable

LEVELS = ((5, 7), (3, 4))  # of two images


def operands(boxes=5, bins=(2, 3), taps=(4, 3), channels=6, dtype=torch.float64, seed=0):
    """Rows of two levels and two images, chosen maps, and taps of which some are absent."""
    torch.manual_seed(seed)
    levels = [torch.randn(2, channels, *size, dtype=dtype) for size in LEVELS]
    table = cell_table(levels)
    chosen = torch.randint(0, 4, (boxes,))
    axes = []
    for axis in (0, 1):
        extent = torch.tensor([size[axis] for size in LEVELS]).repeat_interleave(2)[chosen]
        cell = (torch.rand(boxes, bins[axis], taps[axis]) * extent[:, None, None]).int()
        count = torch.randint(0, taps[axis] + 1, (boxes, bins[axis], 1))
        absent = torch.arange(taps[axis]) >= count
        weight = torch.randn(boxes, bins[axis], taps[axis], dtype=dtype).masked_fill(absent, 0)
        axes.append(AxisTaps(cell.masked_fill(absent, -1), weight))
    return table, chosen, *axes


def slow(table, chosen, y, x):
    pooled = torch.zeros(len(chosen), y.cell.shape[1], x.cell.shape[1], table.rows.shape[1], dtype=table.rows.dtype)
    for r, which in enumerate(chosen.tolist()):
        level, image = divmod(which, table.images)
        height, width = table.sizes[level]
        first = sum(table.images * h * w for h, w in table.sizes[:level]) + image * height * width
        for i in range(y.cell.shape[1]):
            for j in range(x.cell.shape[1]):
                for row, wy in zip(y.cell[r, i].tolist(), y.weight[r, i], strict=True):
                    for column, wx in zip(x.cell[r, j].tolist(), x.weight[r, j], strict=True):
                        if row >= 0 and column >= 0:
                            pooled[r, i, j] += wy * wx * table.rows[first + row * width + column]
    return pooled


@pytest.mark.parametrize("few", [0, torch_separable.FEW_TAPS])
@pytest.mark.parametrize("at_once", [1, 40, torch_separable.TAPS_AT_ONCE])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_slow_loop_in_any_blocks(few, at_once, seed, monkeypatch):
    monkeypatch.setattr(torch_separable, "FEW_TAPS", few)
    monkeypatch.setattr(torch_separable, "TAPS_AT_ONCE", at_once)
    table, chosen, y, x = operands(boxes=9, seed=seed)
    leaves = [leaf.clone().requires_grad_() for leaf in (table.rows, y.weight, x.weight)]

    def apply(operator):
        given = (table._replace(rows=leaves[0]), chosen, y._replace(weight=leaves[1]), x._replace(weight=leaves[2]))
        pooled = operator(*given)
        return pooled, torch.autograd.grad((pooled * torch.arange(pooled.numel()).view_as(pooled)).sum(), leaves)

    pooled, grads = apply(pool_separable)
    expected, expected_grads = apply(slow)
    torch.testing.assert_close(pooled, expected)
    for grad, wanted, cells in zip(grads, expected_grads, (None, y.cell, x.cell), strict=True):
        torch.testing.assert_close(grad, wanted if cells is None else wanted * (cells >= 0))


def test_maps_lie_behind_each_other():
    levels = [torch.arange(float(2 * height * width)).view(2, 1, height, width) for height, width in LEVELS]
    table = cell_table(levels)
    assert isinstance(table, CellTable)
    assert table.rows.shape == (2 * 35 + 2 * 12, 1)
    assert table.rows[35 + 2 * 7 + 3, 0] == levels[0][1, 0, 2, 3]
    assert table.rows[70 + 12 + 1 * 4 + 2, 0] == levels[1][1, 0, 1, 2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own
@pytest.mark.parametrize("boxes", [0, 4])
def test_are_proper_operators(boxes):
    table, chosen, y, x = operands(boxes)
    rows, y_weight, x_weight = (leaf.clone().requires_grad_() for leaf in (table.rows, y.weight, x.weight))
    grad = torch.randn(boxes, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    where = (chosen, 2, [side for size in LEVELS for side in size], y.cell, x.cell)
    factors = (grad, rows, y_weight, x_weight)
    for index in range(4):
        given = (*factors[:index], None, *factors[index + 1 :])
        torch.library.opcheck(torch.ops.detpipe.separable.default, (*given, *where))


@pytest.mark.slow
def test_differentiable_any_number_of_times():
    table, chosen, y, x = operands(boxes=2, bins=(1, 2), taps=(2, 2), channels=2)
    leaves = [leaf.clone().requires_grad_() for leaf in (table.rows, y.weight, x.weight)]

    def first_grads(rows, y_weight, x_weight):
        y_weight, x_weight = y_weight * (y.cell >= 0), x_weight * (x.cell >= 0)
        pooled = pool_separable(
            table._replace(rows=rows), chosen, y._replace(weight=y_weight), x._replace(weight=x_weight)
        )
        return torch.autograd.grad(pooled.square().sum(), (rows, y_weight, x_weight), create_graph=True)

    assert torch.autograd.gradcheck(first_grads, leaves)
    assert torch.autograd.gradgradcheck(first_grads, leaves)


def test_memory_of_a_pass_is_bounded(monkeypatch):
    sizes = []
    expand = torch_separable._expand
    monkeypatch.setattr(torch_separable, "FEW_TAPS", 0)
    monkeypatch.setattr(torch_separable, "TAPS_AT_ONCE", 100)

    def watched(*given):
        taps = expand(*given)
        sizes.append(len(taps.row))
        return taps

    monkeypatch.setattr(torch_separable, "_expand", watched)
    table, chosen, y, x = operands(boxes=40)
    pool_separable(table, chosen, y, x)
    assert len(sizes) > 3
    assert max(sizes) <= 100 + 2 * 3 * 4 * 3  # at most one box more
