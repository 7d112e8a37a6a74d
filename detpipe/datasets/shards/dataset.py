"""Data in shards: the images of a split in a few large tar files, for sets that are slow to copy or too many files.

::

    root/
      train/index.json            what 'detpipe data shards DATA -o root' writes, a folder a split
      train/arrays.safetensors    the annotations of all images, and where each image lies
      train/shard-000000.tar      image files as they were; any webdataset reader opens them too

An image is read by one seek into its shard, so that batches, draws and the order of evaluation are functions of (seed, epoch) and
the number of processes, whatever the number of workers, as for files; every image comes once an epoch. Where there are more
shards than ``window``, an epoch goes through them a window at a time: only the images of a window are shuffled together.

The root may be a web address: shards are then fetched when they are first read, and a folder keeps as many as it has room for.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.datasets.annotations import check_pixels, count_skipped
from detpipe.datasets.batches import Locality
from detpipe.datasets.datamodule import FolderData, Split
from detpipe.datasets.dataset import Contents, Proposals
from detpipe.datasets.faults import Faults
from detpipe.datasets.fetch import is_remote
from detpipe.datasets.shards.index import INDEX, KEYS, ShardSet, check_files, find_splits, read_index
from detpipe.datasets.shards.read import ShardFiles, ShardProposals
from detpipe.datasets.shards.remote import ShardCache, open_remote
from detpipe.support.errors import DataError
from detpipe.types import Annotations


class Shards(FolderData):
    """Detection data in shards, as ``detpipe data shards`` writes them.

    Args:
        root: the folder that holds a folder for each split; a path, or an address that begins with http://,
            https://, s3:// or gs://.
        train: the training split, the name of its folder.
        window: shards whose images are shuffled together, and read at the same time.
        cache: where shards of an address are kept, and how many of them.
        common: boxes of a store in ``proposals`` take the place of those in the shards.
    """

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        window: int = 8,
        cache: ShardCache = ShardCache(),
        **common: Any,
    ) -> None:
        super().__init__(root, train, val, test, **common)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        for key, given in (("split", self.shares), ("tiles", self.tiles)):
            if given:
                raise ValueError(f"{key} is for image files, not for shards: set it to null, or read the data as files")
        self.window, self.cache = window, cache
        self._files: dict[Split, ShardFiles] = {}
        self._key: str | None = None

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the index of a split, and look whether its shards are there, if it is not on a server."""
        name = self.source_of(split, f"the name of one, a folder in {self.root}")
        if is_remote(self.root):
            files = open_remote(self.root, name, self.cache, self.window)
        else:
            files = ShardFiles(self._read_local(split, name))
        faults = faults or self.faults()
        faults.source = files.shards.folder
        if faults.decodes:
            files = without_unreadable(files, faults)
        self._use_keys(files.shards)
        self._files[split] = files
        return files.shards.annotations

    def _read_local(self, split: Split, name: str) -> ShardSet:
        root = Path(self.root)
        if not (root / name / INDEX).is_file():
            raise DataError(
                f"{root / name}: no shards here, wanted for {split}={name!r}; splits found in {root}: "
                f"{', '.join(self.split_names()) or 'none'}; 'detpipe data shards' writes them"
            )
        shards = read_index(root / name)
        check_files(shards)
        return shards

    def split_names(self) -> tuple[str, ...]:
        """The splits that the root holds; nothing of a server, which has no list."""
        return () if is_remote(self.root) else tuple(find_splits(Path(self.root)))

    def contents(self, split: Split) -> Contents:
        """The image files of a split, in its shards."""
        self.annotations(split)
        return self._files[split]

    def locality(self, split: Split) -> Locality:
        """Which images of a split share a shard."""
        self.annotations(split)
        return Locality(self._files[split].shards.shard, self.window)

    def proposals(self, split: Split) -> Proposals | None:
        """The precomputed boxes of a split: of a store, if one is given, else those in the shards, if there are any."""
        given = super().proposals(split)
        if given is not None:
            return given
        self.annotations(split)
        files = self._files[split]
        places = files.shards.proposals
        return None if places is None else ShardProposals(files, places)

    def _use_keys(self, shards: ShardSet) -> None:
        """Call images in proposal stores as the data set did that the shards were made of."""
        if self._key not in (None, shards.key):
            raise DataError(
                f"{shards.folder / INDEX}: calls images as {shards.key!r}, another split as {self._key!r}: make the shards of "
                "all splits of one data set"
            )
        self._key = shards.key
        self.image_key = KEYS[shards.key]


def without_unreadable(files: ShardFiles, faults: Faults) -> ShardFiles:
    """Read and decode every image of a split, and leave those out, and count them, of which that fails.

    A DataError if the policy is to stop at such an image, or no image is left.
    """
    shards = files.shards
    a = shards.annotations
    lock = threading.Lock()  # images are decoded in threads, and open shards belong to one of them at a time

    def read(row: int) -> tuple[str, bytes]:
        with lock:
            return files.name(row), files.read(row)

    damaged = check_pixels(range(len(a)), read, faults, a.sizes)
    faults.check()
    if not damaged:
        return files
    if len(damaged) == len(a):
        raise DataError(f"{shards.folder}: none of its {len(a)} images can be read")
    kept = shards.subset(np.delete(np.arange(len(a)), damaged))
    lost = len(a.boxes) - len(kept.annotations.boxes)
    counted = count_skipped(kept.annotations, {**faults.skipped, "boxes skipped: image skipped": lost})
    return ShardFiles(replace(kept, annotations=counted), files.opener, files.most_open, files.where)
