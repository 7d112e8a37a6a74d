"""Which operators a graph may have that is being exported."""

from __future__ import annotations

from contextvars import ContextVar

# whether only PyTorch's own, so that a process runs it that has neither torchvision nor detpipe
torch_alone: ContextVar[bool] = ContextVar("torch_alone", default=False)
