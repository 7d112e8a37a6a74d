import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detpipe.datasets.datamodule import Loader
from detpipe.demo import dataset as demo
from detpipe.demo import scenes as demo_scenes
from detpipe.demo.dataset import MARKER, Demo, DemoScenes, write_demo
from detpipe.demo.scenes import Stock, compose_scene, load_stock
from detpipe.support.errors import DataError, UsageError

SCENES = DemoScenes(train=6, val=4, size=128, seed=3)
REPOSITORY = Path(__file__).parents[2]


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start_writer(root: Path, train: int) -> subprocess.Popen:
    code = (
        "import sys; from detpipe.demo.dataset import DemoScenes, write_demo; "
        f"write_demo(sys.argv[1], DemoScenes(train={train}, val=4, size=128, seed=3))"
    )
    command = [sys.executable, "-c", code, str(root)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("data") / "demo", SCENES)


@pytest.fixture(scope="module")
def stocks():
    return load_stock(0)


@pytest.fixture(scope="module")
def scenes(stocks):
    return [compose_scene(np.random.default_rng(k), stocks["train"], 160) for k in range(120)]


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(root, tmp_path):
    again = write_demo(tmp_path / "again", SCENES)
    assert contents(again) == contents(root)
    other = write_demo(tmp_path / "other", DemoScenes(train=6, val=4, size=128, seed=4))
    assert (other / "coco/train/000001.jpg").read_bytes() != (root / "coco/train/000001.jpg").read_bytes()


def test_scenes_do_not_depend_on_their_number(root, tmp_path):
    smaller = write_demo(tmp_path / "smaller", DemoScenes(train=2, val=1, size=128, seed=3))
    for small, large in (
        ("train/000001", "train/000001"),
        ("train/000002", "train/000002"),
        ("val/000003", "val/000007"),
    ):
        assert (smaller / f"coco/{small}.jpg").read_bytes() == (root / f"coco/{large}.jpg").read_bytes()


def test_every_file_is_there_and_nothing_else(root):
    assert sorted(contents(root)) == sorted(demo._file_names(SCENES))
    assert len(json.loads((root / MARKER).read_text())["sha256"]) == 64
    assert names(root.parent) == ["demo"]


def test_images_are_stored_once(root):
    for split in ("train", "val"):
        for name in SCENES.names(split):
            assert (root / f"coco/{split}/{name}.jpg").samefile(root / f"voc/JPEGImages/{name}.jpg")


def test_images_are_copied_where_there_are_no_hard_links(root, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    assert contents(write_demo(tmp_path / "demo", SCENES)) == contents(root)


def test_both_layouts_load_and_carry_the_same_boxes(root):
    for split, count in (("train", 6), ("val", 4)):
        coco = Demo(str(root), "coco", SCENES).annotations(split)
        voc = Demo(str(root), "voc", SCENES).annotations(split)
        assert len(coco) == len(voc) == count
        assert coco.class_names == voc.class_names == tuple("0123456789")
        assert [Path(name).name for name in coco.file_names] == [Path(name).name for name in voc.file_names]
        for field in ("sizes", "offsets", "boxes", "labels", "iscrowd", "difficult", "area"):
            np.testing.assert_array_equal(getattr(coco, field), getattr(voc, field), err_msg=field)
        assert len(coco.boxes) > 0
        assert (coco.sizes == 128).all()


def test_data_module_generates_and_gives_batches(tmp_path):
    data = Demo(str(tmp_path / "demo"), scenes=SCENES, loader=Loader(batch_size=3, num_workers=0))
    data.prepare_data()
    assert (tmp_path / "demo" / MARKER).is_file()
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert [image.shape for image in images] == [(3, 128, 128)] * 3
    assert all(target["boxes"].shape == (len(target["labels"]), 4) for target in targets)
    assert data.num_classes == 10


def test_there_is_no_test_split(root):
    with pytest.raises(DataError, match="test"):
        Demo(str(root), scenes=SCENES).annotations("test")


def test_second_call_writes_nothing(root, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    monkeypatch.setattr(demo, "load_stock", lambda seed: pytest.fail("generated again"))
    assert write_demo(root, SCENES) == root
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


@pytest.mark.parametrize("change", ["scenes", "version"])
def test_other_scenes_or_version_are_replaced(tmp_path, monkeypatch, change):
    root = write_demo(tmp_path / "demo", DemoScenes(train=2, val=1, size=128))
    wanted = DemoScenes(train=1, val=1, size=128) if change == "scenes" else DemoScenes(train=2, val=1, size=128)
    if change == "version":
        monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    write_demo(root, wanted)
    assert sorted(contents(root)) == sorted(demo._file_names(wanted))
    assert json.loads((root / MARKER).read_text())["version"] == demo.VERSION
    assert names(tmp_path) == ["demo"]


def test_a_set_among_other_files_is_not_replaced(tmp_path):
    root = write_demo(tmp_path / "demo", DemoScenes(train=2, val=1, size=128))
    (root / "voc" / "notes.txt").write_text("mine")
    before = contents(root)
    with pytest.raises(DataError, match=r"voc/notes\.txt"):
        write_demo(root, DemoScenes(train=1, val=1, size=128))
    assert contents(root) == before


@pytest.mark.parametrize("marker", [None, "{", "[]", '{"version": 1}', '{"version": 1, "scenes": {"trian": 2}}'])
def test_a_folder_that_is_something_else_is_an_error(tmp_path, marker):
    root = tmp_path / "demo"
    root.mkdir()
    (root / "holiday.jpg").write_text("mine")
    if marker is not None:
        (root / MARKER).write_text(marker)
    with pytest.raises(DataError, match="demo") as caught:
        write_demo(root, SCENES)
    assert "remove this one" in str(caught.value)
    assert (root / "holiday.jpg").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "demo").mkdir()
    assert (write_demo(tmp_path / "demo", DemoScenes(train=1, val=1)) / MARKER).is_file()


def test_a_failed_generation_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return compose_scene(*args)

    monkeypatch.setattr(demo, "compose_scene", fail_later)
    with pytest.raises(RuntimeError, match="out of luck"):
        write_demo(tmp_path / "demo", SCENES)
    assert names(tmp_path) == []


@pytest.mark.slow
def test_a_killed_generation_leaves_nothing_under_the_final_name(tmp_path):
    process = start_writer(tmp_path / "demo", train=5000)
    assert process.stderr is not None
    assert process.stderr.read(10) == b"Generating"
    process.kill()
    process.wait(timeout=10)
    process.stderr.close()
    assert not (tmp_path / "demo").exists()
    assert len(names(tmp_path)) == 1
    write_demo(tmp_path / "demo", SCENES)
    assert names(tmp_path) == ["demo"]


@pytest.mark.slow
def test_two_processes_at_once_agree(root, tmp_path):
    writers = [start_writer(tmp_path / "demo", train=6) for _ in range(2)]
    for writer in writers:
        _, messages = writer.communicate(timeout=60)
        assert writer.returncode == 0, messages.decode()
    assert contents(tmp_path / "demo") == contents(root)
    assert names(tmp_path) == ["demo"]


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"detpipe\[train\]"):
        write_demo(tmp_path / "demo", SCENES)
    assert names(tmp_path) == []


def test_unknown_layout_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="yolo"):
        Demo(str(tmp_path), layout="yolo")  # type: ignore[arg-type]


def test_digits_of_the_splits_are_disjoint(root, stocks):
    train, val = stocks["train"].samples, stocks["val"].samples
    assert not set(train) & set(val)
    assert len(train) + len(val) == 1797
    assert set(stocks["val"].labels) == set(range(10))
    written = {}
    for split in ("train", "val"):
        content = json.loads((root / f"coco/annotations/instances_{split}.json").read_text())
        written[split] = {annotation["sample"] for annotation in content["annotations"]}
    assert not written["train"] & written["val"]


def test_photographs_of_the_splits_are_disjoint(stocks):
    for train, val in zip(stocks["train"].photographs, stocks["val"].photographs, strict=True):
        assert train.shape[1] + val.shape[1] == 640


def test_scenes_hold_what_they_should(scenes):
    counts = np.array([len(scene.boxes) for scene in scenes])
    assert 0 < (counts == 0).mean() < 0.1
    assert counts.max() == 7
    assert {label for scene in scenes for label in scene.labels.tolist()} == set(range(1, 11))
    boxes = np.concatenate([scene.boxes for scene in scenes])
    assert boxes.min() >= 0
    assert boxes.max() <= 160
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert longer.min() >= 16
    assert longer.max() <= 66
    assert (longer < 28).sum() > 50
    assert (longer > 50).sum() > 50


def test_some_digits_overlap_but_not_too_much(scenes):
    ious = [
        demo_scenes._iou(tuple(a), tuple(b))
        for scene in scenes
        for k, a in enumerate(scene.boxes.tolist())
        for b in scene.boxes.tolist()[:k]
    ]
    assert sum(iou > 0.05 for iou in ious) > 20
    assert max(ious) < 0.3  # of the whole digits at most .2, of their visible parts sometimes a little more


def test_empty_scenes_have_right_shaped_arrays(scenes):
    empty = next(scene for scene in scenes if len(scene.labels) == 0)
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.dtype == np.int64
    assert empty.image.shape == (160, 160, 3)
    assert empty.image.std() > 0


def test_boxes_are_tight_around_ink_that_stands_out(stocks, monkeypatch):
    monkeypatch.setattr(demo_scenes, "FRAGMENTS_PER_SCENE", (0, 0))
    monkeypatch.setattr(demo_scenes, "DIGITS_PER_SCENE", (1, 1))
    monkeypatch.setattr(demo_scenes, "EMPTY_SHARE", 0.0)
    whole = stocks["val"]
    plain = Stock(whole.ink, whole.labels, whole.samples, [np.full((200, 200, 3), 90, dtype=np.uint8)])
    for seed in range(40):
        scene = compose_scene(np.random.default_rng(seed), plain, 160)
        corners = scene.image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)
        difference = np.abs(scene.image - np.median(corners, axis=0)).max(axis=2)
        assert difference.max() > 60
        rows, columns = np.nonzero(difference >= 0.5 * difference.max())
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(scene.boxes[0] - seen).max() <= 2, (seed, scene.boxes[0], seen)


def test_box_of_a_digit_that_is_partly_covered_is_that_of_its_visible_part():
    owner = np.full((8, 8), -1)
    owner[1:4, 1:6] = 0
    owner[1:7, 4:8] = 1
    assert demo_scenes._extent(owner == 0) == (1, 1, 4, 4)
    assert demo_scenes._extent(owner == 1) == (4, 1, 8, 7)


def test_color_keeps_away_from_both_grays_under_the_ink():
    under = np.array([0.0] * 50 + [255.0] * 50, dtype=np.float32)
    levels = {demo_scenes._contrasting_level(np.random.default_rng(k), under) for k in range(30)}
    assert min(levels) >= 85
    assert max(levels) <= 170


def test_files_are_images_of_the_scenes(root):
    with Image.open(root / "coco/train/000001.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (128, 128))


def test_credits_travel_with_the_set(root):
    text = (root / "CREDITS.txt").read_text()
    for name in ("Alpaydin", "danielbuechele", "vultilion", "CC BY 2.0"):
        assert name in text
