"""Shards in a run: memory, several processes, evaluation, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from evaluation.builders import perfect
from test_configs import SHORT, shown_bases, train
from together import succeed

from detpipe import cli
from detpipe.datasets import DetectionDataset
from detpipe.datasets.shards.read import ShardFiles
from detpipe.datasets.shards.write import Sharding, make_shards
from detpipe.evaluation.coco import evaluate_coco

from .shard_cases import shards_in, tiny_annotations, tiny_shards
from .test_workers import IMAGES, private_memory


@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_row_34_the_memory_of_a_worker_does_not_grow(tmp_path: Path) -> None:
    """All records are of the same image."""
    a = tiny_annotations(tmp_path / "images", 1)
    many = make_shards(a, tmp_path / "shards", "train").shards.subset(np.zeros(IMAGES, dtype=np.int64))
    distinct = replace(many.annotations, image_ids=np.arange(IMAGES))
    first, _, last = private_memory(
        DetectionDataset(distinct, contents=ShardFiles(replace(many, annotations=distinct)))
    )
    assert last < 1.2 * first + 1


KILLED = """
import os, sys
from detpipe import cli
from detpipe.detector import TwoStageDetector
real = TwoStageDetector.losses
def losses(self, images, targets):
    if self.trainer.training and self.trainer.global_step == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return real(self, images, targets)
TwoStageDetector.losses = losses
sys.exit(cli.main(sys.argv[2:]))
"""


def training(root: Path, output: Path, layout: str = "shards", workers: int = 0, *more: str) -> list[str]:
    """Three epochs of a tiny detector on eleven images, three a step."""
    return [
        *("train", runs.CONFIG, str(runs.CONFIGS / "data" / f"{layout}.yaml"), "--data.root", str(root), *runs.MODEL),
        *("--output", str(output), "--trainer.max_epochs", "3", "--trainer.accelerator", "cpu"),
        *("--data.loader.batch_size", "3", "--data.loader.num_workers", str(workers), *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "workers", "step"), [(2, 0, 9), (2, 2, 6), (8, 2, 10)])
def test_a_training_on_shards_that_was_killed_ends_with_the_same_weights(
    packed: Path, tmp_path: Path, window: int, workers: int, step: int
) -> None:
    """In the middle of an epoch; and with all shards in one window they are the weights of training from files."""
    more = ["--data.window", str(window)]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert cli.main(training(tmp_path / "shards", undisturbed, "shards", 0, *more)) == 0
    arguments = training(tmp_path / "shards", killed, "shards", workers, *more)
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same bits need as many
    command = [sys.executable, "-c", KILLED, str(step), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=300, env=threads)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    stopped = torch.load(killed / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped < step
    assert cli.main([*arguments, "--ckpt_path", str(killed / "last.ckpt")]) == 0
    runs.assert_equal_weights(killed / "last.ckpt", undisturbed / "last.ckpt")
    assert torch.load(killed / "last.ckpt", weights_only=True)["global_step"] == 12
    if window > 6:
        assert cli.main(training(tmp_path / "files", tmp_path / "from_files", "coco_custom")) == 0
        runs.assert_equal_weights(tmp_path / "from_files" / "last.ckpt", undisturbed / "last.ckpt")


SHARED = """
import json, sys
import torch
from datasets.shard_cases import shards_in
torch.distributed.init_process_group("gloo")
found = []
for epoch in range(2):
    data = shards_in(sys.argv[1], batch_size=2, augment=None, window=1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        loader.batch_sampler.set_epoch(epoch)
        found.append([[int(target["image_id"]) for target in targets] for _, targets in loader])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_rows_47_and_48_processes_share_thirteen_images(tmp_path: Path, size: int) -> None:
    ids = sorted(tiny_shards(tmp_path, 13, 5).shards.annotations.image_ids.tolist())
    parts = [json.loads(text.splitlines()[-1]) for text in succeed(SHARED, [str(tmp_path / "shards")], size, 120)]
    for run in range(4):
        seen = [image for part in parts for batch in part[run] for image in batch]
        if run % 2:
            assert sorted(seen) == ids  # evaluation: each exactly once
        else:
            assert sorted(set(seen)) == ids
            assert len({len(part[run]) for part in parts}) == 1
            assert len(seen) - 13 < size  # those that a short last step repeats


def test_rows_8_and_9_evaluation_through_shards_is_that_of_the_files(tmp_path: Path) -> None:
    a = tiny_annotations(tmp_path / "images", 12)
    zero = replace(a, image_ids=np.arange(12), iscrowd=np.zeros_like(a.iscrowd), difficult=np.zeros_like(a.difficult))
    make_shards(zero, tmp_path / "shards" / "val", "val", sharding=Sharding(images_per_shard=5))
    read = shards_in(tmp_path / "shards").annotations("val")
    assert read.image_ids[0] == 0
    assert read.category_ids == (1, 7, 90)
    result = evaluate_coco(read, perfect(read))
    assert result["AP"] == 1.0
    assert result == evaluate_coco(zero, perfect(zero))


@pytest.mark.slow
def test_the_overlay_trains_and_evaluates(packed: Path, tmp_path: Path) -> None:
    path = runs.CONFIGS / "data" / "shards.yaml"
    result = train(tmp_path, shown_bases(path)[0], path, "--data.root", tmp_path / "shards")
    assert set(result["per_class"]) == {"cat", "dog", "owl"}
    best = tmp_path / "run" / "best.ckpt"
    assert torch.load(best, weights_only=True)["global_step"] == 2
    given = [*map(str, (shown_bases(path)[0], path)), "--data.root", str(tmp_path / "shards"), *SHORT[:2]]
    options = ["--ckpt_path", str(best), "--report", str(tmp_path / "report"), "--worst", "2"]
    sizes = ["--model.min_size", "64", "--model.max_size", "96", "--data.loader.num_workers", "0"]
    assert cli.main(["evaluate", *given, *sizes, *options]) == 0
    assert len(list((tmp_path / "report").glob("worst_*_truth.png"))) == 2  # drawn from shards
