"""How a backbone is trained: its kind of normalization, what stays frozen, checkpointed activations, dropped paths.

Frozen batch normalization: He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385, appendix A.
Synchronized: Peng et al., "MegDet", 2017, arXiv 1711.07240. Group normalization: Wu and He, 2018, arXiv 1803.08494.
Checkpointing: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174.
Dropped paths: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv 1603.09382.

Deviations:
1. Channels that are no multiple of 32 are normalized in fewer groups: the largest divisor of them up to 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from detpipe.attention.selective_kernel import SqueezedBatchNorm
from detpipe.support.errors import UsageError
from detpipe.support.numbers import check_numbers
from detpipe.support.suggest import did_you_mean

Norm = Literal["batch", "frozen", "sync", "group"]
GROUPS = 32  # of group normalization, as published
BATCH_NORM = nn.modules.batchnorm._BatchNorm
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Regime:
    """How a backbone is trained.

    Args:
        norm: "batch" normalizes by the batch at hand; "frozen" by the stored statistics, with weights that stay (advised with
            pretrained weights and small batches); "sync" by the batches of all processes (on GPUs; in a single process the
            same as "batch"; PyTorch refuses it on CPUs in several processes); "group" each image by itself, which needs
            weights of its own.
        frozen: parts whose weights and statistics stay, by name.
        checkpointing: compute activations a second time in the backward pass instead of storing them.
        drop_path: probability that training leaves out the residual branch of the last block, for each image; it rises
            linearly from the first block on.
        eps: added to variances by every normalization of batches or groups; None keeps what the network has. 0 is for "frozen"
            alone.

    Raises:
        ValueError: an argument outside these choices.
    """

    norm: Norm = "batch"
    frozen: tuple[str, ...] = ()
    checkpointing: bool = False
    drop_path: float = 0.0
    eps: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {list(get_args(Norm))}, got {self.norm!r}")
        if isinstance(self.frozen, str) or not all(isinstance(name, str) for name in self.frozen):
            raise ValueError(f"frozen must be a list of names, got {self.frozen!r}")
        check_numbers("must be in 0..1, below 1", drop_path=self.drop_path)
        if self.eps is not None and not (0 < self.eps < 1 or (self.eps == 0 and self.norm == "frozen")):
            raise ValueError(f"eps must be in 0..1, and 0 for norm 'frozen' alone; got {self.eps} for {self.norm!r}")
        object.__setattr__(self, "frozen", tuple(self.frozen))


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """Share out a drop-path rate, that of the last block, over L blocks: ``rate * l / L`` for block l in 1..L.

    Example:
        >>> drop_path_rates(0.2, 4)
        [0.05, 0.1, 0.15, 0.2]
    """
    return [round(rate * (index + 1) / blocks, 12) for index in range(blocks)]


def convert_norm(network: nn.Module, norm: Norm, eps: float | None = None) -> nn.Module:
    """Replace every 2-d batch normalization by another kind, in place; weights and bias stay the same parameters.

    Frozen normalization stays as it is, and "batch" changes nothing. ``eps`` is set on every normalization of batches or groups;
    None leaves it. Returned is the network: a new module only where it is itself a batch normalization.

    Raises:
        ValueError: a kind of batch normalization that cannot be replaced without loss.
    """
    for name, module in list(network.named_modules()) if norm != "batch" else []:
        if isinstance(module, nn.BatchNorm2d):
            converted = _converted(module, norm, name).train(module.training)
            parent, _, child = name.rpartition(".")
            if name:
                setattr(network.get_submodule(parent), child, converted)
            else:
                network = converted
    if eps is not None:
        for module in network.modules():
            if isinstance(module, nn.GroupNorm) or hasattr(module, "running_var"):  # of whatever library
                module.eps = eps  # pyright: ignore
    return network


def _converted(module: nn.BatchNorm2d, norm: Norm, name: str) -> nn.Module:
    activated = hasattr(module, "act") and hasattr(module, "drop")  # timm's batch norm with an activation in it
    if type(module) not in (nn.BatchNorm2d, SqueezedBatchNorm) and not activated:
        raise ValueError(f"{name}: a {type(module).__name__} cannot become norm {norm!r}; only nn.BatchNorm2d can")
    if norm == "frozen" and (module.running_mean is None or module.running_var is None):
        raise ValueError(f"{name}: a batch norm without statistics cannot be frozen; leave norm 'batch'")
    converted = {"frozen": _frozen_norm, "sync": _sync_norm, "group": _group_norm}[norm](module, activated)
    if activated:
        converted.act, converted.drop = module.act, module.drop
    return converted


def _frozen_norm(module: nn.BatchNorm2d, activated: bool) -> nn.Module:
    kind: type[nn.Module] = FrozenBatchNorm2d
    if activated:
        from timm.layers.norm_act import FrozenBatchNormAct2d

        kind = FrozenBatchNormAct2d
    frozen = kind(module.num_features, eps=module.eps).to(module.running_mean)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for key in ("weight", "bias", "running_mean", "running_var"):
        stored = getattr(module, key)
        if stored is not None:
            getattr(frozen, key).copy_(stored.detach())
    return frozen


def _sync_norm(module: nn.BatchNorm2d, activated: bool) -> nn.Module:
    kind: type[nn.Module] = nn.SyncBatchNorm
    if activated:
        from timm.layers.norm_act import SyncBatchNormAct

        kind = SyncBatchNormAct
    elif isinstance(module, SqueezedBatchNorm):
        kind = SqueezedSyncBatchNorm
    sync = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    sync.weight, sync.bias = module.weight, module.bias
    for key in STATISTICS:
        setattr(sync, key, getattr(module, key))
    return sync


def _group_norm(module: nn.BatchNorm2d, activated: bool) -> nn.Module:
    channels = module.num_features
    groups = max(groups for groups in range(1, min(GROUPS, channels) + 1) if channels % groups == 0)
    if isinstance(module, SqueezedBatchNorm):  # of one cell: in many groups little would be left to normalize
        groups = 1
    if activated:
        from timm.layers.norm_act import GroupNormAct

        group: nn.GroupNorm = GroupNormAct(channels, groups, eps=module.eps, affine=module.affine)
    else:
        group = nn.GroupNorm(groups, channels, module.eps, module.affine)
    group.weight, group.bias = module.weight, module.bias
    return group


class SqueezedSyncBatchNorm(nn.SyncBatchNorm):
    """Synchronized normalization of maps of one cell; a single image in a single process uses the stored statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``."""
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        if self.training and alone and input.numel() == self.num_features:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def find_modules(network: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Look modules up by names such as ``features.0``; a UsageError where one has nothing to freeze, near names are listed."""
    known = {
        name: module for name, module in network.named_modules() if name and [*module.parameters(), *module.buffers()]
    }
    for name in names:
        if name not in known:
            raise UsageError(f"frozen: no parameters under {name!r}{did_you_mean(name, known)}")
    return [known[name] for name in names]


def freeze(modules: Iterable[nn.Module]) -> None:
    """Keep weights, statistics and outputs of modules: no gradients, and evaluation mode; call it after every ``train()``."""
    for module in modules:
        module.requires_grad_(False)
        module.eval()


def checkpointed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Compute ``module(*inputs)``, and compute it again in the backward pass instead of storing activations.

    Random numbers are the same both times, and statistics of batch normalization move once. In evaluation and without
    gradients it is a plain call. A module that writes into its input is a ValueError.
    """
    if not (module.training and torch.is_grad_enabled()):
        return module(*inputs)
    return recomputed(module, [module], *inputs)


@_disable_dynamo  # the compiler takes no contexts around a second computation, and would fail
def recomputed(function: Callable[..., Any], modules: Iterable[nn.Module], *inputs: Any, **options: Any) -> Any:
    """Compute ``function(*inputs, **options)`` now and in the backward pass; lists among the inputs are not changed.

    ``modules`` are those that it calls, whose statistics move once.

    Raises:
        ValueError: the function writes into its inputs, which the second computation needs as they were.
    """
    lists = [value if isinstance(value, list | tuple) else [value] for value in inputs]
    tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
    versions = [tensor._version for tensor in tensors]
    statistics = _Statistics(modules)

    def compute(*given: Any) -> Any:
        return function(*(list(value) if isinstance(value, list) else value for value in given), **options)

    output = checkpoint(compute, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics))
    if versions != [tensor._version for tensor in tensors]:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(f"{name} writes into its input and cannot be computed twice; set checkpointing to false")
    return output


class _Statistics(AbstractContextManager[None]):
    """Statistics of batch normalization as they are now, for a second computation; what it does to them is discarded."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        norms = {norm for module in modules for norm in module.modules() if isinstance(norm, BATCH_NORM)}
        self.snapshots = [
            (norm, {key: norm._buffers[key].clone() for key in STATISTICS})  # pyright: ignore[reportOptionalMemberAccess]
            for norm in norms
            if norm.training and norm.track_running_stats
        ]
        self.outer: list[dict[str, Tensor | None]] = []

    def __enter__(self) -> None:
        self.outer = [{key: norm._buffers[key] for key in STATISTICS} for norm, _ in self.snapshots]
        for norm, snapshot in self.snapshots:
            norm._buffers.update({key: value.clone() for key, value in snapshot.items()})

    def __exit__(self, *exception: object) -> None:
        for (norm, _), buffers in zip(self.snapshots, self.outer, strict=True):
            norm._buffers.update(buffers)


def names_within(frozen: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Put names of stages to freeze in the order of those that there are; a UsageError for an unknown one lists near names."""
    for name in frozen:
        if name not in known:
            raise UsageError(f"frozen: no stage {name!r}{did_you_mean(name, known)}; expected some of {list(known)}")
    return tuple(name for name in known if name in frozen)
