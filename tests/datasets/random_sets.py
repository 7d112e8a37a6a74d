"""Random annotation sets with their images on disk, for tests that write them in one layout and read them in another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from detpipe.types import Annotations

from .builders import annotations

SIDES = (1, 7, 40, 333, 5000)  # of images; only their headers are read


def pictures(root: Path, names: list[str], sizes: list[tuple[int, int]]) -> None:
    for name, (height, width) in zip(names, sizes, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("1", (width, height)).save(path)


def make(
    root: Path,
    names: list[str],
    sizes: list[tuple[int, int]],
    boxes: list[list[tuple[float, float, float, float]]],
    class_names: tuple[str, ...] = ("cat", "dog"),
    category_ids: tuple[int, ...] = (1, 2),
    **changes: object,
) -> Annotations:
    """Annotations of images that are written too; boxes as parts of the image: corner and extent in 0..1."""
    pictures(root, names, sizes)
    flat = []
    for (height, width), parts in zip(sizes, boxes, strict=True):
        for x, y, w, h in parts:
            x1, y1 = x * width, y * height
            flat.append((x1, y1, x1 + w * (width - x1), y1 + h * (height - y1)))
    own = {"file_names": np.array(names, dtype=np.str_), "category_ids": category_ids}
    return annotations(root, flat, np.cumsum([0, *map(len, boxes)]), sizes, class_names, **{**own, **changes})


@st.composite
def annotation_sets(draw: st.DrawFn, root: Path, flags: bool = True) -> Annotations:
    """A set of up to 5 images and 4 classes, with everything that layouts may lose."""
    count = draw(st.integers(1, 5))
    part, extent = st.floats(0, 0.9), st.floats(0.1, 1)
    stems = draw(
        st.lists(st.sampled_from(["a", "b b", "ü", "x.1", "7", "a 1"]), min_size=count, max_size=count, unique=True)
    )
    folders = draw(st.lists(st.sampled_from(["", "sub/", "sub/deep/"]), min_size=count, max_size=count))
    names = [f"{folder}{stem}.png" for folder, stem in zip(folders, stems, strict=True)]
    sizes = draw(st.lists(st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)), min_size=count, max_size=count))
    boxes = draw(st.lists(st.lists(st.tuples(part, part, extent, extent), max_size=4), min_size=count, max_size=count))
    boxes[0] = boxes[0] or [(0.0, 0.0, 1.0, 1.0)]
    K = draw(st.integers(1, 4))
    ids = tuple(sorted(draw(st.sets(st.integers(0, 2**31), min_size=K, max_size=K))))
    class_names = tuple(
        draw(st.permutations(["zebra", "cat: 1", "dog, big", "no", "Käse <&> 猫", 'a "b"; c', "# 7", "1e3"]))[:K]
    )
    made = make(root, names, sizes, boxes, class_names, ids)
    B = len(made.boxes)
    bools = st.lists(st.booleans(), min_size=B, max_size=B)
    changes: dict[str, object] = {
        "labels": np.array(draw(st.lists(st.integers(1, K), min_size=B, max_size=B))),
        "image_ids": np.array(draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count, unique=True))),
    }
    if flags:
        changes["iscrowd"] = np.array(draw(bools), dtype=bool)
        changes["difficult"] = np.array(draw(bools), dtype=bool)
        share = np.array(draw(st.lists(st.sampled_from([1.0, 0.7, 0.0]), min_size=B, max_size=B)))
        changes["area"] = made.area * share
    return make(root, names, sizes, boxes, class_names, ids, **changes)
