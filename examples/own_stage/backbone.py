"""A backbone of one's own: a few strided convolutions, and a map of each eighth pixel."""

from torch import Tensor, nn

from detpipe.stages import Backbone, Features, PixelFormat


class SmallNet(Backbone):
    """Three convolutions with stride 2, and one without.

    Args:
        width: C, channels of the map.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.out_channels, self.strides, self.pixel_format = width, {"c3": 8}, PixelFormat()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 16, 2), (16, 32, 2), (32, width, 2), (width, width, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Features:
        """``[N, 3, H, W]`` -> the level c3, ``[N, C, H / 8, W / 8]``."""
        return {"c3": self.layers(images)}
