import copy

import pytest
import torch

from detpipe.attention import SqueezeExcitation


def test_equals_the_written_out_formula():
    attention, features = SqueezeExcitation(32, reduction=4).double(), torch.randn(2, 32, 5, 7).double()
    w1, b1 = attention.squeeze.weight[:, :, 0, 0], attention.squeeze.bias
    w2, b2 = attention.excite.weight[:, :, 0, 0], attention.excite.bias
    assert w1.shape == (8, 32)
    expected = torch.empty_like(features)
    for image in range(2):
        z = torch.stack([features[image, channel].sum() / 35 for channel in range(32)])  # equation 2
        s = 1 / (1 + torch.exp(-(w2 @ torch.clamp(w1 @ z + b1, min=0) + b2)))  # equation 3
        for channel in range(32):
            expected[image, channel] = s[channel] * features[image, channel]  # equation 4
    torch.testing.assert_close(attention(features), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("bias", "factor"), [(-1e4, 0.0), (0.0, 0.5), (1e4, 1.0)])
def test_gates_decide_the_output(bias, factor):
    attention, features = SqueezeExcitation(16), torch.randn(2, 16, 3, 4)
    torch.nn.init.zeros_(attention.excite.weight)
    torch.nn.init.constant_(attention.excite.bias, bias)
    torch.testing.assert_close(attention(features), factor * features)


def test_width_is_never_below_eight():
    assert SqueezeExcitation(64, 16).squeeze.out_channels == 8
    assert SqueezeExcitation(512, 16).squeeze.out_channels == 32


def test_gradients_are_right():
    attention = SqueezeExcitation(4, reduction=2).double()
    assert torch.autograd.gradcheck(attention, torch.randn(2, 4, 3, 2).double().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    attention, features = SqueezeExcitation(16), torch.rand(2, 16, 40, 50) * 100  # the sums exceed float16
    half = copy.deepcopy(attention).to(dtype)(features.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), attention(features), rtol=0.05, atol=0.5)


def test_images_do_not_mix():
    attention, features = SqueezeExcitation(16), torch.randn(3, 16, 3, 4)
    torch.testing.assert_close(attention(features)[1:2], attention(features[1:2]))


def test_no_images():
    assert SqueezeExcitation(16)(torch.zeros(0, 16, 3, 4)).shape == (0, 16, 3, 4)


@pytest.mark.parametrize("reduction", [0, 17])
def test_bad_reduction(reduction):
    with pytest.raises(ValueError, match=rf"reduction must be in 1..channels \(16\), got {reduction}"):
        SqueezeExcitation(16, reduction)
