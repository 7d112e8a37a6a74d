"""Divide images into parts with equal shares of the objects of every class.

Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011. Deviations:

1. A class counts by its objects, not by the images that have it.
2. What is given away is a group of images, which must stay together; a group with most objects of the class goes first.
3. Images without objects are given away last, to the part that lacks most images.
4. Afterwards single groups move to another part as long as that brings the parts nearer to what is wanted, as chi-square has
   it over all classes and the images: what was given away early, by a rare class, decided over frequent ones by the way.

Groups G, classes K, parts P.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from detpipe.types import Annotations

_PASSES = 20  # over all groups; it has long settled by then


def stratified_parts(
    annotations: Annotations, shares: Sequence[float], seed: int = 0, groups: npt.NDArray[np.int64] | None = None
) -> list[npt.NDArray[np.int64]]:
    """Divide the images of a split.

    Args:
        annotations: of the split.
        shares: [P] of the images, which add up to 1.
        seed: decides between what is equally good.
        groups: ``[I]`` images of one group go to one part; None: each is a group of its own.

    Returns:
        P arrays of rows of images, ascending, in which each image is once.

    Raises:
        ValueError: the shares are not positive or do not add up to 1.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be positive and add up to 1, got {list(shares)}")
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    _, group = np.unique(np.arange(len(annotations)) if groups is None else groups, return_inverse=True)
    counts = np.zeros((int(group.max(initial=-1)) + 1, annotations.num_classes), dtype=np.int64)
    np.add.at(counts, (group[image], annotations.labels - 1), 1)
    images = np.bincount(group, minlength=len(counts))
    part = improve(divide(counts, images, np.array(shares), seed), counts, images, np.array(shares), seed)
    return [np.flatnonzero(part[group] == p) for p in range(len(shares))]


def divide(
    counts: npt.NDArray[np.int64], images: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], seed: int
) -> npt.NDArray[np.int64]:
    """Give every group to a part.

    Args:
        counts: ``[G, K]`` objects of each class.
        images: ``[G]`` how many images it has.
        shares: ``[P]``, which add up to 1.
        seed: decides between what is equally good.

    Returns:
        ``[G]`` the part of each group.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts))
    wanted = shares[:, None] * counts.sum(axis=0)  # [P, K] objects that each part still lacks
    lacking = shares * images.sum()  # [P] images that it still lacks
    part = np.full(len(counts), -1)
    left = counts.sum(axis=0)

    def give(group: int, scores: npt.NDArray[np.float64]) -> None:
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


def improve(
    part: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    images: npt.NDArray[np.int64],
    shares: npt.NDArray[np.float64],
    seed: int,
) -> npt.NDArray[np.int64]:
    """Move groups between parts while that lowers the distance to the wanted numbers of objects and images.

    Args:
        part: ``[G]`` the part of each group.
        counts: as for `divide`.
        images: as for `divide`.
        shares: as for `divide`.
        seed: decides the order in which groups are looked at.

    Returns:
        ``[G]`` the part of each group.
    """
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
