"""A proposal source that takes its time, and a program that makes a store with it, to be killed."""

import sys
import time
from pathlib import Path

import numpy as np

from detpipe.proposal_files.offline import Item, make_store


class Slow:
    name = "slow"

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    @property
    def settings(self):
        return {"depth": 1}

    def propose(self, image):
        if image.shape[0] < 3:
            raise ValueError(f"the image has {image.shape[0]} rows, too few to segment")
        time.sleep(self.seconds)
        count = int(image.sum()) % 5
        corners = np.arange(count * 4, dtype=np.float32).reshape(count, 4) % 2
        return corners + np.array([0, 0, 1, 1], dtype=np.float32), np.linspace(1, 0.1, count, dtype=np.float32)


class Build:
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        return Slow(self.seconds)


def read(path):
    number = int(path.stem)
    return np.full((2 if number == 13 else 4, 5, 3), number % 11, dtype=np.uint8)


def items(count):
    return [Item(str(number), Path(f"{number}.png")) for number in range(count) if number != 13]


if __name__ == "__main__":
    output, count, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    make_store(Build(0.02), items(count), output, read, workers)
