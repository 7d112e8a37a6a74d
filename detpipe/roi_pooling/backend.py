"""Which kernels a tensor is computed with: chosen by its device, never by the user."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from torch import Tensor

# constants, so that the choice can be compiled
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels_for(tensor: Tensor) -> Literal["triton", "torch"]:
    """Name the kernels for a tensor.

    Args:
        tensor: whatever the operator works on.

    Returns:
        ``"triton"`` on CUDA where Triton is installed, and on every device while Triton's interpreter is switched on
        (``TRITON_INTERPRET=1`` in the environment, for tests without a GPU); else ``"torch"``, PyTorch's own kernels.
    """
    return "triton" if TRITON_IS_INSTALLED and (tensor.is_cuda or IS_INTERPRETED) else "torch"
