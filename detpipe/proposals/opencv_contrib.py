"""OpenCV's extra modules, which only one of its wheels contains."""

from __future__ import annotations

from types import ModuleType

import cv2

from detpipe.support.errors import UsageError


def ximgproc(source: str) -> ModuleType:
    """Return OpenCV's module of extended image processing.

    Args:
        source: what needs it.

    Returns:
        ``cv2.ximgproc``.

    Raises:
        UsageError: the OpenCV that is installed has none; how to install one that has is said.
    """
    module = getattr(cv2, "ximgproc", None)
    if module is None:
        raise UsageError(
            f"{source} needs OpenCV's extra modules (cv2.ximgproc), which the installed OpenCV {cv2.__version__} lacks: "
            "pip install --force-reinstall --no-deps opencv-contrib-python-headless (in the place of opencv-python-headless)"
        )
    return module
