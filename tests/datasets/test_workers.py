"""Data workers that are killed, hang, or would grow: rows 31, 32 and 34 of the fault matrix."""

from __future__ import annotations

import gc
import hashlib
import pickle
import re
from dataclasses import fields, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import runs
import torch
from together import start
from torch.utils.data import DataLoader, Dataset

from detpipe.datasets import COCO, DetectionDataset, Loader, workers
from detpipe.demo import Demo, DemoScenes
from detpipe.types import Annotations

from .builders import annotations, picture

TRAINING = """
import os, signal, sys, time
from detpipe import cli
from detpipe.datasets.dataset import DetectionDataset
kind, main, real = sys.argv[1], os.getpid(), DetectionDataset.__getitem__
def read(self, key):
    if key[0] == 1 and os.getpid() != main:  # in the second epoch, in a worker
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    return real(self, key)
DetectionDataset.__getitem__ = read
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("killed", r"DataLoader worker \(pid.*ended from outside, .*--data\.loader\.num_workers"),
        ("hangs", r"DataLoader timed out after 3(\.0)? seconds: .*--data\.loader\.timeout"),
    ],
    ids=["row_31", "row_32"],
)
def test_a_worker_that_is_killed_or_hangs_stops_the_run(
    kind: str, message: str, demo_root: Path, tmp_path: Path
) -> None:
    Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)).annotations("train")
    run = tmp_path / "run"
    arguments = ["train", runs.CONFIG, *runs.options(demo_root, epochs=3), "--output", str(run)]
    loader = ["--data.loader.num_workers", "1", "--data.loader.timeout", "3"]
    ((status, _, errors),) = start(TRAINING, [kind, *arguments, *loader], 1, 240)
    assert status == 1, errors
    [line] = [line for line in errors.splitlines() if line.startswith("detpipe: error:")]
    assert re.search(message, line), line
    assert "checkpoints are intact" in line
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 3  # the first epoch, whole
    assert not (run / "summary.json").exists()


IMAGES, BOXES, DRAWN = 60_000, 7, 6_000  # boxes an image; images an epoch, spread over all


class Spread(Dataset[Any]):
    """Some images from all over a data set."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        return self.dataset[epoch, (index * 7919 + epoch) % IMAGES]


class Dictionaries(Dataset[Any]):
    """The same data as a list of dictionaries, in which every look moves reference counts."""

    def __init__(self, packed: DetectionDataset) -> None:
        a = packed.annotations
        self.packed = packed
        self.records = [
            [{"bbox": a.boxes[b].tolist(), "label": int(a.labels[b])} for b in range(BOXES * i, BOXES * i + BOXES)]
            for i in range(IMAGES)
        ]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        image, target = self.packed[key]
        boxes = [record["bbox"] for record in self.records[key[1]]]
        assert target.get("boxes", image).tolist() == boxes
        return image, target


def many_boxes(root: Path) -> Annotations:
    """420,000 boxes; all images are one small file."""
    picture(8, 8).save(root / "a.png")
    total = IMAGES * BOXES
    low = np.random.default_rng(0).integers(0, 4, (total, 2)).astype(np.float64)
    boxes, offsets = np.concatenate([low, low + 3], axis=1), np.arange(IMAGES + 1) * BOXES
    return annotations(root, boxes, offsets, np.full((IMAGES, 2), 8), file_names=np.full(IMAGES, "a.png"))


def private_memory(dataset: Dataset[Any]) -> list[float]:
    """MiB that belong to the data worker alone after each of three epochs."""
    gc.collect()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    sizes = np.full((DRAWN, 2), 8)
    data = COCO("not read", loader=Loader(batch_size=100, num_workers=1))
    loader = data._load(Spread(dataset), sizes, True, len)
    found = []
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        assert sum(loader) == DRAWN
        [worker] = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        found.append(worker.memory_full_info().uss / 2**20)
    del loader
    gc.collect()
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("no_collection")
def test_row_34_workers_do_not_grow(tmp_path: Path) -> None:
    packed = DetectionDataset(many_boxes(tmp_path))
    first, _, last = private_memory(packed)
    assert last < 1.2 * first
    as_dictionaries = private_memory(Dictionaries(packed))
    assert as_dictionaries[2] > last + 30, "this measure would not see a data set that grows"


class Look(Dataset[Any]):
    """What a worker sees of packed arrays: a hash of each field, and what the worker keeps to itself."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[dict[str, str], float]:
        for _ in range(2):
            found = {one.name: digest(getattr(self.packed, one.name)) for one in fields(self.packed)}
        gc.collect()
        return found, psutil.Process().memory_full_info().uss / 2**20


def digest(part: Any) -> str:
    shown = f"{part.dtype} {part.shape}" if isinstance(part, np.ndarray) else repr(part)
    content = part.reshape(-1).view(np.uint8) if isinstance(part, np.ndarray) else b""  # no copy, which would count
    return f"{shown} {hashlib.sha256(content).hexdigest()}"


def seen_by_worker(packed: Any, start: str) -> tuple[dict[str, str], float]:
    loader = DataLoader(Look(packed), batch_size=None, num_workers=1, multiprocessing_context=start)
    [found] = list(loader)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_row_34_workers_that_are_not_forked_share_the_arrays_too(start: str, tmp_path: Path) -> None:
    """Every field is what it was; the 24 MiB of the data set are in no worker's own memory."""
    large = replace(
        many_boxes(tmp_path), file_names=np.array([f"{row:08}.png" for row in range(IMAGES)]), counts={"a": 1}
    )
    arrays = [getattr(large, one.name) for one in fields(large) if isinstance(getattr(large, one.name), np.ndarray)]
    assert sum(array.nbytes for array in arrays) > 24 * 2**20
    (small, alone), (whole, with_data) = (seen_by_worker(a, start) for a in (large.subset(np.arange(9)), large))
    assert whole == {one.name: digest(getattr(large, one.name)) for one in fields(large)}
    assert small["image_ids"] != whole["image_ids"]
    assert with_data < alone + 6, (alone, with_data)
    again, _ = seen_by_worker(large, start)  # from the same shared memory
    assert again == whole


def test_what_is_shared_goes_with_its_arrays_and_other_pickles_are_whole(tmp_path: Path) -> None:
    large = many_boxes(tmp_path)
    ForkingPickler.dumps(large)
    kept = len(workers._shared)
    assert kept >= 6
    plain = pickle.dumps(large)
    assert len(plain) > large.boxes.nbytes
    assert np.array_equal(pickle.loads(plain).boxes, large.boxes)
    first = workers._shared[id(large.boxes)][1]
    ForkingPickler.dumps(large)
    assert workers._shared[id(large.boxes)][1] is first
    del large
    gc.collect()
    assert len(workers._shared) <= kept - 6
