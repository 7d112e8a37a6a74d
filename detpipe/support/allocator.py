"""Let a process on Linux keep the memory that it frees, instead of giving it back and asking anew at every step.

The C library returns each large tensor's pages to the system when the tensor is freed; the next step gets new ones,
which the system zeroes first: a sixth of the time of a training step on a CPU (``benchmarks/freed_memory.py``). Only
the commands call this: a library has no business in its user's allocator.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of glibc's mallopt(3)
_KEEP, _PAD = 2**31 - 1, 256 * 2**20  # bytes


def peak_memory() -> float | None:
    """The most memory that this process has held so far, in MiB; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_gpu_memory() -> float | None:
    """The most memory in MiB that PyTorch has given out on the current GPU; None where this process has used none."""
    torch = sys.modules.get("torch")  # what has not been imported has used none, and takes its time
    return torch.cuda.max_memory_allocated() / 2**20 if torch is not None and torch.cuda.is_initialized() else None


def keep_freed_memory() -> bool:
    """Keep up to 2 GiB of freed memory in the process, and take more in steps of 256 MiB.

    False where the C library is not glibc or does not take the settings, and nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEEP), (_TOP_PAD, _PAD))
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(taken)
