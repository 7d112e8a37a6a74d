"""Put splits together, and divide images into parts with equal shares of the objects of every class.

Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011. Deviations:

1. A class counts by its objects, not by the images that have it.
2. What is given away is a group of images, which must stay together; a group with most objects of the class goes first.
3. Images without objects are given away last, to the part that lacks most images.
4. Afterwards single groups move to another part as long as that brings the parts nearer to what is wanted, as chi-square has
   it over all classes and the images: what was given away early, by a rare class, decided over frequent ones by the way.

Groups G, classes K, parts P.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.formats.class_list import compare_classes
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, content_keys, image_paths
from detpipe.support.errors import DataError
from detpipe.types import BOX_FIELDS, Annotations, Segmentations

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_PASSES = 20  # over all groups; it has long settled by then


def join(splits: Mapping[str, Annotations]) -> tuple[Annotations, int]:
    """Pool splits; an image file that several of them name is taken once, from the first.

    All images in their order, numbered anew from 1 if ids repeat; and how many repeated images were left out. A DataError if the
    splits have other classes.
    """
    compare_classes(splits)
    first = next(iter(splits.values()))
    seen: set[Path] = set()
    kept: list[Annotations] = []
    for split in splits.values():
        paths = [Path(os.path.abspath(split.root / str(name))) for name in split.file_names]
        kept.append(split.subset(np.array([i for i, path in enumerate(paths) if path not in seen], dtype=np.int64)))
        seen.update(paths)
    root = Path(os.path.commonpath([os.path.abspath(a.root) for a in kept])) if len(kept) > 1 else first.root
    names = [
        os.path.relpath(a.root / str(name), root) if len(kept) > 1 else str(name) for a in kept for name in a.file_names
    ]
    ids = np.concatenate([a.image_ids for a in kept])
    boxes: dict[str, Any] = {name: np.concatenate([getattr(a, name) for a in kept]) for name in BOX_FIELDS}
    outlines = [a.segmentations or Segmentations.pack([b""] * len(a.boxes)) for a in kept]
    joined = Annotations(
        root=root,
        file_names=np.array([name.replace(os.sep, "/") for name in names], dtype=np.str_),
        image_ids=ids if len(np.unique(ids)) == len(ids) else np.arange(1, len(ids) + 1),
        sizes=np.concatenate([a.sizes for a in kept]),
        offsets=np.cumsum(np.concatenate([[0], *(np.diff(a.offsets) for a in kept)])),
        class_names=first.class_names,
        category_ids=first.category_ids,
        segmentations=Segmentations.concat(outlines) if any(a.segmentations is not None for a in kept) else None,
        **boxes,
    )
    return joined, sum(map(len, splits.values())) - len(joined)


def divide_annotations(annotations: Annotations, shares: Mapping[str, float]) -> dict[str, Annotations]:
    """Divide a split of image files as `divide_by_content` does; what was skipped or clipped counts with the first part."""
    rows = divide_by_content(annotations, shares)
    parts = {name: annotations.subset(part) for name, part in rows.items()}
    first, *others = parts
    counts = Counter(annotations.counts)
    for name in others:
        images, boxes = len(parts[name]), len(parts[name].boxes)
        own = {"images read": images, "images used": images, "boxes read": boxes, "boxes used": boxes}
        parts[name] = replace(parts[name], counts=own)
        counts.subtract(own)
    parts[first] = replace(parts[first], counts=dict(counts))
    return parts


def divide_by_content(
    annotations: Annotations,
    shares: Mapping[str, float],
    source: ImageFiles = PLAIN_FILES,
    seed: int = 0,
    together: Sequence[Sequence[int]] = (),
) -> dict[str, Ints]:
    """Divide the images of a split by what is in them: the same for everyone, whatever files and classes are called or ordered by.

    ``shares``, name of a part -> its share of the images, add up to 1; ``seed`` decides between what is equally good;
    ``together`` are rows of images that go to one part, beside those whose files are equal. Name of the part -> rows of images,
    ascending, in which each image is once.

    A ValueError for shares that are not positive or do not add up to 1; a DataError if an image cannot be read, or there are too
    few.
    """
    digests = content_keys(image_paths(annotations), source)
    order = np.array(sorted(range(len(annotations)), key=digests.__getitem__), dtype=np.int64)
    group = _groups([digests[i] for i in order.tolist()], np.argsort(order), together)
    if len(np.unique(group)) < len(shares):
        raise DataError(
            f"{annotations.root}: {len(annotations)} images are too few for {len(shares)} parts ({', '.join(shares)}), where equal "
            "images stay together"
        )
    by_name = sorted(range(annotations.num_classes), key=annotations.class_names.__getitem__)
    pool = annotations.subset(order)
    pool = replace(pool, labels=np.argsort([-1, *by_name])[pool.labels])
    parts = stratified_parts(pool, list(shares.values()), seed, group)
    _fill(parts, group, np.diff(pool.offsets))
    return {name: np.sort(order[part]) for name, part in zip(shares, parts, strict=True)}


def _groups(digests: Sequence[bytes], place: Ints, together: Sequence[Sequence[int]]) -> Ints:
    """[I] the group of each image in the order of the digests; ``place`` is where a row is in it."""
    first: dict[bytes, int] = {}
    group = np.array([first.setdefault(digest, i) for i, digest in enumerate(digests)], dtype=np.int64)
    for rows in together:
        members = np.unique(group[place[list(rows)]])
        group[np.isin(group, members)] = members.min(initial=len(group))
    return group


def _fill(parts: list[Ints], group: Ints, objects: Ints) -> None:
    """Give a part without objects, or without images, the smallest group that another part can spare; there are few images then."""
    for p in range(len(parts)):
        if len(parts[p]) and objects[parts[p]].any():
            continue
        spare = [np.unique(group[rows[objects[rows] > 0]]) for rows in parts]
        if max(map(len, spare)) < 2 and not len(parts[p]):
            spare = [np.unique(group[rows]) for rows in parts]
        giver = max(range(len(parts)), key=lambda other: len(spare[other]))
        if len(spare[giver]) < 2:
            continue
        sizes = [np.count_nonzero(group == name) for name in spare[giver]]
        taken = group[parts[giver]] == spare[giver][int(np.argmin(sizes))]
        back = group[parts[p]] == group[parts[p][:1]] if len(np.unique(group[parts[p]])) else np.zeros(0, dtype=bool)
        parts[p], parts[giver] = (
            np.concatenate([parts[giver][taken], parts[p][~back]]),
            np.concatenate([parts[giver][~taken], parts[p][back]]),
        )


def stratified_parts(
    annotations: Annotations, shares: Sequence[float], seed: int = 0, groups: Ints | None = None
) -> list[Ints]:
    """Divide the images of a split by shares [P], which add up to 1: P arrays of rows, ascending, in which each image is once.

    Images of one group, of ``[I]``, go to one part; None: each is a group of its own. A ValueError for shares that are not
    positive or do not add up to 1.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be positive and add up to 1, got {list(shares)}")
    _, group = np.unique(np.arange(len(annotations)) if groups is None else groups, return_inverse=True)
    counts = np.zeros((int(group.max(initial=-1)) + 1, annotations.num_classes), dtype=np.int64)
    np.add.at(counts, (group[annotations.box_image], annotations.labels - 1), 1)
    images = np.bincount(group, minlength=len(counts))
    part = improve(divide(counts, images, np.array(shares), seed), counts, images, np.array(shares), seed)
    return [np.flatnonzero(part[group] == p) for p in range(len(shares))]


def divide(counts: Ints, images: Ints, shares: Floats, seed: int) -> Ints:
    """``[G]`` the part of each group, of ``[G, K]`` objects of each class and ``[G]`` images, by shares ``[P]`` of 1."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts))
    wanted = shares[:, None] * counts.sum(axis=0)  # [P, K] objects that each part still lacks
    lacking = shares * images.sum()  # [P] images that it still lacks
    part = np.full(len(counts), -1)
    left = counts.sum(axis=0)

    def give(group: int, scores: Floats) -> None:
        best = np.flatnonzero(np.isclose(scores, scores.max()))
        best = best[np.isclose(lacking[best], lacking[best].max())]
        chosen = int(best[0] if len(best) == 1 else rng.choice(best))
        part[group] = chosen
        wanted[chosen] -= counts[group]
        lacking[chosen] -= images[group]
        left[:] -= counts[group]

    while left.any():
        rarest = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        members = order[(part[order] < 0) & (counts[order, rarest] > 0)]
        for group in members[np.argsort(-counts[members, rarest], kind="stable")].tolist():
            give(group, wanted[:, rarest].copy())
    for group in order[part[order] < 0].tolist():
        give(group, lacking.copy())
    return part


def improve(part: Ints, counts: Ints, images: Ints, shares: Floats, seed: int) -> Ints:
    """Move groups between parts, ``[G]``, while that lowers the distance to the wanted numbers; other arguments as for `divide`."""
    part = part.copy()
    sizes = np.column_stack([counts, images]).astype(np.float64)  # [G, K + 1]
    total = sizes.sum(axis=0)
    weight = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    weight[-1] *= max(1.0, (total[:-1] > 0).sum() / 4)  # the images count as much as a quarter of the classes
    off = np.array([sizes[part == p].sum(axis=0) for p in range(len(shares))]) - shares[:, None] * total  # [P, K + 1]
    order = np.random.default_rng(seed).permutation(len(part))
    for _ in range(_PASSES):
        moved = False
        for group in order.tolist():
            size, here = sizes[group], int(part[group])
            # (off + size)^2 - off^2 in the part that it goes to, (off - size)^2 - off^2 in that which it leaves
            gain = ((2 * off * size + size**2) * weight).sum(axis=1) / shares
            leave = float(((size**2 - 2 * off[here] * size) * weight).sum() / shares[here])
            gain[here] = -leave
            there = int(gain.argmin())
            if gain[there] + leave < -1e-9:
                part[group] = there
                off[here] -= size
                off[there] += size
                moved = True
        if not moved:
            break
    return part
