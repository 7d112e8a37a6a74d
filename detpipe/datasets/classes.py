"""Which classes of a data set are learned, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detpipe.datasets.annotations import count_skipped
from detpipe.support.errors import DataError
from detpipe.support.suggest import did_you_mean
from detpipe.types import Annotations


@dataclass(frozen=True)
class Classes:
    """Classes to rename, to merge and to keep.

    Args:
        keep: the classes of labels 1..K in their order, by their new names; null keeps all. Images that are left without objects
            stay, as background.
        rename: old name -> new name; classes with one new name become one.
    """

    keep: list[str] | None = None
    rename: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.keep is not None and (not self.keep or len(set(self.keep)) != len(self.keep)):
            raise ValueError(f"classes.keep must be distinct names, at least one, got {self.keep}")
        if self.rename and not all(name.strip() for name in self.rename.values()):
            raise ValueError(f"classes.rename must give each class a name, got {self.rename}")


def select_classes(annotations: Annotations, classes: Classes) -> Annotations:
    """Rename, merge and keep classes; all images stay, and how many boxes were left out is counted.

    A merged class has the category id of the class whose name it took, if that kept it, or of the first that was renamed. A
    DataError names a class that is not there.
    """
    a, rename = annotations, classes.rename or {}
    _check(list(rename), a.class_names, "rename", str(a.root))
    renamed = [rename.get(name, name) for name in a.class_names]
    names = list(dict.fromkeys(renamed)) if classes.keep is None else classes.keep
    _check(names, renamed, "keep", str(a.root))
    new_label = np.array([0, *(names.index(name) + 1 if name in names else 0 for name in renamed)], dtype=np.int64)
    ids: dict[str, int] = {}
    for old, new, key in zip(a.class_names, renamed, a.category_ids, strict=True):
        ids[new] = key if new == old else ids.get(new, key)
    kept = a.keep_boxes(new_label[a.labels] > 0)
    kept = count_skipped(kept, {"boxes skipped: class not kept": len(a.boxes) - len(kept.boxes)})
    return replace(
        kept, labels=new_label[kept.labels], class_names=tuple(names), category_ids=tuple(ids[name] for name in names)
    )


def _check(wanted: Sequence[str], known: Sequence[str], key: str, root: str) -> None:
    for name in wanted:
        if name not in known:
            there = ", ".join(dict.fromkeys(known))
            after = " after renaming" if key == "keep" else ""
            raise DataError(
                f"classes.{key} names {name!r}, which {root} has no class of{after}: there are {there}{did_you_mean(name, known)}"
            )
