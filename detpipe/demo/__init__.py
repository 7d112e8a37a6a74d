"""The embedded demo set: scenes of real handwritten digits, generated on first use, and the digits cut out of them."""

from detpipe.demo.dataset import Demo, DemoScenes, write_demo
from detpipe.demo.digits import DemoDigits, write_digits

__all__ = ["Demo", "DemoDigits", "DemoScenes", "write_demo", "write_digits"]
