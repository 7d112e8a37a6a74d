import pytest
import torch

from detpipe.attention import CBAM


def sigmoid(value):
    return 1 / (1 + torch.exp(-value))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_equals_the_written_out_formula(bias, batch_norm):
    attention = CBAM(6, 2, kernel_size=3, bias=bias, divisor=1, batch_norm=batch_norm).double().eval()
    if batch_norm:
        attention.norm.running_mean.fill_(0.3)
        attention.norm.running_var.fill_(2.0)
    features = torch.randn(2, 6, 3, 4).double()
    w1, w2, kernel = (
        attention.squeeze.weight[:, :, 0, 0],
        attention.excite.weight[:, :, 0, 0],
        attention.spatial.weight[0],
    )
    assert w1.shape == (3, 6)

    def perceptron(z):
        b1, b2 = (attention.squeeze.bias, attention.excite.bias) if bias else (0, 0)
        return w2 @ torch.clamp(w1 @ z + b1, min=0) + b2

    for image in features:
        means = torch.stack([channel.sum() / 12 for channel in image])
        maxima = torch.stack([max(channel.flatten()) for channel in image])
        channel_gates = sigmoid(perceptron(means) + perceptron(maxima))  # equation 2
        gated = torch.stack([gate * channel for gate, channel in zip(channel_gates, image, strict=True)])
        spatial_gates = torch.empty(3, 4, dtype=torch.float64)
        for y in range(3):
            for x in range(4):  # equation 3
                logit = 0 if batch_norm else attention.spatial.bias[0]
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < 3 and 0 <= x + dx < 4:
                            place = gated[:, y + dy, x + dx]
                            logit = (
                                logit
                                + kernel[0, dy + 1, dx + 1] * place.sum() / 6
                                + kernel[1, dy + 1, dx + 1] * max(place)
                            )
                if batch_norm:
                    logit = (logit - 0.3) / (2.0 + attention.norm.eps) ** 0.5
                spatial_gates[y, x] = sigmoid(logit)
        gates = attention.gates(image[None])
        torch.testing.assert_close(gates["channel"][0, :, 0, 0], channel_gates, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gates["spatial"][0, 0], spatial_gates, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(attention(image[None])[0], gated * spatial_gates, rtol=1e-12, atol=1e-12)
