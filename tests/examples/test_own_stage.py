"""Stages of one's own, as docs/own_stage.md leads through them; its commands are run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SCENES
from samples import random_boxes, random_target

from detpipe import TwoStageDetector
from detpipe.heads import base
from own_stage import CenterProposals, RelationHead, SmallNet

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_stage"
PAGE = ROOT / "docs" / "own_stage.md"
RUN = "import sys, json; from detpipe.cli import main; sys.exit(max(main(command) for command in json.loads(sys.argv[1])))"
TINY = (
    f"--data.root DEMO --data.scenes {shlex.quote(json.dumps(SCENES))} --trainer.max_epochs 1 --trainer.accelerator cpu "
    "--data.loader.batch_size 4 --model.min_size 64 --model.max_size 64"
)


def commands(demo: Path, out: Path) -> list[list[str]]:
    """The commands of the page, on the tiny demo set and for one epoch."""
    found = re.findall(r"^detpipe (.*?)(?:  +#.*)?$", PAGE.read_text(), re.MULTILINE)
    places = {"DEMO": demo, "data/demo": demo, "runs/": f"{out}/runs/", "predictions/": f"{out}/predictions/"}
    given = []
    for command in found:
        command = f"{command} {TINY}" if command.startswith("train ") else command
        for name, place in places.items():
            command = command.replace(name, str(place))
        given.append(shlex.split(command))
    return given


@pytest.mark.slow
def test_the_commands_of_the_page_train_evaluate_and_predict(demo_root: Path, tmp_path: Path) -> None:
    given = commands(demo_root, tmp_path)
    own = [command for command in given if "--trust" in command]
    assert [command[0] for command in own] == ["train", "evaluate", "predict"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(own)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "own_stage" / "val_coco.json").is_file()
    predicted = json.loads((tmp_path / "predictions" / "own_stage" / "detections.json").read_text())
    assert len(predicted["images"]) == SCENES["val"]
    described = (tmp_path / "runs" / "own_stage" / "config.yaml").read_text()
    assert all(f"examples.own_stage.{name}" in described for name in ("SmallNet", "CenterProposals", "RelationHead"))


@pytest.mark.parametrize("name", ["backbone", "source", "head"])
def test_a_stage_is_short_and_shown_on_the_page(name: str) -> None:
    lines = (EXAMPLE / f"{name}.py").read_text().splitlines()
    assert len(lines) < 40
    assert f"examples/own_stage/{name}.py" in PAGE.read_text()


def detector() -> TwoStageDetector:
    backbone = SmallNet(16)
    source = CenterProposals(16, backbone.strides, sides=[16, 24], centers=8)
    return TwoStageDetector(backbone, source, RelationHead(16, 3, backbone.strides), min_size=64, max_size=96)


def test_all_parameters_learn_also_where_there_is_nothing() -> None:
    model = detector()
    images = [torch.rand(3, 64, 80), torch.rand(3, 60, 60)]
    for counts in ((2, 0), (0, 0)):
        model.zero_grad()
        losses = model.losses(images, [random_target(count, height=60, width=60) for count in counts])
        assert sorted(losses) == ["loss_box_reg", "loss_center", "loss_classifier"]
        sum(losses.values()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert len(model(images)) == 2


def test_centers_are_learned() -> None:
    backbone = SmallNet(16)
    source = CenterProposals(16, backbone.strides, sides=[16], centers=4)
    model = TwoStageDetector(backbone, source, RelationHead(16, 3, backbone.strides), min_size=64, max_size=64).train()
    image, target = torch.rand(3, 64, 64), random_target(2, height=64, width=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    center = []
    for _ in range(30):
        losses = model.losses([image], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        center.append(losses["loss_center"].item())
    assert center[-1] < 0.5 * center[0]


def test_relations_end_at_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RelationHead(8, 3, {"c3": 8}, width=16).eval()
    torch.nn.init.normal_(head.classifier.weight)
    features, counts = torch.rand(3, 8, 8, 8), (12, 0, 5)
    proposals = [random_boxes(count, 60, 60) for count in counts]
    sizes = [(64, 64), (60, 50), (64, 40)]
    with torch.no_grad():
        together, _ = head({"c3": features}, proposals, sizes)
        assert head({"c3": features}, [boxes[:0] for boxes in proposals], sizes)[0][0]["boxes"].shape == (0, 4)
        for image in range(3):
            [alone], _ = head({"c3": features[image : image + 1]}, [proposals[image]], [sizes[image]])
            torch.testing.assert_close(alone["scores"], together[image]["scores"], rtol=0, atol=1e-5)
        monkeypatch.setattr(base, "ROIS_PER_PASS", 6)
        parts, _ = head({"c3": features}, proposals, sizes)
    for one, other in zip(together, parts, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=1e-5)
