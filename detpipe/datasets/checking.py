"""Looks for every fault of a data set, in all its splits, without stopping at the first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.datasets.datamodule import DetectionData, image_files
from detpipe.datasets.faults import Fault
from detpipe.datasets.formats.class_list import class_differences
from detpipe.datasets.image_files import ImageFiles, content_keys, image_paths
from detpipe.support.errors import DataError
from detpipe.types import Annotations


@dataclass(frozen=True)
class Report:
    """What was found."""

    counts: dict[str, dict[str, int]]  # split -> images and boxes that were read, used, clipped and skipped
    faults: dict[str, list[Fault]]  # split -> its faults; those of several splits have their names joined

    def grouped(self, serious: bool) -> dict[str, list[str]]:
        """Messages by kind, the kind with most faults first; one that several splits share is said once."""
        groups: dict[str, dict[str, list[str]]] = defaultdict(dict)  # kind -> message -> splits
        for split, faults in self.faults.items():
            for fault in faults:
                if fault.serious == serious:
                    groups[fault.kind].setdefault(fault.message, []).append(split)
        found = {
            kind: [f"{', '.join(dict.fromkeys(splits))}: {message}" for message, splits in messages.items()]
            for kind, messages in groups.items()
        }
        return dict(sorted(found.items(), key=lambda group: (-len(group[1]), group[0])))

    def total(self, serious: bool) -> int:
        """How many faults there are."""
        return sum(map(len, self.grouped(serious).values()))

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {"splits": self.counts, "errors": self.grouped(True), "warnings": self.grouped(False)}


def check_data(splits: Mapping[str, DetectionData], decode: bool = True) -> Report:
    """Read the validation split of each named data set, as training would, and write down all that is wrong with them.

    ``decode`` decides whether every image is decoded, which finds damaged ones and those of another size than annotated.
    """
    counts: dict[str, dict[str, int]] = {}
    faults: dict[str, list[Fault]] = {}
    read: dict[str, Annotations] = {}
    for name, data in splits.items():
        collected = data.faults("collect", decode)
        try:
            read[name] = data.annotations("val", collected)
            counts[name] = read[name].counts
        except DataError as error:
            collected.found.append(Fault("data set: cannot be read", str(error)))
        faults[name] = collected.found
        if name in read:
            faults[name] += _repeated_boxes(read[name])
    _compare_class_lists(read, faults)
    _compare_images(read, faults, image_files(splits[name] for name in read))
    return Report(counts, faults)


def _repeated_boxes(a: Annotations) -> list[Fault]:
    image = a.box_image
    rows = np.column_stack([image, a.labels, a.iscrowd, a.boxes])
    _, first, count = np.unique(rows, axis=0, return_index=True, return_counts=True)
    return [
        Fault(
            "boxes: repeated",
            f"{a.file_names[image[b]]}: box {a.boxes[b].tolist()} of class {a.class_names[a.labels[b] - 1]!r} is there "
            f"{n} times",
            serious=False,
        )
        for b, n in zip(first.tolist(), count.tolist(), strict=True)
        if n > 1 and 0 < a.labels[b] <= a.num_classes
    ]


def _compare_class_lists(read: Mapping[str, Annotations], faults: dict[str, list[Fault]]) -> None:
    """Name splits that have other classes than the first of them, which training refuses together, and classes without objects."""
    if not read:
        return
    first, *others = read
    one = read[first]
    for name in others:
        if differences := class_differences(first, one, name, read[name]):
            fault = Fault("data set: class lists differ", "; ".join(differences))
            faults.setdefault(f"{first} and {name}", []).append(fault)
    for name in read:
        empty = [
            word
            for label, word in enumerate(read[name].class_names, start=1)
            if word in one.class_names and not (read[name].labels == label).any()
        ]
        if empty:
            shown = ", ".join(map(repr, empty[:10])) + (", ..." if len(empty) > 10 else "")
            faults[name].append(Fault("classes: without objects", f"{len(empty)} classes: {shown}", serious=False))


def _compare_images(read: Mapping[str, Annotations], faults: dict[str, list[Fault]], source: ImageFiles) -> None:
    named = {name: set(image_paths(a)) for name, a in read.items()}

    def damaged(path: Path, error: DataError) -> None:  # which nobody has seen where images are not decoded
        for name in (name for name, found in named.items() if path in found):
            faults[name].append(Fault("images: unreadable", str(error)))

    def warn(where: str, kind: str, message: str) -> None:
        faults.setdefault(where, []).append(Fault(kind, message, serious=False))

    paths, alike = sorted(set().union(*named.values())), defaultdict[bytes, list[Path]](list)
    for path, key in zip(paths, content_keys(paths, source, damaged), strict=True):
        alike[key].append(path)
    for group in (group for group in alike.values() if len(group) > 1):
        members = {name: [source.name(path) for path in group if path in found] for name, found in named.items()}
        for name, paths in members.items():
            if len(paths) > 1:
                warn(name, "images: repeated in a split", f"{' and '.join(paths)} are the same picture")
        for name, other in combinations([name for name, paths in members.items() if paths], 2):
            if not named[name] & named[other]:  # the same files in two lists: said once, for all of them
                both = f"{members[name][0]} and {members[other][0]} are the same picture"
                warn(f"{name} and {other}", "images: the same in several splits", both)
    for name, other in combinations(named, 2):
        shared = named[name] & named[other]
        smaller, larger = sorted((name, other), key=lambda split: len(named[split]))
        if shared and shared == named[smaller]:  # as VOC's train is of trainval
            all_of_it = f"all {len(shared)} images of {smaller} are in {larger} too"
            warn(f"{name} and {other}", "splits: one holds the other", all_of_it)
        elif shared:
            some = f"{len(shared)} images are in both, such as {min(shared)}"
            warn(f"{name} and {other}", "images: the same in several splits", some)
