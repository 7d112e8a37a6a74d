import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detpipe.proposals.rpn_head import RPNHead


def make(depth: int = 1, per_cell: int = 3) -> RPNHead:
    head = RPNHead(5, per_cell, [8] * depth)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


def maps(*cells: tuple[int, int], dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 5, *size, dtype=dtype) for size in cells]


@pytest.mark.parametrize("depth", [1, 2])
def test_outputs_are_ordered_by_level_row_column_and_anchor(depth):
    head, levels = make(depth), maps((4, 6), (2, 3))
    logits, deltas = head(levels)
    assert logits.shape == (2, 3 * (24 + 6))
    assert deltas.shape == (2, 90, 4)
    start = 0
    for level in levels:
        hidden = level
        for conv in head.convs:
            hidden = F.relu(conv(hidden))
        scores, boxes = head.objectness(hidden), head.regressor(hidden)
        height, width = level.shape[2:]
        for image in range(2):
            for row in range(height):
                for column in range(width):
                    for anchor in range(3):
                        index = start + (row * width + column) * 3 + anchor
                        torch.testing.assert_close(logits[image, index], scores[image, anchor, row, column])
                        want = boxes[image, 4 * anchor : 4 * anchor + 4, row, column]
                        torch.testing.assert_close(deltas[image, index], want)
        start += 3 * height * width


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("cells", [[(4, 6)], [(5, 3), (1, 1), (2, 2)], [(1, 7), (3, 1)]])
def test_some_anchors_have_the_outputs_and_gradients_of_all(cells, channels_last):
    head = make().double()
    levels = maps(*cells, dtype=torch.float64)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    leaves = [level.contiguous(memory_format=layout).requires_grad_() for level in levels]
    index = torch.randint(0, 3 * sum(h * w for h, w in cells), (2, 9))
    index[0, :3] = index[0, 0]  # the same one again, and neighbors in one cell
    weight, box_weight = torch.randn(2, 9, dtype=torch.float64), torch.randn(2, 9, 4, dtype=torch.float64)
    results = []
    for sparse in (True, False):
        logits, deltas = head.at(leaves, index) if sparse else head(leaves)
        if not sparse:
            logits, deltas = logits.gather(1, index), deltas.gather(1, index[..., None].expand(-1, -1, 4))
        loss = (logits * weight).sum() + (deltas * box_weight).sum()
        results.append((logits, deltas, *torch.autograd.grad(loss, [*leaves, *head.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    head = make().double()
    levels = [level.requires_grad_() for level in maps((3, 4), (1, 2), dtype=torch.float64)]
    index = torch.tensor([[0, 5, 41], [36, 20, 20]])
    assert torch.autograd.gradcheck(lambda *leaves: head.at(leaves, index), levels)


def test_levels_without_an_anchor_stay_in_the_graph():
    levels = [level.requires_grad_() for level in maps((4, 6), (2, 3))]
    logits, _ = make().at(levels, torch.zeros(2, 3, dtype=torch.int64))
    logits.sum().backward()
    assert levels[0].grad.any()
    assert levels[1].grad is not None
    assert not levels[1].grad.any()


def test_no_anchors():
    head, levels = make(), maps((4, 6), (2, 3))
    logits, deltas = head.at(levels, torch.zeros(2, 0, dtype=torch.int64))
    assert logits.shape == (2, 0)
    assert deltas.shape == (2, 0, 4)
    (logits.sum() + deltas.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_the_cheaper_way():
    levels = maps((10, 10), (5, 5))  # 125 cells
    assert make().computes_less_at(levels, 62)
    assert not make().computes_less_at(levels, 63)
    assert not make(depth=2).computes_less_at(levels, 1)


def test_autocast_keeps_gradients_after_a_pass_without_them():
    head, levels = make(), maps((6, 6))
    index = torch.arange(8)[None].expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            dense, _ = head(levels)
        logits, deltas = head.at(levels, index)
    assert dense.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, dense.gather(1, index), rtol=0.05, atol=0.1)
    (logits.sum() + deltas.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, [8]), "in_channels must be at least 1"),
        ((5, 0, [8]), "per_cell must be at least 1"),
        ((5, 3, []), "conv_dims need at least one"),
        ((5, 3, [8, 0]), "conv_dims must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RPNHead(*arguments)
