from __future__ import annotations

import json
import logging
import multiprocessing
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detpipe.datasets import annotation_cache, coco_json, coco_quick, load_coco
from detpipe.datasets.annotation_cache import AnnotationCache, cache_of
from detpipe.errors import DataError
from detpipe.types import Annotations

from .builders import coco_content, write_coco


@pytest.fixture(autouse=True)
def _small_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_quick, "cache_of", lambda setting: small(cache_of(setting)))


def small(cache: AnnotationCache | None) -> AnnotationCache | None:
    return cache and AnnotationCache(cache.folder, smallest=0)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def same(a: Annotations, b: Annotations) -> None:
    np.testing.assert_equal(vars(a), vars(b))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """After a call, nothing but the cache may be read."""

    def forbid() -> None:
        monkeypatch.setattr(coco_quick, "read_quickly", lambda _: pytest.fail("read the file"))
        monkeypatch.setattr(coco_json, "_top_level", lambda _: pytest.fail("read the file strictly"))

    return forbid


def test_every_field_comes_back_from_the_cache(tmp_path: Path, unread: Any) -> None:
    path, folder = write_coco(tmp_path)
    first = load_coco(path, folder, cache=tmp_path / "kept")
    assert len(entries(tmp_path / "kept")) == 1
    unread()
    again = load_coco(path, folder, cache=tmp_path / "kept")
    same(first, again)
    for field in fields(Annotations):  # a part that the cache does not carry must not be one that reading gives
        value = getattr(first, field.name)
        assert type(value) is type(getattr(again, field.name))
        if isinstance(value, np.ndarray):
            assert value.dtype == getattr(again, field.name).dtype


def test_a_copy_shares_the_entry_and_a_change_makes_another(tmp_path: Path, unread: Any) -> None:
    path, folder = write_coco(tmp_path)
    kept = tmp_path / "kept"
    load_coco(path, folder, cache=kept)
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 2, 10, 21]
    stat = path.stat()
    path.write_text(json.dumps(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as old and as large as before: only the content tells
    assert path.stat().st_size == stat.st_size
    assert load_coco(path, folder, cache=kept).boxes[0].tolist() == [1, 2, 11, 23]
    assert len(entries(kept)) == 2
    unread()
    (tmp_path / "copy.json").write_bytes(path.read_bytes())
    assert load_coco(tmp_path / "copy.json", folder, cache=kept).boxes[0].tolist() == [1, 2, 11, 23]


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "text"])
def test_a_damaged_entry_is_reported_and_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, unread: Any
) -> None:
    path, folder = write_coco(tmp_path)
    first = load_coco(path, folder, cache=tmp_path / "kept")
    (entry,) = entries(tmp_path / "kept")
    content = bytearray(entry.read_bytes())
    sound = bytes(content)
    content[len(content) // 2] ^= 1
    entry.write_bytes({"a byte": bytes(content), "cut": sound[:-9], "empty": b"", "text": b"hello"}[damage])
    with caplog.at_level(logging.WARNING):
        same(load_coco(path, folder, cache=tmp_path / "kept"), first)
    assert f"{entry}: damaged" in caplog.text
    assert entry.read_bytes() == sound
    unread()
    same(load_coco(path, folder, cache=tmp_path / "kept"), first)


def test_files_are_checked_as_well_when_annotations_come_from_the_cache(tmp_path: Path, unread: Any) -> None:
    path, folder = write_coco(tmp_path)
    kept = tmp_path / "kept"
    load_coco(path, folder, cache=kept)
    unread()
    (folder / "0.jpg").rename(tmp_path / "0.jpg")
    with pytest.raises(DataError, match=r"image id 10: file_name '0\.jpg' is missing"):  # row 22
        load_coco(path, folder, cache=kept)
    assert load_coco(path, folder, "skip", kept).counts["images skipped: file missing"] == 1
    (folder / "0.jpg").symlink_to(tmp_path / "0.jpg")
    with pytest.raises(DataError, match="is a link that leads out"):  # row 29
        load_coco(path, folder, cache=kept)
    with pytest.raises(DataError, match="no such image folder"):
        load_coco(path, tmp_path / "nowhere", cache=kept)


def test_boxes_are_checked_each_time_and_faulty_records_are_never_kept(tmp_path: Path, unread: Any) -> None:
    content = coco_content()
    content["annotations"][1]["bbox"] = [500, 5, 3, 3]
    path, folder = write_coco(tmp_path, content)
    kept = tmp_path / "kept"
    messages = []
    for _ in range(2):
        with pytest.raises(DataError, match=r"id 101 .*wholly outside") as caught:
            load_coco(path, folder, cache=kept)
        messages.append(str(caught.value))
        unread()
    assert messages[0] == messages[1]
    assert load_coco(path, folder, "skip", kept).counts["boxes skipped: wholly outside the image"] == 1


def test_a_file_with_a_fault_gets_no_entry(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1].pop("bbox")
    path, folder = write_coco(tmp_path, content)
    load_coco(path, folder, "skip", tmp_path / "kept")
    assert entries(tmp_path / "kept") == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, folder = write_coco(tmp_path)
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert len(load_coco(path, folder, cache=tmp_path / "file" / "kept")) == 3
    assert "DETPIPE_CACHE" in caplog.text


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    array = {"x": np.zeros(1000, dtype=np.uint8)}
    cache = AnnotationCache(tmp_path, limit=3500)
    for i, name in enumerate("abc"):
        cache.store(name, array)
        os.utime(tmp_path / f"{name}.arrays", (i, i))
    assert cache.load("a") is not None  # used again: now b is the oldest
    cache.store("d", array)
    assert [path.stem for path in entries(tmp_path)] == ["a", "c", "d"]
    AnnotationCache(tmp_path, limit=10).store("e", array)  # the newest stays in any case
    assert [path.stem for path in entries(tmp_path)] == ["e"]


def _store(folder: Path, seed: int) -> None:
    for _ in range(20):
        AnnotationCache(folder).store("key", {"x": np.full(10_000, 7)})


def test_writers_at_the_same_time_leave_one_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_store, args=(tmp_path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for _ in range(50):
        arrays = AnnotationCache(tmp_path).load("key")
        assert arrays is None or (arrays["x"] == 7).all()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert [path.name for path in entries(tmp_path)] == ["key.arrays"]


def test_where_entries_lie_is_the_users_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(annotation_cache._VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = cache_of(None)
    assert cache is not None
    assert cache.folder == tmp_path / "detpipe" / "annotations"
    monkeypatch.setenv(annotation_cache._VARIABLE, str(tmp_path / "mine"))
    cache = cache_of(None)
    assert cache is not None
    assert cache.folder == tmp_path / "mine"
    monkeypatch.setenv(annotation_cache._VARIABLE, "off")
    assert cache_of(None) is None
    assert cache_of("off") is None
    with pytest.raises(ValueError, match="cache must be a folder"):
        cache_of("")


def test_small_files_get_no_entry(tmp_path: Path) -> None:
    path, _ = write_coco(tmp_path)
    assert AnnotationCache(tmp_path / "kept").key(path, "x") is None
