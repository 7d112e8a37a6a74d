"""What holds for every attention module, and the parts that they share."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from detpipe.attention import (
    CBAM,
    ECA,
    ConcurrentSqueezeExcitation,
    Gating,
    SelectiveKernel,
    SpatialSqueezeExcitation,
    SqueezeExcitation,
)
from detpipe.attention.base import squeeze, squeezed_width

GATING = {
    "se": lambda channels: SqueezeExcitation(channels, reduction=2),
    "sse": SpatialSqueezeExcitation,
    "scse_sum": ConcurrentSqueezeExcitation,
    "scse_max": lambda channels: ConcurrentSqueezeExcitation(channels, combine="max"),
    "eca": ECA,
    "cbam": lambda channels: CBAM(channels, reduction=2),
    "cbam_norm": lambda channels: CBAM(channels, reduction=2, batch_norm=True),
}
ALL = {
    **GATING,
    "sk": lambda channels: SelectiveKernel(channels, channels, reduction=2, groups=2),
    "sk_split": lambda channels: SelectiveKernel(channels, channels, reduction=2, groups=2, split_input=True),
}
gating = pytest.mark.parametrize("make", GATING.values(), ids=GATING)
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


@every
def test_gradients_are_right(make):
    attention, features = make(4).double(), torch.randn(2, 4, 3, 2).double().requires_grad_()
    inputs = (features, *attention.parameters())
    names = [name for name, _ in attention.named_parameters()]

    def run(features, *parameters):
        return torch.func.functional_call(attention.eval(), dict(zip(names, parameters, strict=True)), features)

    assert torch.autograd.gradcheck(run, inputs)


@gating
def test_adding_to_a_shortcut_is_the_same_as_the_sum(make):
    attention, shortcut, features = make(8).double().eval(), *torch.randn(2, 3, 8, 4, 5).double()
    torch.testing.assert_close(attention(features, shortcut), shortcut + attention(features))
    inputs = shortcut[:1, :, :2, :2].clone().requires_grad_(), features[:1, :, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda shortcut, features: attention(features, shortcut), inputs)


@gating
def test_weights_are_what_the_features_are_multiplied_by(make):
    attention, features = make(8).eval(), torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(attention(features), features * attention.weights(features).expand_as(features))


@every
def test_gates_are_shares(make):
    attention, features = make(8).eval(), 10 * torch.randn(3, 8, 4, 5)
    gates = attention.gates(features)
    shapes = {"channel": (3, 8, 1, 1), "spatial": (3, 1, 4, 5), "branch": (3, 2, 8, 1, 1)}
    assert gates
    for name, gate in gates.items():
        assert gate.shape == shapes[name]
        assert 0 <= gate.min() < gate.max() <= 1


@every
@pytest.mark.parametrize("training", [True, False])
def test_no_images(make, training):
    attention, features = make(8).train(training), torch.zeros(0, 8, 4, 5, requires_grad=True)
    output = attention(features)
    assert output.shape == (0, 8, 4, 5)
    output.sum().backward()
    assert features.grad.shape == (0, 8, 4, 5)
    assert all(len(gate) == 0 for gate in attention.gates(features).values())
    assert all(buffer.isfinite().all() for buffer in attention.buffers())


@every
def test_maps_of_one_cell(make):
    attention, features = make(8).eval(), torch.randn(2, 8, 1, 1)
    # one cell is its own mean and maximum, so that a larger map of the same cell everywhere has the same channel gates
    everywhere = attention.gates(features.expand(-1, -1, 3, 3))
    for name, gate in attention.gates(features).items():
        if name == "channel":
            torch.testing.assert_close(gate, everywhere[name])
    assert attention(features).shape == (2, 8, 1, 1)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make, dtype):
    attention, features = make(8).eval(), 100 * torch.rand(2, 8, 40, 50)  # the sum of a channel exceeds float16
    assert features.sum((2, 3)).min() > torch.finfo(torch.float16).max
    features, attention = features.to(dtype), attention.to(dtype)
    half, exact = attention(features), copy.deepcopy(attention).float()(features.float())
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.15, atol=1.0)  # a logit near 20 is rounded by up to 0.1


@every
def test_mixed_precision(make):
    attention, features = make(8).eval(), torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(features)
        if isinstance(attention, Gating):
            for left in (features, features.bfloat16()):
                total = attention(features.bfloat16(), left)
                torch.testing.assert_close(total.float(), features + mixed, rtol=0.05, atol=0.1)
    torch.testing.assert_close(mixed.float(), attention(features), rtol=0.05, atol=0.05)


@every
def test_channels_last_gives_the_same(make):
    attention, features = make(8).eval(), torch.randn(2, 8, 6, 5)
    output = attention(features.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, attention(features))
    if isinstance(attention, Gating):
        assert output.is_contiguous(memory_format=torch.channels_last)


@gating
def test_can_be_traced(make):
    attention, features = make(8).eval(), torch.randn(2, 8, 6, 5)
    traced = torch.fx.symbolic_trace(nn.Sequential(attention))
    torch.testing.assert_close(traced(features), attention(features), rtol=0, atol=0)
    half = features.half()  # traced in one precision, used in another
    torch.testing.assert_close(traced.half()(half), attention.half()(half), rtol=0, atol=0)


TWO = {"fc1": "squeeze", "fc2": "excite"}
KERNELS = {"attn.fc_reduce": "squeeze", "attn.bn": "norm", "attn.fc_select": "select"}
KERNELS |= {f"paths.{i}.conv": f"branches.{i}.0" for i in range(3)} | {
    f"paths.{i}.bn": f"branches.{i}.1" for i in range(3)
}
MODULE = {"channel.fc1": "squeeze", "channel.fc2": "excite", "spatial.conv.conv": "spatial", "spatial.conv.bn": "norm"}
PEERS = [
    *(
        (
            "timm.layers",
            "SEModule",
            {"channels": c, "rd_ratio": 1 / r, "bias": bias},
            TWO,
            SqueezeExcitation(c, r, bias),
        )
        for c, r in ((64, 16), (96, 4), (24, 2))
        for bias in (True, False)
    ),
    *(
        (
            "torchvision.ops",
            "SqueezeExcitation",
            {"input_channels": c, "squeeze_channels": w},
            TWO,
            SqueezeExcitation(c, c // w),
        )
        for c, w in ((64, 8), (96, 24))
    ),
    *(("timm.layers", "EcaModule", {"channels": c}, {"conv": "conv"}, ECA(c)) for c in (16, 64, 256)),
    *(
        (
            *("timm.layers.cbam", "CbamModule"),
            {"channels": c, "rd_ratio": 1 / r, "spatial_kernel_size": k, "mlp_bias": bias},
            *(MODULE, CBAM(c, r, k, bias, divisor=1, batch_norm=True)),
        )
        for c, r, k in ((64, 16, 7), (32, 4, 3))
        for bias in (True, False)
    ),
    *(
        (
            *("timm.layers", "SelectiveKernel"),
            {"in_channels": 96, "rd_channels": 32, "groups": 8, "split_input": False, **theirs},
            *(KERNELS, SelectiveKernel(96, 96, **{"groups": 8, **ours})),
        )
        for ours, theirs in (
            ({}, {}),
            ({"stride": 2}, {"stride": 2}),
            ({"dilation": 2}, {"dilation": 2}),
            ({"branches": 3}, {"kernel_size": [3, 5, 7]}),
            ({"split_input": True}, {"split_input": True}),
            (
                {"split_input": True, "branches": 3, "groups": 1},
                {"split_input": True, "kernel_size": [3, 5, 7], "groups": 1},
            ),
        )
    ),
]


@pytest.mark.parametrize(("library", "kind", "arguments", "names", "ours"), PEERS)
def test_equals_what_others_have_built(library, kind, arguments, names, ours):
    peer = getattr(pytest.importorskip(library), kind)(**arguments).eval()
    for tensor in (
        tensor
        for module in peer.modules()
        if isinstance(module, nn.BatchNorm2d)
        for tensor in module.state_dict().values()
    ):
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    renamed = {}
    for key, value in peer.state_dict().items():
        layer, _, tensor = key.rpartition(".")
        renamed[f"{names[layer]}.{tensor}"] = value
    ours.eval().load_state_dict(renamed)
    features = 5 * torch.randn(2, arguments.get("channels", arguments.get("input_channels", 96)), 5, 7)
    torch.testing.assert_close(ours(features), peer(features), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        *((make, (0,), "channels must be at least 1, got 0") for make in (SqueezeExcitation, SpatialSqueezeExcitation)),
        *((make, (0,), "channels must be at least 1, got 0") for make in (ConcurrentSqueezeExcitation, ECA, CBAM)),
        *(
            (make, (16, 17), r"reduction must be in 1..channels \(16\), got 17")
            for make in (SqueezeExcitation, ConcurrentSqueezeExcitation, CBAM)
        ),
        *((ECA, (16, size), f"kernel_size must be (odd|at least 1), got {size}") for size in (0, 2, -1)),
        *((CBAM, (16, 4, size), f"kernel_size must be (odd|at least 1), got {size}") for size in (0, 2, -1)),
        (ConcurrentSqueezeExcitation, (16, 2, "mean"), "combine must be 'sum' or 'max', got 'mean'"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squeeze_keeps_the_type_and_does_not_overflow(dtype):
    squeezed = squeeze(torch.full((2, 3, 40, 50), 256.0, dtype=dtype))  # sums of 512,000
    assert squeezed.dtype == dtype
    assert squeezed.tolist() == [[[[256.0]]] * 3] * 2


@given(st.integers(1, 4096), st.data())
def test_squeezed_width_is_the_nearest_multiple(channels, data):
    reduction, divisor = data.draw(st.integers(1, channels)), data.draw(st.integers(1, 32))
    width, exact = squeezed_width(channels, reduction, divisor), channels / reduction
    assert width % divisor == 0
    assert width >= divisor
    if divisor == 1:
        assert width <= exact < width + 1
    else:
        assert abs(width - exact) <= divisor / 2 or width == divisor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "channels must be at least 1, got 0"),
        ((16, 0), "reduction must be at least 1, got 0"),
        ((16, 17), r"reduction must be in 1..channels \(16\), got 17"),
        ((16, 4, 0), "divisor must be at least 1, got 0"),
    ],
)
def test_bad_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        squeezed_width(*arguments)
