import math

import pytest
import torch

from detpipe.attention import SelectiveKernel
from detpipe.attention.selective_kernel import SqueezedBatchNorm


def normalized(norm, values):
    return (values - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5 * norm.weight + norm.bias


def shaken(attention):
    """Give every normalization statistics and weights that matter."""
    for module in attention.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
    return attention


def convolved(weight, image, stride, dilation, groups):
    """A 3 x 3 convolution of ``[C, H, W]`` as a sum over taps."""
    outputs, per_group, _, _ = weight.shape
    height, width = (math.ceil(side / stride) for side in image.shape[1:])
    result = torch.zeros(outputs, height, width, dtype=image.dtype)
    for output in range(outputs):
        first = output // (outputs // groups) * per_group
        for y in range(height):
            for x in range(width):
                for i in range(3):
                    for j in range(3):
                        row, column = y * stride + (i - 1) * dilation, x * stride + (j - 1) * dilation
                        if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                            cell = image[first : first + per_group, row, column]
                            result[output, y, x] += weight[output, :, i, j] @ cell
    return result


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branches": 3},
        {"stride": 2},
        {"dilation": 2},
        {"branches": 3, "stride": 2, "dilation": 2},
        {"split_input": True, "groups": 1},
        {"branches": 1},
    ],
    ids=str,
)
def test_equals_the_written_out_formula(options):
    options = {"groups": 2, "reduction": 2, "min_width": 3, **options}
    attention = shaken(SelectiveKernel(4, 6, **options)).double().eval()
    features = torch.randn(2, 4, 5, 4).double()
    stride, dilation, count = options.get("stride", 1), options.get("dilation", 1), options.get("branches", 2)
    weights = attention.gates(features)["branch"]
    for image in range(2):
        maps = []
        for index, branch in enumerate(attention.branches):  # split: kernels of side 2 k + 1 as 3 x 3 with dilation k
            part = features[image].chunk(count)[index] if options.get("split_input") else features[image]
            out = convolved(branch[0].weight, part, stride, dilation * (index + 1), options["groups"])
            norm = branch[1]
            maps.append(
                torch.stack([torch.clamp(c, min=0) for c in normalized(norm, out.permute(1, 2, 0)).permute(2, 0, 1)])
            )
        fused = sum(maps)  # equation 1
        s = torch.stack([channel.sum() / channel.numel() for channel in fused])  # equation 2
        z = torch.clamp(normalized(attention.norm, attention.squeeze.weight[:, :, 0, 0] @ s), min=0)  # equation 3
        assert len(z) == 3
        logits = (attention.select.weight[:, :, 0, 0] @ z).reshape(count, 6)
        expected = torch.zeros_like(fused)
        for channel in range(6):
            total = sum(math.exp(logits[m, channel]) for m in range(count))
            for m in range(count):  # equations 5 and 6
                share = math.exp(logits[m, channel]) / total
                assert weights[image, m, channel].item() == pytest.approx(share, rel=1e-9)
                expected[channel] += share * maps[m][channel]
        torch.testing.assert_close(attention(features)[image], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "branches", "training"), [({}, 2, True), ({"split_input": True}, 3, False)])
def test_gradients_are_right(kind, branches, training):
    attention = SelectiveKernel(6, 4, branches=branches, reduction=2, groups=1, min_width=3, **kind)
    shaken(attention).double().train(training)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    before = {name: buffer.clone() for name, buffer in attention.named_buffers()}

    def run(features, *parameters):
        state = {
            **{name: buffer.clone() for name, buffer in before.items()},
            **dict(zip(names, parameters, strict=True)),
        }
        return torch.func.functional_call(attention, state, features)

    assert torch.autograd.gradcheck(run, (torch.randn(3, 6, 3, 2).double().requires_grad_(), *parameters))


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 8)), (2, (6, 7)), (3, (1, 1)), (3, (5, 8))])
def test_size_of_the_output(stride, size):
    output = SelectiveKernel(32, 64, stride=stride).eval()(torch.zeros(2, 32, *size))
    assert output.shape == (2, 64, *(math.ceil(side / stride) for side in size))


def test_one_image_in_training():
    attention = shaken(SelectiveKernel(32, 32))
    stored = attention.norm.running_mean.clone(), attention.norm.running_var.clone()
    features = torch.randn(1, 32, 5, 7)
    output = attention(features)
    output.sum().backward()
    assert output.isfinite().all()
    assert attention.squeeze.weight.grad.abs().sum() > 0
    torch.testing.assert_close((attention.norm.running_mean, attention.norm.running_var), stored, rtol=0, atol=0)
    attention(torch.randn(2, 32, 5, 7))
    assert not torch.equal(attention.norm.running_mean, stored[0])


def test_squeezed_norm_is_batch_norm_for_more_than_one_image():
    ours, plain, values = SqueezedBatchNorm(4), torch.nn.BatchNorm2d(4), torch.randn(3, 4, 1, 1)
    torch.testing.assert_close(ours(values), plain(values))
    torch.testing.assert_close(ours.eval()(values), plain.eval()(values))
    one = ours.train()(values[:1])  # by the statistics that the three have left
    torch.testing.assert_close(one, plain(values[:1]))


def test_widths():
    assert SelectiveKernel(64, 64).squeeze.out_channels == 32  # L of the paper
    assert SelectiveKernel(64, 1024, reduction=16).squeeze.out_channels == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 33}, r"must be multiples of groups \(32\), got 33 and 64"),
        ({"out_channels": 80}, r"must be multiples of groups \(32\), got 32 and 80"),
        (
            {"split_input": True},
            r"in_channels in 2 parts and out_channels must be multiples of groups \(32\), got 32 and 64",
        ),
        ({"branches": 3, "split_input": True, "groups": 1}, "in_channels in 3 parts .* got 32 and 64"),
        ({"reduction": 65}, r"reduction must be in 1..out_channels \(64\), got 65"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"branches": 0}, "branches must be at least 1, got 0"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"min_width": 0}, "min_width must be at least 1, got 0"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectiveKernel(**{"in_channels": 32, "out_channels": 64, **arguments})
