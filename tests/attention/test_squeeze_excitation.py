import pytest
import torch

from detpipe.attention import ConcurrentSqueezeExcitation, SpatialSqueezeExcitation, SqueezeExcitation


def channel_gates(attention, features):
    """Equations 2 and 3 of Hu et al., one image and one channel at a time."""
    w1, b1 = attention.squeeze.weight[:, :, 0, 0], attention.squeeze.bias
    w2, b2 = attention.excite.weight[:, :, 0, 0], attention.excite.bias
    gates = []
    for image in features:
        z = torch.stack([channel.sum() / channel.numel() for channel in image])
        hidden = w1 @ z if b1 is None else w1 @ z + b1
        logits = w2 @ torch.clamp(hidden, min=0)
        gates.append(1 / (1 + torch.exp(-(logits if b2 is None else logits + b2))))
    return torch.stack(gates)


def spatial_gates(attention, features):
    """Section 2.2 of Roy et al., one place at a time."""
    weight, bias = attention.squeeze.weight[0, :, 0, 0], attention.squeeze.bias
    gates = torch.empty(len(features), *features.shape[2:], dtype=features.dtype)
    for image in range(len(features)):
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                gates[image, y, x] = 1 / (1 + torch.exp(-(weight @ features[image, :, y, x] + bias[0])))
    return gates


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_written_out_formula(bias):
    attention, features = SqueezeExcitation(32, 4, bias).double(), torch.randn(2, 32, 5, 7).double()
    assert attention.squeeze.weight.shape == (8, 32, 1, 1)
    expected, gates = torch.empty_like(features), channel_gates(attention, features)
    for image in range(2):
        for channel in range(32):
            expected[image, channel] = gates[image, channel] * features[image, channel]  # equation 4
    torch.testing.assert_close(attention(features), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.gates(features)["channel"][:, :, 0, 0], gates, rtol=1e-12, atol=1e-12)


def test_spatial_form_equals_the_written_out_formula():
    attention, features = SpatialSqueezeExcitation(6).double(), torch.randn(2, 6, 3, 4).double()
    gates = spatial_gates(attention, features)
    expected = torch.empty_like(features)
    for image in range(2):
        for channel in range(6):
            expected[image, channel] = gates[image] * features[image, channel]
    torch.testing.assert_close(attention(features), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention.gates(features)["spatial"][:, 0], gates, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_concurrent_form_equals_the_written_out_formula(combine):
    attention = ConcurrentSqueezeExcitation(8, combine=combine).double()
    features = torch.randn(2, 8, 3, 4).double()  # of both signs: the larger product is not that of the larger gate
    channel, spatial = channel_gates(attention.channel, features), spatial_gates(attention.spatial, features)
    expected = torch.empty_like(features)
    for image in range(2):
        for c in range(8):
            by_channel, by_place = channel[image, c] * features[image, c], spatial[image] * features[image, c]
            expected[image, c] = by_channel + by_place if combine == "sum" else torch.maximum(by_channel, by_place)
    torch.testing.assert_close(attention(features), expected, rtol=1e-12, atol=1e-12)


def test_width_is_never_below_eight():
    assert SqueezeExcitation(64, 16).squeeze.out_channels == 8
    assert SqueezeExcitation(512, 16).squeeze.out_channels == 32
    assert SqueezeExcitation(64, 16, divisor=1).squeeze.out_channels == 4
