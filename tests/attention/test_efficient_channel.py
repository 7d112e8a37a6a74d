import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detpipe.attention import ECA


@pytest.mark.parametrize(("channels", "kernel_size"), [(12, 3), (12, 5), (3, 9), (7, 1)])
def test_equals_the_written_out_formula(channels, kernel_size):
    attention, features = ECA(channels, kernel_size).double(), torch.randn(2, channels, 3, 5).double()
    weight, half = attention.conv.weight[0, 0], kernel_size // 2
    expected = torch.empty_like(features)
    for image in range(2):
        means = [features[image, channel].sum() / 15 for channel in range(channels)]
        for channel in range(channels):
            logit = torch.zeros((), dtype=torch.float64)
            for tap in range(kernel_size):  # equation 6: neighbors that do not exist count as zero
                neighbor = channel + tap - half
                if 0 <= neighbor < channels:
                    logit = logit + weight[tap] * means[neighbor]
            expected[image, channel] = features[image, channel] / (1 + torch.exp(-logit))
    torch.testing.assert_close(attention(features), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("channels", "size"), [(8, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)])
def test_kernel_grows_with_the_channels(channels, size):
    assert ECA(channels).conv.kernel_size == (size,)


@given(st.integers(1, 10_000))
def test_kernel_is_next_to_equation_12(channels):
    (size,) = ECA(channels).conv.kernel_size
    assert size % 2 == 1
    assert abs(size - (math.log2(channels) + 1) / 2) <= 1 + 1e-9
