from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets.formats.recognize import open_split
from detpipe.datasets.stratify import divide, divide_by_content, improve, join, stratified_parts
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from .builders import annotations, voc_object, write_voc
from .random_sets import make


def made(root: Path, per_image: list[list[int]], classes: int = 3) -> Annotations:
    """Images with objects of the given labels; no files are needed to divide them."""
    labels = np.array([label for labels in per_image for label in labels], dtype=np.int64)
    names, offsets = tuple(f"class {k}" for k in range(classes)), np.cumsum([0, *map(len, per_image)])
    return annotations(root, np.tile([0.0, 0, 5, 5], (len(labels), 1)), offsets, class_names=names, labels=labels)


def test_an_example_by_hand(tmp_path: Path) -> None:
    """Four images of each kind: one of four in the small part."""
    a = made(tmp_path, [[1]] * 4 + [[2, 2]] * 4 + [[3]] * 4 + [[]] * 4)
    large, small = stratified_parts(a, [0.75, 0.25])
    assert sorted([*large, *small]) == list(range(16))
    assert [sum(4 * k <= row < 4 * k + 4 for row in small) for k in range(4)] == [1, 1, 1, 1]


def test_rare_classes_are_given_away_first() -> None:
    counts = np.array([[100, 1], [100, 1], [100, 0], [100, 0]])
    for seed in range(10):
        part = divide(counts, np.ones(4, dtype=np.int64), np.array([0.5, 0.5]), seed)
        assert part[0] != part[1]
        assert part[2] != part[3]


def test_improving_never_makes_it_worse_and_mends_a_bad_start() -> None:
    counts = np.ones((40, 1), dtype=np.int64)
    images, shares = np.ones(40, dtype=np.int64), np.array([0.5, 0.5])
    part = improve(np.zeros(40, dtype=np.int64), counts, images, shares, 0)
    assert np.bincount(part).tolist() == [20, 20]


@settings(max_examples=40, deadline=None)
@given(
    per_image=st.lists(st.lists(st.integers(1, 3), max_size=5), min_size=1, max_size=40),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (1.0,), (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 3),
    groups=st.integers(1, 40),
)
def test_every_image_is_in_one_part_and_groups_stay_together(
    per_image: list[list[int]], shares: tuple[float, ...], seed: int, groups: int
) -> None:
    a = made(Path(), per_image)
    group = np.arange(len(per_image)) % groups
    parts = stratified_parts(a, shares, seed, group)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(per_image)))
    assert all((np.diff(part) > 0).all() for part in parts)
    where = {int(g): p for p, part in enumerate(parts) for g in group[part]}
    assert all(where[int(g)] == p for p, part in enumerate(parts) for g in group[part])
    again = stratified_parts(a, shares, seed, group)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]


def test_shares_are_near_what_is_wanted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = np.array([0.7, 0.2, 0.06, 0.03, 0.01])
    a = made(tmp_path, [(rng.choice(5, rng.integers(0, 9), p=weights) + 1).tolist() for _ in range(600)], classes=5)
    shares = (0.8, 0.1, 0.1)
    parts = stratified_parts(a, shares)
    total = np.bincount(a.labels, minlength=6)[1:]
    for part, share in zip(parts, shares, strict=True):
        got = np.bincount(a.subset(part).labels, minlength=6)[1:]
        assert (np.abs(got - share * total) <= np.maximum(1, 0.01 * total)).all()
        assert abs(len(part) / 600 - share) < 0.01


def test_real_classes_are_shared_out(shared_data: Path) -> None:
    a = open_split(str(shared_data / "bccd"), "test").annotations("val")
    for part, share in zip(stratified_parts(a, (0.5, 0.25, 0.25)), (0.5, 0.25, 0.25), strict=True):
        got = np.bincount(a.subset(part).labels, minlength=4)[1:] / np.bincount(a.labels, minlength=4)[1:]
        np.testing.assert_allclose(got, share, atol=0.04)


@pytest.mark.parametrize("shares", [(), (0.5, 0.4), (1.5, -0.5)])
def test_wrong_shares_are_refused(tmp_path: Path, shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares must be positive and add up to 1"):
        stratified_parts(made(tmp_path, [[1]]), shares)


def test_joining_takes_each_image_once(tmp_path: Path) -> None:
    boxes = [(0.0, 0.0, 1.0, 1.0)]
    a = make(tmp_path / "x", ["a.png", "b.png"], [(9, 9), (8, 8)], [boxes, []])
    b = make(tmp_path / "y", ["c.png"], [(7, 7)], [boxes * 2])
    joined, repeated = join({"a": a, "b": b, "c": a.subset(np.array([1, 0]))})
    assert repeated == 2
    assert joined.file_names.tolist() == ["x/a.png", "x/b.png", "y/c.png"]
    assert joined.root == tmp_path
    assert joined.image_ids.tolist() == [1, 2, 3]  # anew: both had a 1
    assert joined.offsets.tolist() == [0, 1, 1, 3]
    assert joined.boxes.tolist() == [[0, 0, 9, 9], [0, 0, 7, 7], [0, 0, 7, 7]]
    alone, _ = join({"b": b})
    assert alone.file_names.tolist() == ["c.png"]
    with pytest.raises(DataError, match=r"the classes of a .* and b .* differ"):
        join({"a": a, "b": make(tmp_path / "y", ["c.png"], [(7, 7)], [boxes], category_ids=(1, 7))})


def images_in(a: Annotations, rows: npt.NDArray[np.int64]) -> set[bytes]:
    return {(a.root / str(a.file_names[row])).read_bytes() for row in rows.tolist()}


def test_content_decides_and_not_names_order_or_layout(tmp_path: Path) -> None:
    objects = [[voc_object("cat")], [voc_object("dog"), voc_object("cat")], [], [voc_object("dog")]]
    voc = write_voc(tmp_path / "voc", {f"im{i:02}": objects[i % 4] for i in range(20)})
    data = open_split(str(voc), "train").annotations("val")
    names = [f"im{i:02}.jpg" for i in range(20)]
    other = (
        tmp_path / "other"
    )  # the same images under other names, in another order and layout, with the classes the other way
    for i, name in enumerate(names):
        path = other / f"z{99 - i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((voc / "JPEGImages" / name).read_bytes())
        lines = {"cat": "1 .2 .2 .1 .1\n", "dog": "0 .2 .2 .1 .1\n"}
        path.with_suffix(".txt").write_text(
            "".join(lines[name] for name in ("cat", "dog") if name in "".join(objects[i % 4]))
        )
    (other / "classes.txt").write_text("dog\ncat\n")
    again = open_split(str(other), "all").annotations("val")
    shares = {"train": 0.6, "val": 0.25, "test": 0.15}
    first, second = divide_by_content(data, shares), divide_by_content(again, shares)
    for name in shares:
        assert images_in(data, first[name]) == images_in(again, second[name])
    assert sorted(np.concatenate(list(first.values())).tolist()) == list(range(20))


def test_equal_images_stay_together_whatever_their_length(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {f"im{i}": [voc_object("dog")] for i in range(8)})
    images = root / "JPEGImages"
    (images / "im1.jpg").write_bytes((images / "im0.jpg").read_bytes())
    for i, end in ((2, b"x"), (3, b"x"), (4, b"y")):  # the same but for what is behind the first 64 KiB
        (images / f"im{i}.jpg").write_bytes((images / "im2.jpg").read_bytes()[:600] + bytes(2**16) + end)
    a = open_split(str(root), "train").annotations("val")
    apart = 0
    for seed in range(8):
        parts = divide_by_content(a, {"x": 0.5, "y": 0.5}, seed=seed)
        part = {int(row): name for name, rows in parts.items() for row in rows}
        assert part[0] == part[1]
        assert part[2] == part[3]
        apart += part[2] != part[4]
    assert apart


def test_no_part_is_left_without_images_or_objects(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object()] * 3, "c": [], "d": [voc_object()]})
    a = open_split(str(root), "train").annotations("val")
    for shares in ({"train": 0.8, "val": 0.2}, {"train": 0.98, "val": 0.01, "test": 0.01}):
        parts = divide_by_content(a, shares)
        assert all(len(a.subset(rows).boxes) for rows in parts.values())
    with pytest.raises(DataError, match=r"4 images are too few for 5 parts"):
        divide_by_content(a, dict.fromkeys("vwxyz", 0.2))
