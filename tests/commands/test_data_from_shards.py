"""The commands on data, given shards: what they say and write is what they say and write of the files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets.file_server import serving
from datasets.shard_cases import files_in, pack
from datasets.test_shards_faults import change_arrays, spoil

from detpipe import cli
from detpipe.commands.proposal_making import run_make
from detpipe.datasets.datamodule import image_files
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.datasets.image_files import image_paths
from detpipe.datasets.shards.index import read_index
from detpipe.support.errors import DataError, UsageError

from .test_make_shards import content_of

main = partial(cli.run, group="data")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Eleven images in COCO layout, twice, one of them with a crowd."""
    files_in(tmp_path / "files")
    path = tmp_path / "files" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    return tmp_path / "files"


@pytest.fixture
def shards(files: Path, tmp_path: Path) -> Path:
    """The same, two images a shard."""
    return pack(files_in(files), tmp_path / "shards")


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints, without the names of its data."""
    assert main(arguments) == 0
    return capsys.readouterr().out.replace(arguments[1], "DATA")


def test_links_are_of_image_files(shards):
    with pytest.raises(
        UsageError, match="--allow-links: is for image files, which shards hold themselves; leave it out"
    ):
        main(["info", str(shards), "--allow-links"])


def test_splits_are_the_folders_with_an_index(shards):
    (shards / "test.partial").mkdir()
    assert recognize(str(shards)).layout == "shards"
    assert recognize(str(shards)).splits == ("train", "val")
    assert recognize(str(shards / "val")).splits == ("val",)
    one, other = (open_split(path, "val").annotations("val") for path in (str(shards), str(shards / "val")))
    assert np.array_equal(one.boxes, other.boxes)
    with pytest.raises(UsageError, match=r"has several splits: name one with --split; there are train, val"):
        open_split(str(shards), None)
    with pytest.raises(UsageError, match=r"--split vall: .* has no such split; there are train, val; did you mean"):
        main(["info", str(shards), "--split", "vall"])


@pytest.mark.slow
def test_info_says_of_shards_what_it_says_of_files(files, shards, tmp_path, capsys):
    expected = told(["info", str(files), "-o", str(tmp_path / "one")], capsys).replace(str(tmp_path / "one"), "OUT")
    found = told(["info", str(shards), "-o", str(tmp_path / "two")], capsys).replace(str(tmp_path / "two"), "OUT")
    (first, found), (_, expected) = (shown.split("\n", 1) for shown in (found, expected))  # how it is read
    assert first == "read as shards: 2 folders of shards"
    assert found.partition("to train on")[0] == expected.partition("to train on")[0]
    assert "configs/data/shards.yaml" in found.partition("to train on")[2]
    assert "train: 11 images, 4 boxes, 3 classes" in found
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_show_draws_the_same_pictures(files, shards, tmp_path):
    for name, path in (("one", files), ("two", shards)):
        assert main(["show", str(path), "-o", str(tmp_path / name), "-n", "5", "--classes", "cat", "dog"]) == 0
    drawn = content_of(tmp_path / "one")
    assert len(drawn) == 4
    assert content_of(tmp_path / "two") == drawn


def test_show_leaves_out_proposals_that_ride_along(files, tmp_path):
    store = tmp_path / "boxes.safetensors"
    assert run_make(["dense_grid", "--data", str(files), "--split", "val", "-o", str(store)]) == 0
    given = ["--split", "val", "--proposals", str(store)]
    assert main(["shards", str(files), "-o", str(tmp_path / "shards"), *given]) == 0
    assert main(["show", str(tmp_path / "shards"), "-o", str(tmp_path / "a.png"), "--classes", "cat"]) == 0
    assert main(["show", str(files), "--split", "val", "-o", str(tmp_path / "b.png"), "--classes", "cat"]) == 0


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo", "csv"])
def test_convert_writes_the_same_folder(layout, files, shards, tmp_path, capsys):
    flags = ["--split", "val"] if layout == "voc" else ["--drop-flags"] if layout == "yolo" else []
    for name, path in (("one", files), ("two", shards)):
        assert main(["convert", str(path), "--to", layout, "-o", str(tmp_path / name), *flags]) == 0
    expected, found = content_of(tmp_path / "one"), content_of(tmp_path / "two")
    assert sum(name.endswith(".jpg") for name in found) == (11 if layout == "voc" else 22)
    assert found == expected
    capsys.readouterr()


def test_convert_cannot_link_a_part_of_a_shard(shards, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["data", "convert", str(shards), "--to", "coco", "-o", str(out), "--image-files", "link"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert ".jpg): cannot be linked, it is a part of a shard: copy the images instead" in error
    assert not out.exists()


def test_split_divides_shards(files, shards, tmp_path):
    for name, path in (("one", files), ("two", shards)):
        options = ["--split", "train", "--split", "val", "--parts", "a=.5,b=.5", "-o", str(tmp_path / name)]
        assert main(["split", str(path), *options]) == 0
    assert content_of(tmp_path / "two") == content_of(tmp_path / "one")
    parts = [open_split(str(tmp_path / "two"), part).annotations("val") for part in "ab"]
    assert sum(map(len, parts)) == 22


def test_shards_of_shards_are_refused(shards, tmp_path):
    with pytest.raises(UsageError, match=r"shards holds shards already: for other ones, bring it into COCO layout"):
        main(["shards", str(shards), "-o", str(tmp_path / "out")])


def test_check_says_of_shards_what_it_says_of_files(files, shards, capsys):
    expected, found = ([main(["check", str(path)]), capsys.readouterr().out] for path in (files, shards))
    assert found[0] == expected[0] == 0
    for _, text in (expected, found):
        assert "train: 11 of 11 images and 4 of 4 boxes can be used; boxes clipped: 1" in text
        assert "images: the same in several splits (11)" in text
    assert "0 errors, 12 warnings; all images decoded" in expected[1]  # the clipped box is named with its annotation,
    assert "0 errors, 11 warnings; all images decoded" in found[1]  # and only counted where it was clipped before
    assert "train/shard-00000" in found[1]


def test_check_names_every_image_that_is_damaged(shards, tmp_path, capsys):
    known = read_index(shards / "train")
    damaged = [0, 4]  # the first has two of the four boxes
    for row in damaged:
        path = shards / "train" / known.shards[int(known.shard[row])].name
        spoil(path, int(known.images[row, 0]) + 200)
    assert main(["check", str(shards), "--json", str(tmp_path / "faults.json")]) == 1
    shown = capsys.readouterr().out
    assert (
        "train: 9 of 11 images and 2 of 4 boxes can be used; boxes clipped: 1; images skipped: unreadable: 2" in shown
    )
    assert shown.endswith("training stops where it reads such an image: copy the shards again, or write them again\n")
    faults = json.loads((tmp_path / "faults.json").read_text())
    messages = faults["errors"]["images: unreadable"]
    for row, message in zip(damaged, messages, strict=True):
        assert f"({known.annotations.file_names[row]}): the file of image id" in message
        assert "is damaged or changed since its index was written" in message
    counts = faults["splits"]["train"]
    assert counts["images read"] == counts["images used"] + counts["images skipped: unreadable"] == 11
    assert counts["boxes read"] == counts["boxes used"] + counts["boxes skipped: image skipped"] == 4
    assert len(faults["warnings"]["images: the same in several splits"]) == 9  # the others
    assert (
        main(["check", str(shards), "--split", "train", "--no-decode"]) == 1
    )  # those that are compared are read all the same
    assert "images: unreadable (" in capsys.readouterr().out


def test_check_names_a_size_that_differs_and_shards_that_are_missing(shards, capsys):
    sizes = read_index(shards / "train").annotations.sizes.copy()
    sizes[3] += 5
    change_arrays(shards / "train", sizes=sizes)
    (shards / "val" / "shard-000001.tar").unlink()
    assert main(["check", str(shards)]) == 1
    shown = capsys.readouterr().out
    assert "images: size differs from the annotation (1)" in shown
    assert "shard-000001.tar: no such file" in shown
    assert "2 errors" in shown
    assert "training refuses these data: copy the shards again" in shown


def test_check_of_shards_without_a_sound_image(shards, capsys):
    for path in shards.glob("train/*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert main(["check", str(shards), "--split", "train"]) == 1
    assert "none of its 11 images can be read" in capsys.readouterr().out


@pytest.mark.slow
def test_proposals_are_made_from_shards(files, shards, tmp_path):
    """By one process and by two, which open the shards for themselves."""
    made = []
    for path, workers in ((files, 1), (shards, 1), (shards, 2)):
        store = tmp_path / f"{path.name}{workers}.safetensors"
        options = ["--split", "val", "--workers", str(workers)]
        assert run_make(["selective_search", "--data", str(path), "-o", str(store), *options]) == 0
        made.append(store.read_bytes())
    assert made[0] == made[1] == made[2]


def test_shards_on_a_server(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = {f"/set/{name}": value for name, value in content_of(shards).items()}
    with serving(files=content) as server:
        address = f"{server.url}/set"
        with pytest.raises(UsageError, match=r"a server is not asked which splits it has: name one with --split"):
            main(["info", address])
        assert main(["check", address, "--split", "train", "--split", "val"]) == 0
        assert "train: 11 of 11 images" in capsys.readouterr().out
        assert main(["show", address, "--split", "val", "-o", str(tmp_path / "sheet.png")]) == 0
        assert main(["convert", address, "--split", "val", "--to", "csv", "-o", str(tmp_path / "table")]) == 0
    assert len(list((tmp_path / "table" / "images").rglob("*.jpg"))) == 11


def test_image_files_measure_and_read(files, shards):
    plain, packed = (open_split(str(path), "val") for path in (files, shards))
    source = image_files([plain, packed])
    pairs = list(zip(image_paths(plain.annotations("val")), image_paths(packed.annotations("val")), strict=True))
    assert len(pairs) == 11
    for own, inside in pairs:
        assert own not in source
        assert inside in source
        assert source.size(inside) == source.size(own) == own.stat().st_size
        assert source.read(inside) == source.read(own)
        assert source.name(own) == str(own)
        assert source.name(inside).endswith(f".tar ({own.name})")
    known = read_index(shards / "val")
    spoil(shards / "val" / known.shards[int(known.shard[7])].name, int(known.images[7, 0]) + 50)
    with pytest.raises(DataError, match="damaged or changed"):
        source.read(pairs[7][1])
