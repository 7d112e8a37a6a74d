"""Random operands for the tests of the operators."""

import random

import torch


def random_case(seed, channels=(1, 3, 8)):
    """Features, boxes [R, 5], output size and spatial scale: odd shapes, tiny and huge boxes, boxes over the border."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    dtype = torch.float64 if seed % 2 else torch.float32
    images, height, width = generator.randint(1, 3), generator.randint(1, 24), generator.randint(1, 24)
    features = torch.randn(images, generator.choice(channels), height, width, dtype=dtype)
    count, scale = generator.randint(1, 12), generator.choice([1.0, 0.5, 0.25, 1 / 16, 0.3])
    extent = torch.tensor([width, height], dtype=dtype) / scale
    center = (torch.rand(count, 2, dtype=dtype) * 1.6 - 0.3) * extent
    half = torch.exp(torch.randn(count, 2, dtype=dtype) * 1.5) * extent / 6
    if generator.random() < 0.3:  # whole numbers, where rounding decides
        center, half = center.round(), half.round().clamp(min=1)
    image = torch.randint(0, images, (count, 1)).to(dtype)
    output_size = generator.choice([1, 2, 7, (3, 5), (4, 1)])
    return features, torch.cat((image, center - half, center + half), dim=1), output_size, scale


def tolerance(dtype):
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}


def backward(operator, features):
    """The result, and its gradient to the features for a gradient that tells the elements apart."""
    leaf = features.detach().clone().requires_grad_()
    pooled = operator(leaf)
    torch.manual_seed(1)
    pooled.backward(torch.randn_like(pooled, memory_format=torch.contiguous_format))
    return pooled.detach(), leaf.grad


# away from kinks: no edge or sample of these falls on a cell's center
SMOOTH = torch.tensor(
    [[0, 1.13, 0.71, 5.27, 4.9], [1, -2.1, -1.3, 3.3, 9.2], [1, 2.2, 1.1, 2.9, 1.83]], dtype=torch.float64
)


def box_operator(operator):
    """The operator as a function of features and box coordinates alone, for gradcheck."""
    return lambda features, sides: operator(features, torch.cat((SMOOTH[:, :1], sides), dim=1))


def whole_boxes(count, seed):
    """Boxes ``[R, 5]`` of one image whose edges are whole cells, some over the border of a map of 9 x 9."""
    torch.manual_seed(seed)
    low = torch.randint(-2, 7, (count, 2))
    return torch.cat((torch.zeros(count, 1), low, low + torch.randint(2, 7, (count, 2))), dim=1).double()


def difference(operator, boxes, column, before, after):
    """The slope of a weighted sum of what is pooled, in one number of each box at once; of a piecewise linear function exact."""
    step = torch.zeros_like(boxes)
    step[:, column] = 1e-4
    with torch.no_grad():
        high, low = (operator(boxes + factor * step) for factor in (after, before))
    return (high - low).flatten(1).sum(1) / ((after - before) * 1e-4)
