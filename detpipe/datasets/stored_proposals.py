"""Boxes of a proposal store for the images of a data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from detpipe.proposal_files import ProposalStore
from detpipe.support.errors import DataError
from detpipe.types import Annotations

ImageKey = Callable[[Annotations, int], str]  # annotations and row -> the image's id in a store


def coco_key(annotations: Annotations, row: int) -> str:
    """The id of an image in a store: COCO's number in decimal."""
    return str(int(annotations.image_ids[row]))


def voc_key(annotations: Annotations, row: int) -> str:
    """The id of an image in a store: what VOC's lists call it, the name of its file without the suffix.

    Outside of a folder ``JPEGImages`` several folders may have images of one name: there it is `file_key`.
    """
    path = Path(str(annotations.file_names[row]))
    return path.stem if path.parent.name == "JPEGImages" else file_key(annotations, row)


def file_key(annotations: Annotations, row: int) -> str:
    """The id of an image in a store: its file, relative to the root of the data set, with forward slashes."""
    return str(annotations.file_names[row])


class BoxesByImage(Mapping[int, npt.NDArray[np.float32]], ABC):
    """Boxes of the images of a split, by image id; read when they are asked for."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self._order = np.argsort(annotations.image_ids)

    @abstractmethod
    def boxes(self, row: int) -> npt.NDArray[np.float32]:
        """``[P, 4]`` xyxy in pixels of the image file, best first."""

    def __getitem__(self, image_id: int) -> npt.NDArray[np.float32]:
        ids = self.annotations.image_ids
        place = int(np.searchsorted(ids, image_id, sorter=self._order))
        if place == len(ids) or ids[self._order[place]] != image_id:
            raise KeyError(image_id)
        return self.boxes(int(self._order[place]))

    def __len__(self) -> int:
        return len(self.annotations)

    def __iter__(self) -> Iterator[int]:
        return iter(self.annotations.image_ids.tolist())


class StoredProposals(BoxesByImage):
    """A store, which may hold other images too, as the boxes of a split; ``key`` is what it calls an image.

    A DataError if the store cannot be read, lacks images, or is of images of other sizes.
    """

    def __init__(self, path: str | Path, annotations: Annotations, key: ImageKey) -> None:
        super().__init__(annotations)
        self.store, self._key = ProposalStore(path), key
        faults = self.store.check([key(annotations, row) for row in range(len(annotations))], annotations.sizes)
        if faults:
            raise DataError(" ".join(faults))

    def boxes(self, row: int) -> npt.NDArray[np.float32]:
        """``[P, 4]`` xyxy in pixels of the image file, best first."""
        return self.store[self._key(self.annotations, row)].boxes
