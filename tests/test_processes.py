"""Training with several processes: the same gradients as with one, no hanging, and every configuration runs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from together import start, succeed
from torch import Tensor

from detpipe import cli
from detpipe.demo import Demo, DemoScenes
from detpipe.support import processes

DETECTORS = ["fast_rcnn", "pyramid", "cascade", "glimpse", "pathwise", "reinforce", "standardized by the batch"]
MODELS = [*DETECTORS, "regions", "superpixels", "classifier"]

GRADIENTS = """
import json, sys
import runs
import torch
from test_processes import gradients
torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
for name in json.loads(sys.argv[1]):
    for images in (3, 1) if name != "classifier" else (3,):
        found = gradients(name, images, rank, size)
        if rank == 0:
            torch.save(found, f"{sys.argv[2]}/{name} {images}.pt")
torch.distributed.destroy_process_group()
"""


def detector(name: str) -> torch.nn.Module:
    """A small detector that draws nothing at random: samplers take all they find."""
    from detpipe import (
        FPN,
        RPN,
        Anchors,
        AttentionalHead,
        CascadeHead,
        FastRCNNHead,
        Pathwise,
        ProposalSelection,
        Regime,
        Reinforce,
        RoIAlign,
        RoISampler,
        RPNObjective,
        SEResNet,
        TwoStageDetector,
    )

    torch.manual_seed(0)
    levels = ["c2", "c3", "c4"] if name == "pyramid" else ["c2"]  # objects are so small that the last has no RoI
    backbone = SEResNet(18, levels=levels, out_channels=8, regime=Regime(norm="group"))
    if name == "pyramid":
        backbone = FPN(backbone, out_channels=8)
    rpn = RPN(
        backbone.out_channels,
        backbone.strides,
        anchors=Anchors(sizes=[8, 16, 24]),
        objective=RPNObjective(anchors_per_image=100_000, positive_fraction=1.0),
        selection=ProposalSelection(pre_nms_top_n=(60, 60), post_nms_top_n=(30, 30)),
    )
    common = {
        "pooler": RoIAlign(3, sampling_ratio=2),
        "fc": [12],
        "sampler": RoISampler(200, 1.0, negative_iou=(0.0, 0.5)),
    }
    places = (backbone.out_channels, 3, backbone.strides)
    heads = {
        "cascade": lambda: CascadeHead(*places, **common),
        "glimpse": lambda: FastRCNNHead(*places, **common, glimpse="affine"),
        "pathwise": lambda: AttentionalHead(*places, **common, estimator=Pathwise(0)),
        "reinforce": lambda: AttentionalHead(*places, **common, estimator=Reinforce(2)),
        "standardized by the batch": lambda: AttentionalHead(
            *places, **common, estimator=Reinforce(2, baseline="batch", background_reward="probability")
        ),
    }
    head = heads.get(name, lambda: FastRCNNHead(*places, **common))()
    if name == "pathwise":
        torch.nn.init.normal_(head.policy.weight)
    elif isinstance(head, AttentionalHead):
        head.estimator.act = FixedSteps()
        torch.nn.init.normal_(head.policy.weight)
    return TwoStageDetector(backbone, rpn, head, min_size=64, max_size=64).train()


def model(name: str) -> torch.nn.Module:
    """What is trained, by name: a detector, or one of the other models, without a norm that looks at the batch."""
    from detpipe import ImageClassifier, RegionClassifier, RoIAlign, SEResNet, SuperpixelLocalizer
    from detpipe.backbones import Regime
    from detpipe.regions.region_classifier import Classification
    from detpipe.regions.superpixel_localizer import Localization, Segmentation

    if name in DETECTORS:
        return detector(name)
    torch.manual_seed(0)
    backbone = SEResNet(18, levels=["c3"], out_channels=8, regime=Regime(norm="group"))
    sizes = {"min_size": 64, "max_size": 64}
    if name == "regions":
        return RegionClassifier(backbone, 3, RoIAlign(3), classification=Classification((8,)), **sizes).train()
    if name == "superpixels":
        localizer = SuperpixelLocalizer(backbone, 3, Localization(8), Segmentation(20), **sizes).train()
        for module in localizer.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return localizer
    return ImageClassifier(backbone, 3).train()


class FixedSteps:
    """Actions in place of drawn ones: those of the sequence and of the other episode in turns, the same for every RoI."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, mean: Tensor) -> Tensor:
        self.calls += 1
        return mean.detach() + (0.1 if self.calls % 2 else -0.2)


def batch() -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Three images; that of the second process has no object."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 64, generator=generator) for _ in range(3)]
    boxes = [
        torch.tensor([[5.0, 8.0, 25.0, 24.0], [30.0, 30.0, 52.0, 50.0]]),
        torch.zeros(0, 4),
        torch.tensor([[2.0, 2.0, 18.0, 20.0]]),
    ]
    labels = [torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    return images, [{"boxes": b, "labels": k} for b, k in zip(boxes, labels, strict=True)]


class Step(torch.nn.Module):
    """A training step, as what DistributedDataParallel wraps."""

    def __init__(self, trained: torch.nn.Module) -> None:
        super().__init__()
        self.trained = trained
        trained.log = trained.log_dict = lambda *_, **__: None  # there is no trainer to log to

    def forward(self, *batch: Any) -> Tensor:
        return self.trained.training_step(batch, 0)


def part(name: str, count: int, rank: int, size: int) -> tuple[Any, ...]:
    """What a process gets of the first images: every second one, or a repeat of what the other has."""
    images, targets = (column[:count] for column in batch())
    if rank < count:
        images, targets = images[rank::size], targets[rank::size]
    else:
        targets = [{**targets[0], "repeated": True}]
    if name != "classifier":
        return images, targets
    return torch.stack(images), torch.arange(count)[rank::size] % 3, [""] * len(images)


def gradients(name: str, count: int, rank: int = 0, size: int = 1) -> dict[str, Tensor]:
    """Gradients of one step on the first images, or on a process' part of them."""
    module = Step(model(name))
    step = torch.nn.parallel.DistributedDataParallel(module) if size > 1 else module
    for _ in range(
        2
    ):  # the second step of DistributedDataParallel fails where a parameter of the first had no gradient
        module.zero_grad()
        step(*part(name, count, rank, size)).backward()
    return {key: p.grad.clone() for key, p in module.trained.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def stored_gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of two processes, in files."""
    folder = tmp_path_factory.mktemp("gradients")
    succeed(GRADIENTS, [json.dumps(MODELS), str(folder)], 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", runs.mostly_slow([3, 1], 3))
def test_gradients_of_two_processes_are_those_of_one(count, stored_gradients):
    """Two images here and one there, or one here and its repeat there: the mean over processes is that over all samples."""
    for name in MODELS:
        if (name, count) == ("classifier", 1):
            continue  # its data leave out a last batch that is so small
        want, got = gradients(name, count), torch.load(stored_gradients / f"{name} {count}.pt")
        assert got.keys() == want.keys()
        assert any(key.startswith(("head", "layers", "classifier")) for key in want)
        largest = max(value.abs().max() for value in want.values())
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5 * float(largest), msg=f"{name}: {key}")


COMMANDS = """
import json, os, sys
from detpipe import cli
for name, arguments in json.loads(sys.argv[1]).items():
    status = cli.main(arguments)
    print(name, status, file=sys.__stdout__, flush=True)
    if status:
        os._exit(1)  # the other process is waiting
"""
TWO = ["--trainer.devices", "2", "--trainer.accelerator", "cpu"]


def short(demo_root: Path, output: Path) -> list[str]:
    """Options of a training of two steps on tiny scenes."""
    return [
        *("--data.root", str(demo_root), "--data.scenes", str(runs.SCENES), "--output", str(output)),
        *("--trainer.max_epochs", "1", "--trainer.max_steps", "-1", "--trainer.limit_train_batches", "2"),
        *("--data.loader.num_workers", "0", "--data.loader.batch_size", "1", *TWO),
    ]


@pytest.mark.slow
def test_configurations_train_and_validate_with_two_processes(demo_root, tmp_path):
    """A learned source and a classic one, a head that learns by reward, and a model that is no detector; each is trained by one
    process in ``test_configs.py``."""
    base, small = str(runs.CONFIGS / "fast_rcnn_squeezenet.yaml"), ["64", "--model.max_size", "96"]
    commands = {
        "rpn": ["train", base, "--model.min_size", *small],
        "union": ["train", base, str(runs.CONFIGS / "proposals" / "union.yaml"), "--model.min_size", *small],
        "aod": ["train", str(runs.CONFIGS / "aod.yaml"), "--model.min_size", *small],
        "regions": ["train_regions", str(runs.CONFIGS / "region_classifier.yaml"), "--model.min_size", *small],
    }
    Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)).annotations("train")
    wanted = {name: [*command, *short(demo_root, tmp_path / name)] for name, command in commands.items()}
    first, second = succeed(COMMANDS, [json.dumps(wanted)], 2, 600)
    for name in wanted:
        assert f"{name} 0" in first.splitlines()
        assert f"{name} 0" in second.splitlines()
        found = {path.name for path in (tmp_path / name).iterdir()}
        assert {"best.ckpt", "last.ckpt", "summary.json", "config.yaml"} <= found


@pytest.mark.slow
def test_the_command_starts_the_other_process_itself(demo_root, tmp_path):
    """As a user calls it: seven images for two processes, in batches of two; said once, evaluated on every image once."""
    scenes = ["--data.root", str(tmp_path / "data"), "--data.scenes", "{train: 7, val: 5, size: 64}"]
    tool = [sys.executable, str(runs.CONFIGS.parent / "tools" / "train.py"), runs.CONFIG, *runs.options(demo_root)]
    options = [*scenes, "--data.loader.batch_size", "2", *TWO, "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*tool, *options], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train: 7 images") == done.stdout.count("run folder") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with (tmp_path / "run" / "metrics.csv").open(newline="") as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream) if row["train/loss"]]
    assert max(steps) + 1 == 2 * 2  # epochs, and steps of four and three images
    assert summary["epochs"] == 2


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_is_the_same_with_any_number_of_processes(size, trained, demo_root, tmp_path):
    """Two batches of images, which four processes halve: then single numbers may differ in their last digit."""

    def files(name: str) -> list[str]:
        return ["--json", str(tmp_path / f"{name}.json"), "--detections_out", str(tmp_path / f"{name}_detections.json")]

    command = ["evaluate", runs.CONFIG, *runs.options(demo_root), "--ckpt_path", str(trained / "best.ckpt")]
    assert cli.main([*command, *files("alone")]) == 0
    several = ["--trainer.devices", str(size), "--trainer.accelerator", "cpu"]
    first, *others = succeed(COMMANDS, [json.dumps({"evaluate": [*command, *files("several"), *several]})], size)
    assert "AP50" in first
    assert all("AP50" not in other for other in others)
    for kind in ("", "_detections"):
        one, other = ((tmp_path / f"{name}{kind}.json").read_bytes() for name in ("alone", "several"))
        assert size > 2 or one == other
        found, wanted = json.loads(other), json.loads(one)
        if kind:
            assert [(row["image_id"], row["category_id"]) for row in found] == [
                (row["image_id"], row["category_id"]) for row in wanted
            ]
            found, wanted = ([[*row["bbox"], row["score"]] for row in rows] for rows in (found, wanted))
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-4)
        else:
            assert found["AP"] == pytest.approx(wanted["AP"], abs=1e-6)


FAULT = """
import os, sys
import torch
from detpipe import cli
from detpipe.detector import TwoStageDetector
rank, kind, step = int(os.environ["RANK"]), sys.argv[1], int(sys.argv[2])
real = TwoStageDetector.losses
def losses(self, images, targets):
    found = real(self, images, targets)
    if rank == 1 and self.trainer.global_step == step:
        if kind == "killed":
            os.kill(os.getpid(), 9)
        if kind == "raised":
            raise RuntimeError("broken here")
        if kind == "nan":
            found["loss_classifier"] = found["loss_classifier"] * float("nan")
    return found
TwoStageDetector.losses = losses
if kind == "nan proposals":
    from detpipe.proposals import RPN
    real_select = RPN._select
    def select(self, logits, *others):
        if rank == 1 and self.training:
            logits = logits * float("nan")
        return real_select(self, logits, *others)
    RPN._select = select
def validate(self, batch, batch_idx, real=TwoStageDetector.validation_step):
    if rank == 1 and kind == "validation":
        raise RuntimeError("broken here")
    return real(self, batch, batch_idx)
TwoStageDetector.validation_step = validate
if rank == 0 and kind == "disk full":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a checkpoint is larger
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    "kind",
    runs.mostly_slow(["nan", "nan proposals", "raised", "killed", "validation", "disk full"], "nan"),
)
def test_what_stops_one_process_stops_all(kind, demo_root, tmp_path):
    Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)).annotations("train")
    arguments = ["train", runs.CONFIG, *runs.options(demo_root), "--data.loader.batch_size", "2", *TWO]
    output = tmp_path / "run"
    answers = start(FAULT, [kind, "1", *arguments, "--output", str(output)], 2, 120)
    assert all(status != 0 for status, _, _ in answers)
    assert not (output / "summary.json").exists()
    if kind == "nan":
        assert "step 1: stopped, since the loss is not finite in another process" in answers[0][2]
        assert "step 1: the loss is nan; the weights were not changed" in answers[1][2]
        assert (output / "nonfinite_batch.pt").exists()
    if kind == "nan proposals":
        assert "detpipe: error: stopped, since proposals of the RPN are not finite in another process" in answers[0][2]
        assert "step 0: proposals of the RPN: image " in answers[1][2]
        assert (output / "nonfinite_batch.pt").exists()
    if kind in ("raised", "validation"):
        assert "broken here" in answers[1][2]
        assert "detpipe: error: another process of this training has ended; its message says why" in answers[0][2]
    if kind == "disk full":
        assert f"File too large: '{output / 'training.png'}'; " in answers[0][2]
        assert "MiB are free there; files that were complete before are intact" in answers[0][2]
    if kind != "killed":
        assert all(len(text.split("detpipe: error: ")) == 2 and "Traceback" not in text for _, _, text in answers)


def test_who_works_on_what_alone():
    assert processes.rank_and_size() == (0, 1)
    assert processes.gather_objects("here") == ["here"]
    assert processes.any_rank(True, torch.device("cpu"))
    assert not processes.any_rank(False, torch.device("cpu"))
    with processes.sharing_counts():
        assert processes.count_per_rank(torch.tensor(3)) == 3
        assert processes.count_per_rank(torch.tensor(0)) == 1
        assert processes.weight_per_rank(torch.tensor(0.0)) == 0
        assert processes.mean_over_ranks(torch.tensor(6.0), torch.tensor(4)) == 1.5
        assert processes.mean_over_ranks(torch.tensor(0.0), torch.tensor(0)) == 0
    values = processes.MeanValues()
    assert values.means() == {}
    values.add({"loss": torch.tensor(1.0)}, 1)
    values.add({"loss": torch.tensor(4.0), "other": torch.tensor(2.0)}, 2)
    assert values.means() == {"loss": 3.0, "other": 2.0}


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"])
def test_the_first_process_is_known_before_they_meet(name, monkeypatch):
    assert processes.is_first()
    for first in ("0", ""):  # empty: as good as not set
        monkeypatch.setenv(name, first)
        assert processes.is_first()
    monkeypatch.setenv(name, "1")
    assert not processes.is_first()


@pytest.mark.slow
def test_a_resumed_run_of_two_processes_ends_with_the_weights_of_an_undisturbed_one(demo_root, tmp_path):
    """Twelve images in batches of two and two: the second process breaks off in the second epoch."""
    Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)).annotations("train")
    train = ["train", runs.CONFIG, *runs.options(demo_root), "--data.loader.batch_size", "2", *TWO, "--output"]
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert all(status for status, _, _ in start(FAULT, ["raised", "4", *train, str(first)], 2, 120))
    assert torch.load(first / "last.ckpt", weights_only=True)["global_step"] == 3
    resume = {"resume": [*train, str(second), "--ckpt_path", str(first / "last.ckpt")]}
    succeed(COMMANDS, [json.dumps({"whole": [*train, str(whole)]})], 2, 120)
    succeed(COMMANDS, [json.dumps(resume)], 2, 120)
    runs.assert_equal_weights(second / "last.ckpt", whole / "last.ckpt")
