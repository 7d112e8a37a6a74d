"""Which kernels a tensor is computed with: chosen by its device, never by the user."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

from torch import Tensor


def kernels_for(tensor: Tensor) -> Literal["triton", "torch"]:
    """Name the kernels for a tensor.

    Args:
        tensor: whatever the operator works on.

    Returns:
        ``"triton"`` on CUDA where Triton is installed, and on every device while Triton's interpreter is switched on
        (``TRITON_INTERPRET=1`` in the environment, for tests without a GPU); else ``"torch"``, PyTorch's own kernels.
    """
    if tensor.is_cuda:
        return "triton" if _triton_is_installed() else "torch"
    return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"


@cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
