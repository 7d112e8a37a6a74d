"""The one face that training and evaluation see of every data set: splits, class names, and loaders of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from detpipe.datasets.augment.augmentation import Augment
from detpipe.datasets.batches import EpochBatches, Locality
from detpipe.datasets.classes import Classes, select_classes
from detpipe.datasets.dataset import Contents, DetectionDataset, Proposals, start_worker
from detpipe.datasets.faults import SHOWN, Faults, OnBad
from detpipe.datasets.formats.class_list import compare_classes
from detpipe.datasets.image_files import ImageFiles
from detpipe.datasets.resize import Resize
from detpipe.datasets.sampling import Presence, Sampling
from detpipe.datasets.stored_proposals import ImageKey, StoredProposals, coco_key
from detpipe.datasets.stratify import divide_annotations
from detpipe.datasets.tiling import Tiling
from detpipe.datasets.workers import PackedBatch, collate
from detpipe.support.errors import DataError
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.terminal import printable
from detpipe.types import Annotations, PixelType, Range

Split = Literal["train", "val", "test"]
_CLASSES_SHOWN = 10


def _shares(split: Mapping[str, float]) -> dict[str, float]:
    """The share of each part of the training split, which keeps what the others leave."""
    if not split:
        return {}
    if set(split) - {"train", "val", "test"} or not set(split) & {"val", "test"}:
        raise ValueError(f"split must give shares for val, test or both, such as {{val: 0.2}}, got {dict(split)}")
    others = {name: split[name] for name in ("val", "test") if name in split}
    train = split.get("train", 1 - sum(others.values()))
    if min(train, *others.values()) <= 0 or abs(train + sum(others.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of split must be above 0 and leave some for train, got {dict(split)}")
    return {"train": train, **others}


@dataclass(frozen=True)
class Loader:
    """How images are loaded and batched.

    Args:
        batch_size: training images a batch.
        eval_batch_size: images a batch in evaluation; null means ``batch_size``.
        num_workers: processes that load images; 0 loads in the main process. The batches do not depend on it.
        timeout: seconds to wait for a batch before a hanging worker is an error; 0 waits forever.
        pin_memory: page-locked memory for faster copies to a GPU; null means where CUDA is available.
        sampling: how often training images of rare classes come; null for each image once an epoch.
    """

    batch_size: int = 8
    eval_batch_size: int | None = None
    num_workers: int = 2
    timeout: float = 0.0
    pin_memory: bool | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        check_whole(1, "loader.", batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        check_whole(0, "loader.", num_workers=self.num_workers)
        check_numbers("must not be negative or infinite", "loader.", timeout=self.timeout)


class LateLoader(DataLoader):
    """Start an iteration when its first batch is asked for.

    Lightning makes the first iterator of a run before it restores a checkpoint and sets the epoch: without this, a
    resumed run would begin with the batches of epoch 0.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch.unpack() if isinstance(batch, PackedBatch) else batch


class SplitData(LightningDataModule, ABC):
    """Base of all data sets: what is read of a split, once, and loaders of batches; a ValueError for a setting that cannot be."""

    def __init__(self, loader: Loader, seed: int, on_bad: OnBad) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.loader, self.seed = loader, seed
        self.on_bad: OnBad = on_bad
        self._of_split: dict[Any, Any] = {}  # split -> what was read of it

    @abstractmethod
    def read(self, split: Any) -> Any:
        """What is known of a split, read once; a DataError if the data are faulty."""

    @property
    def _known(self) -> Any:
        """A split that has been read, else the validation split, which is the quickest to read."""
        return next(iter(self._of_split.values())) if self._of_split else self.read("val")

    @property
    def class_names(self) -> tuple[str, ...]:
        """[K], the name of the first label first; every split agrees on them."""
        return self._known.class_names

    @property
    def num_classes(self) -> int:
        """K, the number of classes that are learned."""
        return len(self.class_names)

    @abstractmethod
    def presence(self, split: Any) -> Presence:
        """Which classes are in which images of a split."""

    def _load(
        self,
        dataset: Dataset[Any],
        sizes: np.ndarray,
        training: bool,
        collate_fn: Callable[[list[Any]], Any],
        smallest: int = 1,
        locality: Locality | None = None,
    ) -> LateLoader:
        """Batch a split, whose images are ``[I, 2]`` height and width; other arguments are those of `EpochBatches`."""
        loader, seed = self.loader, self.seed
        batch_size = loader.batch_size if training else loader.eval_batch_size or loader.batch_size
        plan = loader.sampling.plan(self.presence("train")) if training and loader.sampling is not None else None
        return LateLoader(
            dataset,
            batch_sampler=EpochBatches(sizes, batch_size, seed, training, smallest, locality, plan),
            num_workers=loader.num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available() if loader.pin_memory is None else loader.pin_memory,
            timeout=loader.timeout if loader.num_workers else 0,
            worker_init_fn=start_worker,
            generator=torch.Generator().manual_seed(seed),  # its own, or loading would move the global one
            persistent_workers=loader.num_workers > 0,
        )

    @abstractmethod
    def _dataloader(self, split: Any, training: bool) -> DataLoader: ...

    def train_dataloader(self) -> DataLoader:
        """Batches of the training split, shuffled and drawn by (seed, epoch).

        ``(list of [C, H, W], list of targets)`` for detection; ``([N, 3, size, size] uint8, labels [N], file names)`` for
        classification, where a single image that would be left for the last batch of an epoch is left out. With the trainer's
        ``overfit_batches`` every epoch is the first one again.
        """
        loader = self._dataloader("train", training=True)
        loader.batch_sampler.fixed = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[union-attr]
        return loader

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split, every image once, in an order that never changes, nothing drawn."""
        return self._dataloader("val", training=False)


class DetectionData(SplitData):
    """Base of all data sets for detection: a subclass only says how to `load` a split.

    Args:
        loader: how images are loaded and batched.
        augment: what is done to training images and their boxes; null for nothing.
        seed: decides the order of the batches and every draw of the augmentation, with the epoch.
        on_bad: ``error`` refuses data with any fault; ``skip`` leaves faulty records out and counts them, and decodes
            every image once at the start to find damaged ones.
        proposals: split -> proposal store, whose boxes then ride in the targets of that split; see
            :class:`detpipe.PrecomputedProposals`.
        resize: to which size images are brought by the data workers; null leaves it to the detector.
        channels: of images, and of the first layer of the backbone: 1 is grey, 3 are RGB; others must be those of the files.
        range: the values of black and white in the files, such as ``[0, 65535]``; ``dtype`` takes all that a file's type holds.
            Images are then floating point at full depth. Null: 8 bits, of 16 bits the high byte.
        split: ``{val: 0.2}`` or ``{val: 0.1, test: 0.1}``: these shares of the training split become the validation and test split,
            with equal shares of every class; decided by the content of the images, so that it is the same for everyone, and
            equal images stay together. Null: each split is what its own argument names.
        classes: which classes are kept, renamed and merged; null for all as they are.
        allow_links: whether links and names in lists may lead to images outside of the folder of the data set.
        tiles: how images are cut into tiles, which are images of their own then, in all splits; null for whole images.
    """

    image_key: ImageKey = staticmethod(coco_key)  # what a proposal store calls an image

    def __init__(
        self,
        loader: Loader = Loader(),
        augment: Augment | None = None,
        seed: int = 0,
        on_bad: OnBad = "error",
        proposals: dict[str, str] | None = None,
        resize: Resize | None = None,
        channels: int = 3,
        range: Range = None,
        split: dict[str, float] | None = None,
        classes: Classes | None = None,
        allow_links: bool = False,
        tiles: Tiling | None = None,
    ) -> None:
        super().__init__(loader, seed, on_bad)
        if tiles is not None and proposals:
            raise ValueError("proposals of a store are of whole images: leave out proposals, or set tiles to null")
        if tiles is not None and augment is not None and augment.combine.masks:
            raise ValueError("augment.combine.copy_paste needs masks, which tiles have not: set it, or tiles, to null")
        self.channels, self.pixels = channels, PixelType(channels, range)
        if augment is not None:
            augment.check(self.pixels)
        self.augment, self.resize = augment, resize
        self.outlines = False  # True makes `load` read the outlines of the objects, for conversions
        unknown = sorted(set(proposals or ()) - {"train", "val", "test"})
        if unknown:
            raise ValueError(f"proposals names the splits {unknown}: expected train, val or test, each with a store")
        self.stores = dict(proposals or {})
        self._proposals: dict[Split, Proposals] = {}
        self.shares = _shares(split or {})
        self.classes = classes
        self.allow_links = allow_links
        self.tiles = tiles

    @abstractmethod
    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the annotations of a split, checked; a DataError if the data are faulty, or there is no such split.

        ``faults`` takes all faults, in place of `faults` of the data set.
        """

    def annotations(self, split: Split, faults: Faults | None = None) -> Annotations:
        """The annotations of a split, read once.

        A DataError if the data are faulty, there is no such split, or its classes are not those of the others. ``faults`` is as
        for `load`.
        """
        if split not in self._of_split:
            divided = split in self.shares
            given = () if faults is None else (faults,)
            loaded = self.load("train" if divided else split, *given)
            if self.classes is not None:
                loaded = select_classes(loaded, self.classes)
            parts = divide_annotations(loaded, self.shares) if divided else {split: loaded}
            if self.tiles is not None:
                parts = {name: self.tiles.cut(part) for name, part in parts.items()}
            compare_classes({**self._of_split, split: parts[split]})
            self._of_split.update(parts)
        return self._of_split[split]

    read = annotations

    def faults(self, policy: Literal["error", "skip", "collect"] | None = None, decode: bool = True) -> Faults:
        """What takes the faults of a split, as ``on_bad`` says unless another policy is given; images are read as in training."""
        return Faults(policy or self.on_bad, self.pixels, self.allow_links, decode)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """[K], the ids that the annotation files use, for writing results."""
        return self._known.category_ids

    def setup(self, stage: str) -> None:
        """Read what a stage of Lightning needs, so that faults are found before the first step."""
        splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.annotations(split)
            self.proposals(split)
        if stage == "fit":
            self.dataset("train", augmented=True)  # refuses what the augmentation needs and the data lack

    def proposals(self, split: Split) -> Proposals | None:
        """The precomputed boxes of a split, opened once: image id -> ``[P, 4]`` xyxy in pixels of the image file; None without.

        A DataError if the store cannot be read, lacks images of the split, or is of images of other sizes.
        """
        if split not in self._proposals and split in self.stores:
            self._proposals[split] = StoredProposals(self.stores[split], self.annotations(split), self.image_key)
        return self._proposals.get(split)

    def set_proposals(self, split: Split, proposals: Proposals) -> None:
        """Let precomputed boxes ride in the targets of a split, where flips and crops move them too.

        For each image id ``[P, 4]`` xyxy in pixels of the image file; ``P`` may be 0. A DataError names images that have none, or
        boxes that are not finite ``[P, 4]`` numbers.
        """
        faults: list[str] = []
        for image_id in self.annotations(split).image_ids.tolist():
            boxes = np.asarray(proposals[image_id]) if image_id in proposals else None
            if boxes is None:
                faults.append(f"image id {image_id}: no proposals")
            elif boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
                faults.append(f"image id {image_id}: proposals must be finite [P, 4], got shape {list(boxes.shape)}")
        if faults:
            raise DataError(
                f"{split}: proposals are missing or wrong for {len(faults)} images, such as {'; '.join(faults[:SHOWN])}"
            )
        self._proposals[split] = proposals

    def contents(self, split: Split) -> Contents | None:
        """Where the image files of a split are; None: at their names."""
        return None

    def locality(self, split: Split) -> Locality | None:
        """Which images of a split lie together, so that a batch is made of neighbors; None: it does not matter."""
        return None

    def dataset(self, split: Split, augmented: bool = False) -> DetectionDataset:
        """The images of a split, by ``(epoch, index)``; batches come from the loaders.

        ``augmented`` transforms images and boxes as for training, else they are resized as for evaluation.
        """
        augment = self.augment if augmented else None
        if augment is not None and augment.combine.masks:
            self.with_outlines(split)
        resize = self.resize if augmented or self.resize is None else self.resize.for_evaluation()
        proposals, contents = self.proposals(split), self.contents(split)
        return DetectionDataset(self.annotations(split), augment, self.seed, proposals, contents, resize, self.pixels)

    def reads_outlines(self, split: Split) -> bool:
        """Whether `load` is to read the outlines of the objects as well, if the data set has some."""
        return self.outlines or (split == "train" and self.augment is not None and self.augment.combine.masks)

    def with_outlines(self, split: Split) -> Annotations:
        """The annotations of a split with the outlines of its objects, read once more if they were read without.

        ``segmentations`` is None if the layout has boxes only.
        """
        if self.annotations(split).segmentations is None and not self.outlines:
            self.outlines = True
            del self._of_split[split]
            try:
                self.annotations(split)
            finally:
                self.outlines = False
        return self.annotations(split)

    def test_dataloader(self) -> DataLoader:
        """As :meth:`eval_dataloader`, from the test split; a DataError if none was given."""
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: Split) -> DataLoader:
        """Batches of equal-sized images, every image once, in an order that never changes, nothing augmented."""
        return self._dataloader(split, training=False)

    def describe(self, split: Split) -> str:
        """One line about a split: images, boxes by class, and everything that was clipped or skipped."""
        a = self.annotations(split)
        per_class = np.bincount(a.labels, minlength=a.num_classes + 1)[1:]
        order = np.argsort(-per_class, kind="stable")
        shown = [f"{a.class_names[k]} {per_class[k]}" for k in order[:_CLASSES_SHOWN]]
        if a.num_classes > _CLASSES_SHOWN:
            shown.append(f"{a.num_classes - _CLASSES_SHOWN} more classes {per_class[order[_CLASSES_SHOWN:]].sum()}")
        empty = int((np.diff(a.offsets) == 0).sum())
        flagged = [
            (int(a.iscrowd.sum()), "crowd"),
            (int(a.difficult.sum()), "difficult"),
            (empty, "images without boxes"),
        ]
        remarks = [f"{n} {what}" for n, what in flagged if n]
        remarks += [f"{key}: {n}" for key, n in a.counts.items() if n and ("clipped" in key or "skipped" in key)]
        return printable("; ".join([f"{split}: {len(a)} images, {len(a.boxes)} boxes ({', '.join(shown)})", *remarks]))

    def presence(self, split: Split) -> Presence:
        """Which classes are in which images of a split."""
        return Presence.of(self.annotations(split))

    def _dataloader(self, split: Split, training: bool) -> DataLoader:
        dataset, sizes = self.dataset(split, augmented=training), self.annotations(split).sizes
        return self._load(dataset, sizes, training, collate, locality=self.locality(split))


class FolderData(DetectionData):
    """Base of data sets that lie in a folder, with an argument that names what each split is read from.

    Args:
        root: the folder.
        train: the training split.
        val: the validation split, named as the training split is.
        test: the split for the final test, named in the same way; none by default.
        common: what all data sets have, see :class:`DetectionData`.
    """

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits: dict[Split, Any] = {"train": train, "val": val, "test": test}

    @abstractmethod
    def split_names(self) -> tuple[str, ...]:
        """The splits that the data set holds, by the names that its arguments take."""

    def source_of(self, split: Split, what: str) -> Any:
        """What a split is read from: its argument; the only split that is there, if it is to be divided and none is named.

        A DataError says that the argument expects ``what`` where it is null.
        """
        source = self.splits[split]
        if not source:
            raise DataError(f"no {split} split: set the argument {split} to {what}, such as {split}")
        if self.shares and split == "train" and source in ("train", "train2017"):  # as it is by default
            names = self.split_names()
            return names[0] if len(names) == 1 else source
        return source


def image_files(splits: Iterable[DetectionData]) -> ImageFiles:
    """The image files of the validation splits of some data, whether they lie in shards or not."""
    return ImageFiles((data.annotations("val"), data.contents("val")) for data in splits)
