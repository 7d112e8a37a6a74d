from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detpipe.datasets import Loader, Views, load_coco, read_image
from detpipe.demo import DemoDigits, DemoScenes, write_digits
from detpipe.demo.digits import CONTEXT, MARKER, window
from detpipe.support.errors import DataError

SCENES = DemoScenes(train=12, val=6, size=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder / "digits", folder / "demo", SCENES)
    return folder


def test_every_object_of_the_scenes_is_cut_out_with_its_surroundings(base: Path) -> None:
    for split in ("train", "val"):
        scenes = load_coco(base / f"demo/coco/annotations/instances_{split}.json", base / "demo/coco" / split)
        assert len(list((base / "digits" / split).rglob("*.jpg"))) == len(scenes.boxes) > 10
        for row, name in enumerate(scenes.file_names.tolist()):
            scene = read_image(scenes.root / name)
            first, last = scenes.offsets[row], scenes.offsets[row + 1]
            for number, index in enumerate(range(first, last)):
                digit = scenes.class_names[scenes.labels[index] - 1]
                crop = read_image(base / "digits" / split / digit / f"{Path(name).stem}_{number}.jpg")
                x1, y1, x2, y2 = scenes.boxes[index]
                x, y, side = window([x1, y1, x2, y2], 64)
                assert crop.shape == (3, side, side)
                assert x <= x1 and y <= y1 and x2 <= x + side and y2 <= y + side  # noqa: PT018
                again = scene[:, y : y + side, x : x + side]
                assert (crop.int() - again.int()).abs().float().mean() < 12  # saved as JPEG twice


def test_a_window_has_context_on_every_side_and_stays_inside() -> None:
    assert window([60, 60, 80, 100], 160) == (40, 50, 60)
    assert window([0, 100, 20, 160], 160) == (0, 70, 90)
    assert window([0, 0, 60, 60], 64) == (0, 0, 64)
    assert (1 + 2 * CONTEXT) * 40 == 60


def test_the_set_is_used_again_and_equal_to_the_byte(base: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (base / "digits").rglob("*")}
    write_digits(base / "digits", base / "demo", SCENES)
    assert {path: path.stat().st_mtime_ns for path in (base / "digits").rglob("*")} == before
    other = write_digits(tmp_path / "digits", base / "demo", SCENES)
    names = sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(base / "digits") for path in before if path.is_file())
    assert all((other / name).read_bytes() == (base / "digits" / name).read_bytes() for name in names)
    assert "danielbuechele" in (other / "CREDITS.txt").read_text()


def test_the_data_module_makes_what_is_missing(tmp_path: Path) -> None:
    data = DemoDigits(
        str(tmp_path / "digits"), str(tmp_path / "demo"), SCENES, Loader(4, num_workers=0), Views(size=24, flip=0.0)
    )
    assert data.class_names == tuple("0123456789")
    content = json.loads((tmp_path / "digits" / MARKER).read_text())
    assert len(data.images("train")) == content["images"]["train"]
    images, labels, names = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 24, 24)
    assert [name.split("/")[1] for name in names] == [str(label) for label in labels.tolist()]
    data.prepare_data()
    assert np.bincount(data.images("val").labels, minlength=10).sum() == content["images"]["val"]


def test_digits_are_not_flipped_by_default(base: Path) -> None:
    data = DemoDigits(str(base / "digits"), str(base / "demo"), SCENES)
    assert (data.views.flip, data.views.size) == (0.0, 64)


def test_a_folder_of_something_else_or_of_other_scenes_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"digits holds digits of other scenes, .*'train': 12.*'train': 13.*: name another"
    ):
        write_digits(base / "digits", base / "demo", DemoScenes(train=13, val=6, size=64))
    with pytest.raises(DataError, match=r"demo exists and is not the demo digits \(it has no digits.json\)"):
        write_digits(base / "demo", base / "demo", SCENES)
    (tmp_path / MARKER).write_text("{}")
    with pytest.raises(DataError, match=r"digits.json is not the marker of the demo digits"):
        write_digits(tmp_path, base / "demo", SCENES)
