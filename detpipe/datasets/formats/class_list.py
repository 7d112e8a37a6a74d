"""A file beside annotations that cannot say themselves what their classes are: order and ids, classes without objects.

VOC's XML and tables of boxes only name the classes that occur. Where ``detpipe.json`` lies beside them, written by
:mod:`detpipe.datasets.formats.voc` and :mod:`~detpipe.datasets.formats.csv`, ``class_names: auto`` means what it says::

    {"class_names": ["cat", "dog", "owl"], "category_ids": [1, 7, 90], "one_based": true}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from detpipe.datasets.faults import SHOWN
from detpipe.support.errors import DataError
from detpipe.support.files import write_text
from detpipe.support.strict_json import load_json, shorten
from detpipe.types import Annotations

CLASS_LIST = "detpipe.json"


class ClassList(msgspec.Struct, frozen=True):
    """What a data set says about itself."""

    class_names: tuple[Annotated[str, Meta(min_length=1)], ...]  # [K], the name of label 1 first
    category_ids: tuple[Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)], ...]  # [K], what detections are written with
    one_based: bool = True  # whether VOC's boxes count pixels from 1, both ends included


def read_class_list(folder: Path) -> ClassList | None:
    """What the file of a folder says, None if there is none; a DataError if it is damaged or holds anything else."""
    path = folder / CLASS_LIST
    if not path.is_file():
        return None
    try:
        found = msgspec.convert(load_json(path), ClassList)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: {error}") from error
    names, ids = found.class_names, found.category_ids
    if not names or len(set(names)) != len(names):
        raise DataError(f"{path}: class_names must be distinct names, at least one, got {shorten(list(names))}")
    if len(ids) != len(names) or len(set(ids)) != len(ids):
        raise DataError(
            f"{path}: category_ids must be {len(names)} distinct numbers, one a class, got {shorten(list(ids))}"
        )
    return found


def write_class_list(folder: Path, classes: ClassList) -> None:
    """Write the file of a folder."""
    write_text(folder / CLASS_LIST, json.dumps(msgspec.to_builtins(classes), indent=1))


def ids_of(class_names: Sequence[str], known: ClassList | None) -> tuple[int, ...]:
    """The category ids of some classes: those that the list of the data set gives them, 1..K where there is none.

    A DataError if the classes are not distinct, or there are none.
    """
    if not class_names or len(set(class_names)) != len(class_names):
        raise DataError(f"class_names must be distinct and at least one, got {list(class_names)}")
    ids = dict(zip(known.class_names, known.category_ids, strict=True)) if known else {}
    if set(class_names) <= set(ids):
        return tuple(ids[name] for name in class_names)
    return tuple(range(1, len(class_names) + 1))


def compare_classes(splits: Mapping[str, Annotations]) -> None:
    """Refuse splits that number their classes differently than the first; the DataError names the differences."""
    (name, first), *others = splits.items()
    for other_name, other in others:
        if differences := class_differences(name, first, other_name, other):
            raise DataError(
                f"the classes of {name} ({first.root}) and {other_name} ({other.root}) differ: "
                f"{'; '.join(differences[:SHOWN])} ({len(differences)} in total); make the class lists equal"
            )


def class_differences(name: str, known: Annotations, other_name: str, other: Annotations) -> list[str]:
    """Name the classes that two splits do not share or number differently."""
    if (known.class_names, known.category_ids) == (other.class_names, other.category_ids):
        return []
    first = dict(zip(known.class_names, known.category_ids, strict=True))
    second = dict(zip(other.class_names, other.category_ids, strict=True))
    differences = [f"only in {name}: {word!r} (id {first[word]})" for word in first if word not in second]
    differences += [f"only in {other_name}: {word!r} (id {second[word]})" for word in second if word not in first]
    differences += [
        f"{word!r} has id {first[word]} in {name} and {second[word]} in {other_name}"
        for word in first
        if word in second and first[word] != second[word]
    ]
    return differences or [f"the same classes in another order: {known.class_names} and {other.class_names}"]
