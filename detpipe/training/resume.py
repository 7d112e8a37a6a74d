"""What a training goes on from: the newest sound checkpoint of a run, if it was made with the settings and data of now."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from detpipe.support import processes
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean
from detpipe.support.terminal import say
from detpipe.training import checkpoint
from detpipe.training.checkpoint import BEST, LAST, PREVIOUS, plain, settings_by_key

RECORD = "detpipe_training"  # entry of a checkpoint: what it was trained with
# what may be accepted -> the settings that it stands for; of several, the first that fits
CHANGES: dict[str, tuple[str, ...]] = {
    "lr": ("model.optimizer",),
    "schedule": ("model.lr_scheduler", "trainer.max_epochs", "trainer.max_steps"),
    "batch_size": ("data.loader.batch_size",),
    "seed": ("seed_everything",),
    "data": (
        *("data.content", "data.augment", "data.resize", "data.views", "data.proposals"),
        *("data.channels", "data.range", "data.loader.sampling"),
    ),
    "precision": ("trainer.precision",),
    "accumulation": ("trainer.accumulate_grad_batches",),
    "devices": ("processes",),
    "clipping": ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
    "limits": ("trainer.limit_train_batches", "trainer.overfit_batches"),
    "ema": ("ema",),
    "model": ("model",),
}
# settings that older checkpoints do not name -> what they were
ADDED = {"data.channels": 3, "data.range": None, "data.loader.sampling": None}
# changes after which an epoch has other batches
OTHER_BATCHES = ("batch_size", "seed", "data", "accumulation", "devices", "limits")


def record(config: Mapping[str, Any], data: LightningDataModule) -> dict[str, Any]:
    """Note what of a configuration and its data decides about the weights that a training ends with: dotted key -> value."""
    found = {**settings_by_key(plain(dict(config))), "data.content": fingerprint(data)}
    return {key: value for key, value in found.items() if _change(key)}


def fingerprint(data: LightningDataModule) -> str:
    """Sum up the images and boxes of the training and validation split, wherever they lie; the pixels are not read."""
    read = getattr(data, "annotations", None) or data.images  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    for split in ("train", "val"):
        _add(digest, read(split))
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if is_dataclass(value):
        for field in fields(value):
            if field.name not in ("root", "counts", "segmentations"):
                _add(digest, getattr(value, field.name))
    elif isinstance(value, np.ndarray):
        content = value if value.dtype.kind != "U" else np.array([str(one) for one in value], dtype=object)
        digest.update(repr(value.shape).encode())
        digest.update(
            content.tobytes() if content.dtype != object else "\n".join(content).encode("utf-8", "surrogateescape")
        )
    else:
        digest.update(repr(value).encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Found:
    """A checkpoint that has been read."""

    path: Path
    stored: dict[str, Any]  # Lightning's dict
    description: checkpoint.Description


def find(path: str, folder: Path) -> Found | None:
    """Read the checkpoint to go on from, of which ``"last"`` is the newest sound one of the run folder, or None.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, and so are those before it.
    """
    place = folder if path == "last" else Path(path).parent
    candidates = [place / name for name in (LAST, PREVIOUS, BEST) if (place / name).is_file()]
    if path == "last" and not candidates:
        _say(f"no checkpoint in {place}: training starts anew")
        return None
    if path != "last" and Path(path) != place / LAST:
        candidates = [Path(path)]
    faults = []
    for one in candidates or [Path(path)]:
        try:
            found = Found(one, *checkpoint.read(one))
        except CheckpointError as error:
            faults.append(str(error))
            if len(candidates) > 1:
                _say(f"WARNING: {error}", sys.stderr)
            continue
        if faults:
            _say(f"WARNING: going on from {one} (step {found.stored['global_step']}) instead", sys.stderr)
        return found
    raise CheckpointError(faults[0] if len(faults) == 1 else f"{faults[0]}; no other checkpoint in {place} is sound")


def _say(line: str, stream: TextIO | None = None) -> None:
    """Print a line once, of several processes."""
    if processes.is_first():
        say(line, stream)


def read_accepted(text: str | None) -> tuple[str, ...]:
    """Read ``--accept_changes``: names of `CHANGES` with commas between them, or ``all``; an unknown one is a UsageError."""
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in CHANGES and name != "all":
            raise UsageError(
                f"--accept_changes: unknown change {name!r}; expected {', '.join(CHANGES)} or all{did_you_mean(name, CHANGES)}"
            )
    return tuple(CHANGES) if "all" in names else names


def check_changes(stored: dict[str, Any], now: Mapping[str, Any], accepted: Sequence[str], path: Path) -> list[str]:
    """Compare what a checkpoint was trained with and what is configured (row 43 of the fault matrix); a line an accepted change.

    Where accepted changes give an epoch other batches, a checkpoint from within one begins it anew.

    Raises:
        UsageError: changes that were not accepted; all are listed.
    """
    before = stored.get(RECORD)
    if not isinstance(before, dict):
        return [f"{path} does not say which settings it was trained with, so they are not compared with those of now"]
    missing = object()
    lines: dict[str, list[str]] = {}
    for key in sorted({*before, *now}):
        was, is_now = before.get(key, _added(key, missing)), now.get(key, missing)
        if was != is_now:
            told = "other images or boxes" if key == "data.content" else f"was {_told(was)}, is {_told(is_now)}"
            lines.setdefault(_change(key), []).append(f"{key} {told}")
    refused = [name for name in lines if name not in accepted]
    if refused:
        listed = "; ".join(line for name in refused for line in lines[name])
        raise UsageError(
            f"checkpoint {path} was trained with other settings: {listed}. Give those of its config.yaml, or --accept_changes "
            f"{','.join(lines)}"
        )
    epoch = stored["loops"]["fit_loop"]["epoch_progress"]
    if set(lines) & set(OTHER_BATCHES) and epoch["current"]["processed"] < epoch["current"]["ready"]:
        for counts in epoch.values():
            counts.update(dict.fromkeys(counts, counts["processed"]))
        lines["epoch"] = ["the epoch begins anew, since it has other batches"]
    return [line for name in lines for line in lines[name]]


def averaged(stored: dict[str, Any]) -> bool:
    """Whether the weights of a checkpoint are averages (``ema``), beside which those that are trained are stored."""
    return stored.get(RECORD, {}).get("ema") is not None


def _change(key: str) -> str:
    return next((name for name, keys in CHANGES.items() if any(key == k or key.startswith(f"{k}.") for k in keys)), "")


def _added(key: str, otherwise: Any) -> Any:
    return 3 if key.endswith(".in_channels") and key.startswith("model.backbone.") else ADDED.get(key, otherwise)


def _told(value: Any) -> str:
    return "not given" if type(value) is object else shorten(value)


def _form(groups: Sequence[Mapping[str, Any]]) -> list[tuple[bool, int]]:
    """What two optimizers must share for one to take the state of the other: AdamW or SGD, and the parameters of each group."""
    return [("betas" in group, len(group["params"])) for group in groups]


class UseConfigured(Callback):
    """Train on with the learning rates, decay and momentum that are configured: a checkpoint would bring back its own."""

    def __init__(self) -> None:
        self._groups: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is configured, before a checkpoint is loaded; the state of another optimizer is left out."""
        groups = [optimizer.param_groups for optimizer in trainer.optimizers]
        self._groups = [[{k: v for k, v in group.items() if k != "params"} for group in part] for part in groups]
        stored = trainer._checkpoint_connector._loaded_checkpoint.get("optimizer_states", [])
        for place, (before, optimizer) in enumerate(zip(stored, trainer.optimizers, strict=False)):
            if _form(before["param_groups"]) != _form(optimizer.param_groups):
                _say("note: the optimizer begins anew, since it is another one, or has other groups of parameters")
                stored[place] = optimizer.state_dict()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set it again; the learning rate is that of the schedule at this step."""
        if not trainer.fit_loop.is_resuming:
            return
        scheduled = [id(config.scheduler.optimizer) for config in trainer.lr_scheduler_configs]
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                group.update({k: v for k, v in configured.items() if k != "lr" or id(optimizer) not in scheduled})
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR):
                groups = scheduler.optimizer.param_groups
                scheduler.base_lrs = [group["initial_lr"] for group in groups]
                factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
                for group, base, factor in zip(groups, scheduler.base_lrs, factors, strict=True):
                    group["lr"] = base * factor
                scheduler._last_lr = [group["lr"] for group in groups]
