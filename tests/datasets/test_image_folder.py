from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detpipe.datasets import ImageFolder, Loader, Views
from detpipe.datasets.classification import LabeledImages, pack_names
from detpipe.support.errors import DataError

from .builders import picture

TINY = Views(size=16)


def write(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(20 + seed, 30, seed).save(path)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes; in validation only two of them."""
    train = [f"train/{name}/{number}.jpg" for name in ("owl", "cat", "Dog") for number in range(3)]
    return write(tmp_path / "set", *train, "val/cat/7.png", "val/owl/8.jpg")


def folder(root: Path, workers: int = 0, **changes: Any) -> ImageFolder:
    return ImageFolder(str(root), loader=Loader(batch_size=4, num_workers=workers), **{"views": TINY, **changes})


def digests(data: ImageFolder, epochs: int = 2) -> list[list[str]]:
    loader, result = data.train_dataloader(), []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        result.append(
            [hashlib.sha256(images.numpy().tobytes() + repr((labels.tolist(), names)).encode()).hexdigest()
             for images, labels, names in loader]
        )  # fmt: skip
    return result


def test_labels_follow_the_sorted_class_folders_of_training(root: Path) -> None:
    data = folder(root)
    assert data.class_names == ("Dog", "cat", "owl")
    assert data.num_classes == 3
    train, val = data.images("train"), data.images("val")
    assert [train.name(i) for i in range(4)] == [f"train/{name}.jpg" for name in ("Dog/0", "Dog/1", "Dog/2", "cat/0")]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [(val.name(i), int(val.labels[i])) for i in range(2)] == [("val/cat/7.png", 1), ("val/owl/8.jpg", 2)]
    assert data.describe("train") == "train: 9 images of 3 classes, 3 to 3 of each"
    assert data.describe("val") == "val: 2 images of 2 classes, 0 to 1 of each"


def test_folders_below_a_class_and_every_format_are_read(tmp_path: Path) -> None:
    names = ["a/1.JPEG", "a/deep/er/2.png", "a/3.webp", "a/deep/4.bmp", "b/5.gif", "b/6.tiff"]
    root = write(tmp_path, *(f"{split}/{name}" for split in ("train", "val") for name in names))
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/a/.hidden.jpg").write_text("no image")
    (root / "train/.cache").mkdir()
    data = folder(root)
    assert data.describe("train") == "train: 6 images of 2 classes, 2 to 4 of each; files that are no images (.txt): 1"
    images = data.images("train")
    expected = ["a/1.JPEG", "a/3.webp", "a/deep/4.bmp", "a/deep/er/2.png"]
    assert [images.name(i) for i in range(4)] == [f"train/{name}" for name in expected]
    for index in range(len(images)):
        assert data.dataset("train")[0, index][0].shape == (3, 16, 16)


def test_linked_folders_are_followed_but_never_in_circles(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.jpg", "more/2.jpg")
    (tmp_path / "elsewhere/more/back").symlink_to(tmp_path / "elsewhere")
    (root / "train/yak").symlink_to(tmp_path / "elsewhere")
    images = folder(root).images("train")
    assert [images.name(len(images) - i) for i in (2, 1)] == ["train/yak/1.jpg", "train/yak/more/2.jpg"]


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_ways_to_a_folder_the_first_by_name_is_taken(
    backwards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, "train/a/real/1.jpg", "val/a/1.jpg")
    (root / "train/a/link").symlink_to(root / "train/a/real")
    scandir = os.scandir

    @contextmanager
    def scan(folder: Path) -> Iterator[list[os.DirEntry[str]]]:
        """List a folder as this or that file system does."""
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

    monkeypatch.setattr("detpipe.datasets.image_folder.os.scandir", scan)
    images = folder(root).images("train")
    assert [images.name(i) for i in range(len(images))] == ["train/a/link/1.jpg"]


def test_class_names_with_spaces_and_unicode(tmp_path: Path) -> None:
    classes = ["a b", "Ünï", "日本", "x.y"]
    root = write(tmp_path, *(f"{split}/{name}/bild {name}.png" for split in ("train", "val") for name in classes))
    data = folder(root)
    assert data.class_names == tuple(sorted(classes))
    [(_, labels, names)] = data.val_dataloader()
    assert [data.class_names[label] for label in labels.tolist()] == [name.split("/")[1] for name in names]


def test_batches(root: Path) -> None:
    images, labels, names = next(iter(folder(root).val_dataloader()))
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.uint8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.tolist(), labels.dtype) == ([1, 2], torch.int64)
    assert names == ["val/cat/7.png", "val/owl/8.jpg"]


def test_p2_batches_do_not_depend_on_the_number_of_workers(root: Path) -> None:
    expected = digests(folder(root, views=Views(size=16, color=0.4)))
    assert expected[0] != expected[1]
    assert digests(folder(root, 2, views=Views(size=16, color=0.4))) == expected
    assert digests(folder(root, seed=1, views=Views(size=16, color=0.4))) != expected


def test_every_training_image_comes_once_an_epoch_but_for_one_that_is_left_alone(root: Path) -> None:
    loader = folder(root).train_dataloader()  # 9 images, 4 a batch
    assert [len(labels) for _, labels, _ in loader] == [4, 4]
    assert len(loader) == 2
    seen: set[str] = set()
    for epoch in range(12):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        names = [name for _, _, batch in loader for name in batch]
        assert len(set(names)) == 8
        seen.update(names)
    assert len(seen) == 9
    assert len([labels for _, labels, _ in folder(root).val_dataloader()]) == 1


def broken_link(root: Path) -> None:
    (root / "train/owl/gone.jpg").symlink_to(root / "nowhere.jpg")


# fmt: off
BROKEN: list[tuple[Callable[[Path], Any], str, str]] = [  # what is done to the root, the split that shows it, the message
    (lambda root: shutil.rmtree(root / "val"), "val", r"set/val: no such folder; expected ROOT/train/CLASS/IMAGE and ROOT/val"),
    (lambda root: write(root, "val/ILSVRC2012_val_00000001.JPEG"), "val",
        r"set/val holds 1 images outside class folders, such as ILSVRC2012_val_00000001.JPEG; move each"),
    (lambda root: write(root, "val/Cat/1.jpg", "val/zebra/1.jpg"), "val",
        r"set/val has 2 class folders that train lacks: 'Cat', 'zebra'; did you mean 'cat'\?"),
    (lambda root: ((root / "train/emu").mkdir(), (root / "train/emu/notes.txt").touch()), "train",
        r"set/train: 1 class folders hold no image: 'emu' \(looked for .jpg .*\); fill or remove them"),
    (lambda root: (root / "val/Dog").mkdir(), "val", r"set/val: 1 class folders hold no image: 'Dog'"),
    (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "train", r"set/train holds no class folders;"),
    (broken_link, "train", r"set/train: .*train/owl/gone.jpg is a link that leads nowhere, or no file .*on_bad"),
    (lambda root: os.mkfifo(root / "val/owl/pipe.png"), "val", r"set/val: .*val/owl/pipe.png is a link .*, or no file"),
    (lambda root: (root / "train/yak").symlink_to(root / "nowhere"), "train", r"set/train/yak is a link that leads nowhere;"),
]
# fmt: on


@pytest.mark.parametrize(("spoil", "split", "message"), BROKEN)
def test_faults_of_the_layout_are_one_line(spoil: Any, split: Any, message: str, root: Path) -> None:
    spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        folder(root).images(split)
    assert "\n" not in str(caught.value)


def test_a_missing_root_and_bad_arguments(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; expected ROOT/train/CLASS/IMAGE"):
        folder(tmp_path / "nowhere").num_classes  # noqa: B018
    with pytest.raises(ValueError, match="train and val must name folders below the root, got '' and 'val'"):
        folder(root, train="")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(workers: int, root: Path) -> None:
    (root / "train/owl/1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"train/owl/1\.jpg: cannot be decoded as an image"):
        list(folder(root, workers).train_dataloader())


def test_unreadable_images_and_links_that_lead_nowhere_are_skipped_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken_link(root)
    (root / "train/owl/1.jpg").write_bytes(b"")
    (root / "train/cat/2.jpg").write_text("text")
    with caplog.at_level(logging.INFO):
        data = folder(root, on_bad="skip")
        line = "train: 7 images of 3 classes, 2 to 3 of each; images skipped: no file: 1; images skipped: unreadable: 2"
        assert data.describe("train") == line
    assert all(name in caplog.text for name in ("train/owl/1.jpg", "train/cat/2.jpg", "train/owl/gone.jpg"))
    assert data.images("train").labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert len([name for _, _, names in data.train_dataloader() for name in names]) == 7


def test_a_class_without_a_readable_image_is_an_error_even_when_faults_are_skipped(root: Path) -> None:
    (root / "val/owl/8.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"set/val: 1 classes have no readable image: 'owl'; the first fault: .*8\.jpg"):
        folder(root, on_bad="skip").images("val")


def test_packed_names_are_the_names_whatever_bytes_they_have(tmp_path: Path) -> None:
    names = ["a/b.jpg", "ü/日本.png", os.fsdecode(b"\xff\xfe.jpg"), "x" * 300]
    images = LabeledImages(tmp_path, pack_names(names), np.zeros(4, np.int32), ("one",))
    assert [images.name(i) for i in range(len(images))] == names
    assert images.path(1) == tmp_path / "ü" / "日本.png"


def test_a_split_is_a_handful_of_arrays_that_workers_share(root: Path) -> None:
    """Python objects for each image would be copied into every worker as their counts of references change."""
    dataset = folder(root).dataset("train", training=True)
    names = [f"train/n01440764/n01440764_{number}.JPEG" for number in range(20_000)]
    large = pack_names(names)
    object.__setattr__(dataset.images, "names", large)
    assert len(pickle.dumps(dataset)) < sum(map(len, names)) + 10 * len(names) + 10_000
    assert pickle.loads(pickle.dumps(dataset)).images.name(19_999) == names[-1]
