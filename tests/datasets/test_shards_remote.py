from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from detpipe.datasets import Loader, Shards
from detpipe.datasets.fetch import Patience, read_url
from detpipe.datasets.shards.index import ARRAYS, INDEX
from detpipe.datasets.shards.remote import ShardCache, lock_of
from detpipe.datasets.shards.write import Sharding, make_shards
from detpipe.support.errors import DataError, DownloadError

from .file_server import Behavior, bucket, serving
from .shard_cases import AUGMENT, hashes, shards_in, tiny_annotations

ONCE = Counter([f"/set/train/{name}" for name in (INDEX, ARRAYS, *(f"shard-{n:06d}.tar" for n in range(6)))])
QUICK = Patience(attempts=2, timeout=30.0, wait=0.0)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from detpipe.datasets import fetch

    for function in (fetch.read_url, fetch.fetch):
        names = function.__defaults__ or ()
        changed = tuple(QUICK if isinstance(value, Patience) else value for value in names)
        monkeypatch.setattr(function, "__defaults__", changed)


def content_of(root: Path) -> dict[str, bytes]:
    return {f"/set/{p.relative_to(root).as_posix()}": p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def server(eleven: Path) -> Iterator[Behavior]:
    with serving(files=content_of(eleven / "shards")) as behavior:
        yield behavior


def remote(server: Behavior, tmp_path: Path, workers: int = 0, gigabytes: float = 1.0, **changes: Any) -> Shards:
    cache = ShardCache(str(tmp_path / "cache"), gigabytes)
    loader = Loader(batch_size=3, num_workers=workers)
    return Shards(f"{server.url}/set", loader=loader, cache=cache, **{"augment": AUGMENT, **changes})


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "shards").glob("*/shard-*.tar"))


def batches(data: Shards, epoch: int) -> list[tuple[list[Any], list[Any]]]:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
    return [(images, targets) for images, targets in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_shards_and_each_shard_is_fetched_once(
    workers: int, server: Behavior, eleven: Path, tmp_path: Path
) -> None:
    expected = hashes(shards_in(eleven / "shards"))
    assert hashes(remote(server, tmp_path, workers)) == expected
    assert Counter(path for path, _ in server.requests) == ONCE
    server.requests.clear()
    assert hashes(remote(server, tmp_path, workers)) == expected
    assert server.requests == [(f"/set/train/{INDEX}", None)]  # another run has all the rest


def test_batches_from_an_object_store_are_those_of_local_shards(
    eleven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bucket(monkeypatch, content_of(eleven / "shards"))
    loader, cache = Loader(batch_size=3, num_workers=0), ShardCache(str(tmp_path / "cache"))
    data = Shards("s3://set", loader=loader, cache=cache, augment=AUGMENT)
    assert hashes(data, 1) == hashes(shards_in(eleven / "shards"), 1)
    assert Counter(store.asked) == ONCE


@contextmanager
def cramped(tmp_path: Path, count: int, per_shard: int, workers: int = 0) -> Iterator[tuple[Behavior, Shards, int]]:
    """Shards on a server, and a folder with room for two windows of two."""
    sharding = Sharding(images_per_shard=per_shard, decode=False)
    make_shards(tiny_annotations(tmp_path / "images", count), tmp_path / "set" / "train", "train", sharding=sharding)
    with serving(files=content_of(tmp_path / "set")) as server:
        limit = 4 * max(len(content) for name, content in server.files.items() if name.endswith(".tar"))
        yield server, remote(server, tmp_path, workers, limit / 1e9, augment=None, window=2), limit


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_folder_never_holds_more_than_it_may(workers: int, tmp_path: Path) -> None:
    with cramped(tmp_path, 24, 3, workers) as (server, data, limit):
        ids = sorted(data.annotations("train").image_ids.tolist())
        for epoch in range(3):
            found = batches(data, epoch)
            assert sorted(int(target["image_id"]) for _, targets in found for target in targets) == ids
            assert sum(path.stat().st_size for path in kept(tmp_path)) <= limit
        asked = [path for path, _ in server.requests if path.endswith(".tar")]
        assert set(asked) == {f"/set/train/shard-{n:06d}.tar" for n in range(8)}
        assert len(asked) > 8  # some were deleted, and fetched again


@pytest.mark.slow
def test_a_folder_with_room_for_two_windows_gets_each_shard_once_an_epoch(tmp_path: Path) -> None:
    with cramped(tmp_path, 960, 80) as (server, data, _):
        for epoch in range(3):
            server.requests.clear()
            assert sum(len(images) for images, _ in batches(data, epoch)) == 960
            counts = Counter(path for path, _ in server.requests if path.endswith(".tar"))
            assert set(counts.values()) == {1}
            assert len(counts) == 12 if epoch == 0 else 6 <= len(counts) <= 12


def test_what_comes_at_the_same_time_is_counted_whole(server: Behavior, eleven: Path, tmp_path: Path) -> None:
    """Of a shard that is being fetched only a part is there, but all of it will be."""
    from detpipe.datasets.shards import remote as module

    files: Any = remote(server, tmp_path).contents("train")
    first, second, third = files.shards.shards[:3]
    opened = files.opener(0)[1]
    cache = ShardCache(str(tmp_path / "cache"), (first.bytes + second.bytes + 1) / 1e9)
    module._make_room(cache, module._folder(cache, second))  # and nothing of it has arrived
    assert opened.exists()
    with module.lock_of(cache, module._folder(cache, second).name):
        module._make_room(cache, module._folder(cache, third))
    assert not opened.exists()
    assert module._folder(cache, second).exists()


def test_the_shard_that_was_opened_least_lately_goes_first_and_one_in_use_stays(
    server: Behavior, eleven: Path, tmp_path: Path
) -> None:
    data = remote(server, tmp_path)
    files: Any = data.contents("train")
    opened = [files.opener(number)[1] for number in (0, 1, 2)]
    for age, path in zip((30, 10, 20), opened, strict=True):
        os.utime(path.parent, (1000 - age, 1000 - age))
    sizes = [path.stat().st_size for path in opened]
    small = ShardCache(str(tmp_path / "cache"), (sum(sizes) + 1) / 1e9)
    address, shards, _ = files.opener.args
    with lock_of(small, opened[0].parent.name):
        files.opener.func(address, shards, small, 3)
    assert [path.exists() for path in opened] == [True, True, False]


def test_a_shard_that_was_cut_off_goes_on_where_it_was(server: Behavior, eleven: Path, tmp_path: Path) -> None:
    data = remote(server, tmp_path)
    data.annotations("val")
    server.requests.clear()
    server.cuts = [700]
    assert data.contents("val").read(0) == shards_in(eleven / "shards").contents("val").read(0)
    [(first, whole), (second, rest)] = server.requests
    assert first == second
    assert (whole, rest) == (None, "bytes=700-")


def test_a_dataset_can_be_sent_to_another_process(server: Behavior, tmp_path: Path) -> None:
    dataset = remote(server, tmp_path).dataset("train")
    image = dataset[0, 1][0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0, 1][0], image)


def test_what_changes_on_the_server_is_another_shard(server: Behavior, tmp_path: Path) -> None:
    assert len(batches(remote(server, tmp_path), 0)) > 0
    before = kept(tmp_path)
    make_shards(tiny_annotations(tmp_path / "other", 5), tmp_path / "new" / "train", "train")
    server.files = content_of(tmp_path / "new")
    data = remote(server, tmp_path)
    assert sum(len(images) for images, _ in batches(data, 0)) == 5
    assert len(kept(tmp_path)) == len(before) + 1


def test_a_shard_that_is_not_that_of_the_index_is_refused(server: Behavior, tmp_path: Path) -> None:
    data = remote(server, tmp_path)
    data.annotations("val")
    for name in [name for name in server.files if name.startswith("/set/val/shard")]:
        server.files[name] = server.files[name][:-1] + b"x"
    with pytest.raises(DownloadError, match=r"shard-\d+\.tar\.part: sha256 expected [0-9a-f]{64}, found"):
        data.contents("val").read(0)
    assert kept(tmp_path) == []


def test_a_kept_shard_that_was_damaged_is_named_and_one_that_was_cut_short_is_fetched_again(
    server: Behavior, eleven: Path, tmp_path: Path
) -> None:
    expected = shards_in(eleven / "shards").contents("val").read(0)
    assert remote(server, tmp_path).contents("val").read(0) == expected
    [path] = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert remote(server, tmp_path).contents("val").read(0) == expected
    content = path.read_bytes()
    path.write_bytes(content.replace(expected, bytes(len(expected))))
    with pytest.raises(DataError, match=rf"^{server.url}/set/val/shard-.*damaged.*; remove {path}, and it is fetched"):
        remote(server, tmp_path).contents("val").read(0)


def test_faults_at_the_start(server: Behavior, tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"/set/nowhere/index\.json: the server answers 404 .* 'detpipe data shards'"
    ):
        remote(server, tmp_path, val="nowhere").annotations("val")
    with pytest.raises(DataError, match=r"take .* GB, but cache\.gigabytes is 1e-08: raise it, or lower window"):
        remote(server, tmp_path, gigabytes=1e-8).annotations("val")
    for content in (b"[]", b"{}"):
        server.files[f"/set/val/{INDEX}"] = content
        with pytest.raises(DataError, match=r"/set/val/index\.json: this is no index of shards"):
            remote(server, tmp_path).annotations("val")
    server.files[f"/set/val/{INDEX}"] = b"<html>"
    with pytest.raises(DataError, match=r"index\.json"):
        remote(server, tmp_path).annotations("val")
    address = server.url
    data = remote(server, tmp_path)
    server.statuses = [503, 503]
    with pytest.raises(DownloadError, match=rf"{address}/set/train/index\.json: cannot be read .*503"):
        data.annotations("train")


def test_small_files(server: Behavior) -> None:
    server.files["/a"] = b"12345"
    assert read_url(f"{server.url}/a", 5, "") == b"12345"
    with pytest.raises(DownloadError, match=r"/a: more than 4 bytes"):
        read_url(f"{server.url}/a", 4, "")
    server.statuses = [503]
    assert read_url(f"{server.url}/a", 5, "") == b"12345"  # the second time
    server.cuts = [3, 2]
    with pytest.raises(DownloadError, match=r"/a: cannot be read \(.*\); check the network"):
        read_url(f"{server.url}/a", 5, "")
    with pytest.raises(DownloadError, match="only http"):
        read_url("file:///etc/passwd", 5, "")


@pytest.mark.parametrize("field", ["shards", "arrays"])
def test_a_server_cannot_write_outside_of_the_cache(field: str, server: Behavior, eleven: Path, tmp_path: Path) -> None:
    index = json.loads((eleven / "shards" / "train" / "index.json").read_text())
    for record in index["shards"] if field == "shards" else [index["arrays"]]:
        record["sha256"] = "../../../outside"
    server.files["/set/train/index.json"] = json.dumps(index).encode()
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"Expected `str` matching regex .* - at `\$\..*sha256`"):
        remote(server, tmp_path).annotations("train")
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}
    assert not list((tmp_path / "cache").rglob("*outside*"))
