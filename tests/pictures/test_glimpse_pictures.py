from __future__ import annotations

import json
import re
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from detpipe import cli
from detpipe.heads.base import outlines
from detpipe.pictures import glimpse_pictures
from detpipe.training import checkpoint
from detpipe.training.models import load_detector
from detpipe.types import GlimpsedDetection


def found(count: int, glimpses: int) -> GlimpsedDetection:
    boxes = torch.tensor([[20.0, 20.0, 60.0, 70.0]]).repeat(count, 1)
    seen = boxes[:, None] + 5.0 * torch.arange(1, glimpses + 1)[None, :, None]
    return GlimpsedDetection(
        boxes=boxes + 2,
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.arange(count) % 2 + 1,
        proposals=boxes,
        glimpses=outlines(seen),
    )


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (1, 1), (4, 1), (5, 2), (20, 2)])
def test_a_picture_has_a_panel_for_each_of_the_best_detections(count, rows):
    image = torch.zeros(3, 160, 200, dtype=torch.uint8)
    drawn = glimpse_pictures.draw_glimpses(image, found(count, 2), ["a", "b"])
    extra = drawn.shape[1] - 480
    step = glimpse_pictures.PANEL + glimpse_pictures.CAPTION + glimpse_pictures.GAP
    assert extra == (rows * step + glimpse_pictures.GAP + glimpse_pictures.CAPTION if count else 0)
    assert (image == 0).all()


def colors(panel: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in panel.getcolors(1 << 20)}


def test_a_panel_shows_proposal_glimpses_in_order_and_box():
    image = torch.full((3, 100, 100), 60, dtype=torch.uint8)
    panel = glimpse_pictures._panel(image, found(1, 2), 0, ["a", "b"])
    shown = colors(panel)
    assert {glimpse_pictures.FIRST, glimpse_pictures.LAST, (255, 255, 255)} <= shown
    one = colors(glimpse_pictures._panel(image, found(1, 1), 0, ["a", "b"]))
    assert glimpse_pictures.FIRST in one
    assert glimpse_pictures.LAST not in one


def test_outlines_far_outside_of_the_image_are_drawn_on_gray():
    seen = found(1, 1)
    seen["glimpses"] = seen["glimpses"] - 500
    panel = glimpse_pictures._panel(torch.zeros(3, 100, 100, dtype=torch.uint8), seen, 0, ["a", "b"])
    assert panel.getpixel((20, glimpse_pictures.PANEL // 2)) == glimpse_pictures._OUTSIDE


def test_places_on_the_page_are_relative_to_the_proposal():
    seen = found(1, 1)
    seen["glimpses"] = outlines(
        torch.tensor([[[30.0, 20.0, 110.0, 120.0]]])
    )  # of 40 x 50 around (40, 45): 80 x 100, (70, 70)
    text = glimpse_pictures._places(glimpse_pictures.describe(seen, 0))
    assert text == "(+0.75, +0.50) &times; 2.00"


def test_the_command_writes_pictures_a_page_and_the_outlines(trained, demo_root, tmp_path, capsys):
    content = torch.load(trained / "best.ckpt", weights_only=True)
    content[checkpoint.KEY]["model"]["head"]["init_args"]["glimpse"] = {"kind": "affine", "fuse": "max"}
    path = tmp_path / "glimpsing.ckpt"
    detector, _ = load_detector(trained / "best.ckpt")
    pooler, channels = detector.head.pooler, detector.backbone.out_channels
    from detpipe.heads import Glimpse, GlimpseSettings

    glimpse = Glimpse(channels, pooler.output_size, GlimpseSettings("affine", "max"))
    content["state_dict"] |= {f"head.glimpse.{name}": value for name, value in glimpse.state_dict().items()}
    torch.save(content, path)
    scenes = sorted((demo_root / "coco" / "val").iterdir())[:2]
    out = tmp_path / "out & <more>"
    arguments = [
        "predict",
        str(path),
        *map(str, scenes),
        "-o",
        str(out),
        "--device",
        "cpu",
        "--score_threshold",
        "0.02",
    ]
    assert cli.main([*arguments, "--show-glimpses"]) == 0
    assert "glimpses.html" in capsys.readouterr().out
    report = json.loads((out / "detections.json").read_text())
    rows = [row for record in report["images"] for row in record["detections"]]
    assert rows
    assert all(
        len(row["glimpses"]) == 1 and len(row["glimpses"][0]) == 32 and len(row["proposal"]) == 4 for row in rows
    )
    outline = torch.tensor(rows[0]["glimpses"][0])  # untrained: the proposal itself
    around = torch.cat((outline.amin(0), outline.amax(0)))
    torch.testing.assert_close(around, torch.tensor(rows[0]["proposal"]), rtol=1e-3, atol=1e-2)
    page = (out / "glimpses.html").read_text()
    assert page.count("<img ") == 2
    assert all((out / unquote(name)).is_file() for name in re.findall(r"<img src='([^']+)'", page))
    assert cli.main(arguments) == 0
    again = json.loads((out / "detections.json").read_text())
    for record, plain in zip(report["images"], again["images"], strict=True):
        for row, other in zip(record["detections"], plain["detections"], strict=True):
            assert {key: row[key] for key in other} == other
            assert "glimpses" not in other


def test_a_head_that_does_not_tell_is_refused(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("detpipe.commands.predict.ProposalHead", int)
    image = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(image)
    command = ["predict", str(trained / "best.ckpt"), str(image), "-o", str(tmp_path / "out"), "--show-glimpses"]
    assert cli.main(command) == 2
    assert "does not tell where it looks" in capsys.readouterr().err
