"""The images and boxes of every layout of the tests."""

from __future__ import annotations

CLASSES = ("ball", "box")
SCENES = {
    "a": [("ball", 10, 20, 40, 60)],
    "b 1": [("box", 5, 5, 30, 25), ("ball", 50, 40, 90, 70)],
    "c": [],
    "d": [("box", 20, 10, 80, 70)],
}
WIDTH, HEIGHT = 100, 80
STEMS = tuple(SCENES)
