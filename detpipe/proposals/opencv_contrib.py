"""OpenCV's extra modules, which only one of its wheels contains."""

from __future__ import annotations

from types import ModuleType

import cv2

from detpipe.support.errors import UsageError


def ximgproc(source: str) -> ModuleType:
    """Return OpenCV's ``cv2.ximgproc`` for a source; a UsageError says how to install an OpenCV that has it."""
    module = getattr(cv2, "ximgproc", None)
    if module is None:
        raise UsageError(
            f"{source} needs OpenCV's extra modules (cv2.ximgproc), which the installed OpenCV {cv2.__version__} lacks: "
            "pip install --force-reinstall --no-deps opencv-contrib-python-headless (in the place of opencv-python-headless)"
        )
    return module
