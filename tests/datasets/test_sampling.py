"""Repeat factors by hand, what comes how often, and that epochs are a function of (seed, epoch) alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from detpipe import cli
from detpipe.datasets import COCO, Augment, ImageFolder, Loader, Resize, Sampling
from detpipe.datasets.batches import EpochBatches, Locality
from detpipe.datasets.sampling import Plan, Presence
from detpipe.support.errors import DataError

from .builders import coco_content, picture, write_coco

# image -> its classes: "dog" is in 1 image of 8, "cat" in 2, "man" in 6; the last image is empty
IMAGES = [("man",), ("man",), ("man", "cat"), ("man",), ("man",), ("man", "dog"), ("cat",), ()]
NAMES = ("man", "cat", "dog", "owl")


def presence(images: list[tuple[str, ...]] = IMAGES) -> Presence:
    pairs = [(row, NAMES.index(name)) for row, classes in enumerate(images) for name in classes]
    rows, classes = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Presence(len(images), rows, classes, NAMES)


def test_the_factors_are_those_of_the_paper() -> None:
    sampling = Sampling(repeat_factor=0.5)
    dog, cat = (0.5 / (1 / 8)) ** 0.5, (0.5 / (2 / 8)) ** 0.5  # 2 and 1.414
    np.testing.assert_allclose(sampling.class_factors(presence()), [1, cat, dog, 1])
    plan = sampling.plan(presence())
    assert plan.factors is not None
    np.testing.assert_allclose(plan.factors, [1, 1, cat, 1, 1, dog, cat, 1])
    assert plan.length == 10  # 5 + 2 + 2 * 1.414 = 9.83, rounded up
    assert (
        sampling.describe(presence()) == "repeat-factor sampling: 10 images an epoch of 8; rarest class 'dog' 2.0 times"
    )
    many = Presence(1000, np.arange(1000), np.repeat([0, 1], [999, 1]), ("a", "b"))
    assert Sampling(0.0001).plan(many).length == 1000  # nothing is rarer than that
    line = Sampling(1.0).describe(Presence(1200, np.arange(1200), np.repeat([0, 1], [1000, 200]), ("a", "b")))
    assert line == "repeat-factor sampling: 1,586 images an epoch of 1,200; rarest class 'b' 2.4 times"


def test_images_come_as_often_as_their_factors_say() -> None:
    plan = Sampling(0.5).plan(presence())
    assert plan.factors is not None
    epochs = 4000
    drawn = np.array([np.bincount(plan.draw(np.random.default_rng((0, k))), minlength=8) for k in range(epochs)])
    assert (drawn.sum(1) == plan.length).all()
    # whole part always; the place that rounding up leaves is any image's
    rest = (plan.length - plan.factors.sum()) / 8
    np.testing.assert_allclose(drawn.mean(0), plan.factors + rest, atol=0.03)
    assert (drawn >= 1).all()


def test_classes_take_turns() -> None:
    plan = Sampling(class_balanced=True).plan(presence())
    assert plan.length == 8
    counts = np.zeros(8)
    for epoch in range(3000):
        drawn = plan.draw(np.random.default_rng(epoch))
        assert 7 not in drawn  # nothing is in it
        counts += np.bincount(drawn, minlength=8)
    shares = counts / counts.sum()
    # a third of the draws is for each class: of the six images with a man, the two with a cat, the one with a dog
    np.testing.assert_allclose(
        shares, [1 / 18] * 2 + [1 / 18 + 1 / 6] + [1 / 18] * 2 + [1 / 18 + 1 / 3, 1 / 6, 0], atol=0.01
    )
    only = Presence(90, np.arange(90), np.repeat([0, 1, 2], [80, 9, 1]), ("a", "b", "c"))
    labels = np.repeat([0, 1, 2], [80, 9, 1])
    batches = EpochBatches(
        np.full((90, 2), 40, dtype=np.int32), 6, seed=1, plan=Sampling(class_balanced=True).plan(only)
    )
    for batch in batches.batches(0):
        assert np.bincount(labels[batch], minlength=3).tolist() == [2, 2, 2]
    nines = [index for batch in batches.batches(0) for index in batch if labels[index] == 1]
    assert np.ptp(np.bincount(nines)[80:]) <= 1  # a class goes through all of its images before one comes again
    line = Sampling(class_balanced=True).describe(only)
    assert line == "class-balanced sampling: 90 images an epoch of 90; rarest class 'c', in 1 images, 30.0 times each"


def test_nothing_to_balance() -> None:
    empty = presence([(), ()])
    with pytest.raises(DataError, match=r"class_balanced: no training image has an object"):
        Sampling(class_balanced=True).plan(empty)
    plan = Sampling(0.5).plan(empty)
    assert sorted(plan.draw(np.random.default_rng(0))) == [0, 1]
    assert "there are no objects" in Sampling(0.5).describe(empty)


def plans() -> list[Plan]:
    random = np.random.default_rng(5)
    labels = np.minimum(random.geometric(0.4, 60) - 1, 3)
    found = Presence(60, np.arange(60), labels.astype(np.int64), NAMES)
    return [Sampling(0.4).plan(found), Sampling(class_balanced=True).plan(found)]


SIZES = np.random.default_rng(3).integers(40, 44, (60, 2)).astype(np.int32)


@pytest.mark.parametrize("plan", plans(), ids=["repeat_factor", "class_balanced"])
def test_epochs_are_a_function_of_seed_and_epoch(plan: Plan) -> None:
    first, again, other = (EpochBatches(SIZES, 4, seed, plan=plan) for seed in (1, 1, 2))
    for epoch in range(3):
        assert first.batches(epoch) == again.batches(epoch) != other.batches(epoch)
        assert len(first) == len(first.batches(epoch)) == -(-plan.length // 4)
        assert sum(map(len, first.batches(epoch))) == plan.length
    assert first.batches(0) != first.batches(1)
    first.set_epoch(2)
    keys = [key for batch in first for key in batch]
    assert len(set(keys)) == len(keys) == plan.length  # a copy has a key of its own, and so draws of its own
    by_image: dict[int, list[int]] = {}
    for _, index, *copy in keys:
        by_image.setdefault(index, []).append(copy[0] if copy else 0)
    assert all(sorted(copies) == list(range(len(copies))) for copies in by_image.values())
    assert EpochBatches(SIZES, 4, training=False, plan=plan).batches(0) == EpochBatches(
        SIZES, 4, training=False
    ).batches(0)


@pytest.mark.parametrize("plan", plans(), ids=["repeat_factor", "class_balanced"])
def test_a_stopped_epoch_goes_on_where_it_was(plan: Plan) -> None:
    whole, rest = EpochBatches(SIZES, 4, 7, plan=plan), EpochBatches(SIZES, 4, 7, plan=plan)
    whole.set_epoch(3)
    rest.set_epoch(3)
    rest.resume(3, 5)
    assert list(rest) == list(whole)[5:]
    assert list(rest) == list(whole)


@pytest.mark.parametrize("plan", plans(), ids=["repeat_factor", "class_balanced"])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_steps_of_one(monkeypatch: pytest.MonkeyPatch, plan: Plan, size: int) -> None:
    one = EpochBatches(SIZES, 4 * size, 7, plan=plan)
    several, parts = EpochBatches(SIZES, 4, 7, plan=plan), []
    for rank in range(size):
        with monkeypatch.context() as patch:
            patch.setattr("detpipe.datasets.batches.rank_and_size", lambda rank=rank: (rank, size))
            parts.append(list(several))
            assert len(several) == len(parts[-1])
    steps = list(one)
    assert {len(part) for part in parts} == {len(steps)}
    for step, whole in enumerate(steps):
        mine = [key for part in parts for key in part[step]]
        assert set(mine) == set(whole)
        if len(whole) >= size:
            assert len(mine) == len(whole)


def test_shards_are_read_a_window_at_a_time() -> None:
    repeated, balanced = plans()
    shard = np.repeat(np.arange(6), 10).astype(np.int32)
    batches = EpochBatches(SIZES, 4, 0, locality=Locality(shard, 2), plan=repeated)
    windows = [set(shard[batch]) for batch in batches.batches(0)]
    assert sum(map(len, batches.batches(0))) == repeated.length
    seen: list[set[int]] = []
    for window in windows:  # the shards of a window are done with before those of the next
        if not seen or not window & seen[-1]:
            seen.append(set(window))
        seen[-1] |= window
    assert len(windows) > len(seen)
    whole = EpochBatches(SIZES, 4, 0, locality=Locality(shard, 6), plan=balanced)
    assert whole.batches(0) == EpochBatches(SIZES, 4, 0, plan=balanced).batches(0)
    with pytest.raises(ValueError, match=r"loader\.sampling\.class_balanced .* set window to the number of shards"):
        EpochBatches(SIZES, 4, 0, locality=Locality(shard, 2), plan=balanced)


def rare_set(root: Path) -> Path:
    """Eight images; one has an owl, seven have a dog."""
    content = coco_content(((40, 60),) * 8)

    def box(k: int, image: int, category: int, **more: int) -> dict[str, Any]:
        return {"id": k, "image_id": image, "category_id": category, "bbox": [2 + k, 2, 20, 20], "area": 400, **more}

    content["annotations"] = [box(k, 10 + k, 90 if k == 7 else 7) for k in range(8)] + [box(30, 10, 90, iscrowd=1)]
    for split in ("train", "val"):
        write_coco(root, content, split)
    return root


def test_data_repeat_images_with_draws_of_their_own_for_any_number_of_workers(tmp_path: Path) -> None:
    rare_set(tmp_path)
    found = []
    for workers in (0, 2):
        loader = Loader(3, num_workers=workers, sampling=Sampling(1.0))
        resize = Resize("letterbox", [40, 48, 56, 64])
        data = COCO(
            str(tmp_path),
            "train",
            "val",
            loader=loader,
            augment=Augment(flip=0.5, scale_jitter=(0.5, 2.0)),
            resize=resize,
        )
        batches = list(data.train_dataloader())
        # owl: sqrt(1 / (1 / 8)) = 2.83 times, dog: sqrt(8 / 7) = 1.07 times; the crowd region of an owl does not count
        assert sum(len(images) for images, _ in batches) == 11
        assert len(data.train_dataloader()) == len(batches) == 4
        found.append(
            [(t["image_id"], image) for images, targets in batches for image, t in zip(images, targets, strict=True)]
        )
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    owls = [image for image_id, image in found[0] if image_id == 17]
    assert len(owls) in (2, 3)
    assert len({image.numpy().tobytes() for image in owls}) == len(owls)
    assert len(list(data.val_dataloader())) == 3


def test_pretraining_balances_classes_too(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, count in (("cat", 6), ("dog", 1)):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(count):
                picture(20, 20, k).save(tmp_path / split / name / f"{k}.png")
    data = ImageFolder(str(tmp_path), loader=Loader(2, num_workers=0, sampling=Sampling(class_balanced=True)))
    labels = [label for _, labels, _ in data.train_dataloader() for label in labels.tolist()]
    assert labels.count(1) == pytest.approx(labels.count(0), abs=1)


@pytest.mark.slow
def test_training_says_how_it_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = rare_set(tmp_path / "set")
    out = tmp_path / "run"
    arguments = [
        *("train", runs.CONFIG, "--data", "detpipe.datasets.COCO", "--data.root", str(root), "--output", str(out)),
        *("--data.train", "train", "--data.val", "val", "--data.loader.batch_size", "2"),
        *("--data.loader.sampling.repeat_factor", "1.0"),
        *(*runs.MODEL, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    ]
    assert cli.main(arguments) == 0
    assert "repeat-factor sampling: 11 images an epoch of 8; rarest class 'owl' 2.8 times" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["epochs"] == 2
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 12  # 6 batches an epoch
