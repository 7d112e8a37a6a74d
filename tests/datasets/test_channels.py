"""Images of other channels and depths than 8-bit RGB, from the files through training to the boxes of `detpipe predict`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from detpipe import cli
from detpipe.backbones import FPN, Extractor, Level, SEInceptionV3, SEResNet, SKNet
from detpipe.backbones.input_channels import spread_weight
from detpipe.datasets import YOLO, Augment, Loader, Resize
from detpipe.datasets.augment.settings import Combine, Degrade, MixUp, Mosaic, SafeCrop, Transform
from detpipe.datasets.checking import check_data
from detpipe.images import normalize, to_batch, to_picture
from detpipe.stages import Backbone
from detpipe.support.errors import CheckpointError, DataError, UsageError
from detpipe.training.models import load_detector
from detpipe.types import PixelType

from .builders import write_yolo

Write = Callable[[np.ndarray, Path], None]


def as_tiff(array: np.ndarray, path: Path) -> None:
    """Channels as grey pages, which Pillow writes and reads."""
    first, *more = (Image.fromarray(array[:, :, k]) for k in range(array.shape[2]))
    first.save(path, save_all=True, append_images=more)


def as_png(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path)


def as_npy(array: np.ndarray, path: Path) -> None:
    np.save(path, array)


# channels, type of the files, suffix, how they are written, the range of the configuration
KINDS: dict[str, tuple[int, type, str, Write, str]] = {
    "grey": (1, np.uint8, ".png", as_png, "null"),
    "grey_16": (1, np.uint16, ".tif", as_tiff, "[0, 4095]"),
    "rgba": (4, np.uint8, ".png", as_png, "null"),
    "four_16": (4, np.uint16, ".tif", as_tiff, "dtype"),
    "five": (5, np.float32, ".npy", as_npy, "[-1, 1]"),
}


def write_set(root: Path, kind: str) -> Path:
    """A YOLO folder of eight images of 64 pixels, each with one bright object."""
    channels, dtype, suffix, write, _ = KINDS[kind]
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        labels: dict[str, str | None] = {f"{split}{k}": "0 0.5 0.5 0.4 0.4\n" for k in range(count)}
        write_yolo(root, labels, split, names=["spot"])
        for k in range(count):
            (root / "images" / split / f"{split}{k}.jpg").unlink()
            array = random.uniform(0, 0.3, (64, 64, channels))
            array[19:45, 19:45] += 0.6
            scaled = array * 2 - 1 if dtype is np.float32 else array * min(np.iinfo(dtype).max, 4095)
            write(scaled.astype(dtype), root / "images" / split / f"{split}{k}{suffix}")
    return root


def options(root: Path, kind: str, out: Path) -> list[str]:
    channels, *_, limits = KINDS[kind]
    return [
        *("train", runs.CONFIG, "--data", "detpipe.datasets.YOLO", "--data.root", str(root), "--output", str(out)),
        *("--data.channels", str(channels), "--data.range", limits, "--data.loader.batch_size", "4"),
        *("--data.augment.flip", "0.5", "--data.augment.scale_jitter", "[0.8, 1.25]", "--data.augment.color", "0"),
        *(*runs.MODEL, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grey", "four_16", "five"])
def test_a_kind_is_trained_evaluated_and_predicted(tmp_path: Path, kind: str) -> None:
    channels = KINDS[kind][0]
    root, out = write_set(tmp_path / "set", kind), tmp_path / "run"
    assert cli.main(options(root, kind, out)) == 0
    detector, description = load_detector(out / "best.ckpt")
    assert description.pixels.channels == channels == detector.backbone.pixel_format.channels
    assert next(detector.backbone.parameters()).shape[1] == channels
    arguments = ["--ckpt_path", str(out / "best.ckpt"), "--json", str(tmp_path / "ap.json")]
    assert cli.main(["evaluate", str(out / "config.yaml"), *arguments]) == 0
    stored = json.loads((out / "summary.json").read_text())
    assert json.loads((tmp_path / "ap.json").read_text())["AP"] == pytest.approx(stored["AP"], abs=1e-6)
    found = tmp_path / "found"
    images = str(root / "images" / "val")
    assert cli.main(["predict", str(out / "best.ckpt"), images, "-o", str(found), "--score_threshold", "0"]) == 0
    records = json.loads((found / "detections.json").read_text())
    assert [Path(one["file"]).stem for one in records["images"]] == ["val0", "val1", "val2"]
    assert records["images"][0]["detections"]
    with Image.open(found / "val0.jpg") as drawing:
        assert min(drawing.size) > 64


def test_a_checkpoint_says_what_it_reads_and_refuses_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_set(tmp_path / "set", "grey_16"), tmp_path / "run"
    assert cli.main(options(root, "grey_16", out)) == 0
    assert load_detector(out / "best.ckpt")[1].pixels == PixelType(1, (0, 4095))
    Image.new("L", (64, 64)).save(tmp_path / "x.png")
    assert cli.main(["predict", str(out / "best.ckpt"), str(tmp_path / "x.png"), "-o", str(tmp_path / "o")]) == 1
    assert "x.png: pixels of uint8 end at 255, but range is [0, 4095]" in capsys.readouterr().err
    config = [str(out / "config.yaml"), "--ckpt_path", str(out / "best.ckpt")]
    assert cli.main(["evaluate", *config, "--data.range", "dtype"]) == 2
    assert "was trained on PixelType(channels=1, range=(0.0, 4095.0))" in capsys.readouterr().err


def test_what_cannot_hold_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "set", "rgba")
    for given, message in (
        (("--data.range", "[5, 1]"), r"range must be null, 'dtype' or"),
        (("--data.channels", "4", "--model.backbone.in_channels", "5"), "in_channels is 5, but .*channels is 4"),
    ):
        assert cli.main([*options(root, "rgba", tmp_path / "run"), *given]) == 2
        assert re.search(message, capsys.readouterr().err)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "SEResNet": lambda **more: SEResNet(18, levels=["c3"], **more),
    "deep stem": lambda **more: SKNet(26, levels=["c3"], **more),
    "Inception": lambda **more: SEInceptionV3(levels=["c3"], **more),
    "torchvision": lambda **more: Extractor("squeezenet1_1", {"c3": Level("features.5", 8)}, **more),
}


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_weights_of_rgb_are_spread_by_the_rule_of_timm(channels: int) -> None:
    helpers = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 5, 5)
    expected = helpers.adapt_input_conv(channels, weight.clone())
    torch.testing.assert_close(spread_weight(weight, channels), expected)


def test_a_network_of_one_channel_sees_grey_as_three_equal_ones() -> None:
    weight = torch.randn(8, 3, 5, 5)
    grey = torch.rand(1, 1, 9, 9)
    of_three = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(torch.nn.functional.conv2d(grey, spread_weight(weight, 1)), of_three)


def test_normalization_and_batches_take_any_channels() -> None:
    images = [torch.rand(5, 20, 30), torch.rand(5, 24, 24)]
    pixel_format = SEResNet(18, levels=["c3"], in_channels=5).pixel_format
    batch = to_batch(images, pixel_format, 20, 40, 8)
    assert batch.tensors.shape[:2] == (2, 5)
    values = normalize(torch.full((5, 1, 1), 0.5), pixel_format).flatten()
    torch.testing.assert_close(values[3:], values[:2])
    with pytest.raises(ValueError, match=r"images\[0\] must be \[5, H, W\] with H, W > 0, got \[3, 20, 30\]"):
        to_batch([torch.rand(3, 20, 30)], pixel_format, 20, 40, 8)
    assert to_picture(torch.ones(1, 2, 2)).tolist() == torch.full((3, 2, 2), 255).tolist()
    assert to_picture(torch.zeros(5, 2, 2, dtype=torch.uint8)).shape == (3, 2, 2)


def dataset(tmp_path: Path, kind: str, augment: Augment | None, limits: object = None, **more: object) -> YOLO:
    channels = KINDS[kind][0]
    root = tmp_path / kind
    if not root.exists():
        write_set(root, kind)
    return YOLO(str(root), augment=augment, channels=channels, range=limits, **more)  # type: ignore[arg-type]


GEOMETRY = Augment(
    flip=1.0,
    vertical_flip=1.0,
    scale_jitter=(0.5, 0.5),
    crop=1.0,
    safe_crop=SafeCrop(p=1.0),
    degrade=Degrade(blur=1.0, noise=1.0),
    combine=Combine(mosaic=Mosaic(p=1.0), mixup=MixUp(p=1.0)),
    transforms=(Transform("Affine", {"rotate": [-5, 5], "p": 1.0}),),
)


@pytest.mark.parametrize(("kind", "limits"), [("grey", None), ("rgba", None), ("four_16", "dtype"), ("five", (-1, 1))])
def test_what_moves_pixels_moves_all_channels(tmp_path: Path, kind: str, limits: object) -> None:
    data = dataset(tmp_path, kind, GEOMETRY, limits, resize=Resize("letterbox", 48), loader=Loader(4, num_workers=0))
    channels, dtype = KINDS[kind][0], torch.uint8 if limits is None else torch.float32
    for images, _ in data.train_dataloader():
        for image in images:
            assert (image.shape[0], image.dtype) == (channels, dtype)
            assert image.stride(0) == 1
            assert image.is_floating_point() is False or (image.min() >= 0 and image.max() <= 1)
    plain = dataset(tmp_path, kind, Augment(flip=1.0), limits)
    image, target = plain.dataset("train", augmented=True)[(0, 0)]
    whole, _ = plain.dataset("train")[(0, 0)]
    assert torch.equal(image, whole.flip(2))
    assert len(target["boxes"]) == 1


def test_images_are_skipped_that_cannot_be_read_as_the_data_say(tmp_path: Path) -> None:
    dataset(tmp_path, "five", None)
    folder = tmp_path / "five" / "images" / "train"
    (folder / "train0.npy").write_bytes((folder / "train0.npy").read_bytes()[:500])
    annotations = dataset(tmp_path, "five", None, (-1, 1), on_bad="skip").annotations("train")
    assert len(annotations) == 4  # floating point has a white point by its range alone
    assert annotations.counts["images skipped: unreadable"] == 1
    with pytest.raises(DataError, match="images skipped: unreadable: 5"):
        dataset(tmp_path, "five", None, on_bad="skip").annotations("train")


def test_a_check_reads_images_as_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(write_set(tmp_path / "set", "grey_16"))
    fine, dark = ["--channels", "1", "--range", "0,4095"], ["--channels", "1", "--range", "0,70000"]
    for options, status, says in (
        ([], 0, "0 errors"),  # grey becomes RGB of 8 bits
        (fine, 0, "0 errors"),
        (dark, 1, "pixels of uint16 end at 65535, but range is [0, 70000]"),
        (["--channels", "4"], 1, "has 1 channels (pages), but channels is 4"),
        (["--range", "dark"], 2, "--range dark: expected dtype, or black and white"),
    ):
        assert cli.main(["data", "check", root, *options]) == status
        assert says in "".join(capsys.readouterr())
    splits = {"val": dataset(tmp_path, "five", None, (-1, 1)), "half": dataset(tmp_path, "five", None, "dtype")}
    report = check_data(splits)
    assert report.counts["val"]["images used"] == 3
    assert all(message.startswith("half: ") for message in report.grouped(True)["images: unreadable"])


@pytest.mark.parametrize("name", BACKBONES)
def test_pretrained_weights_of_rgb_fit_other_channels_and_those_of_these_too(tmp_path: Path, name: str) -> None:
    make, images = BACKBONES[name], torch.rand(1, 3, 96, 96)
    rgb = make().eval()
    state = rgb.state_dict()
    names = {key: value for key, value in state.items() if not key.startswith("laterals.")}
    cut = all(key.startswith("body.") for key in names)
    path = tmp_path / "rgb.pth"
    torch.save({key.removeprefix("body.") if cut else key: value for key, value in names.items()}, path)
    grey = make(in_channels=1, weights=str(path)).eval()
    assert (grey.pixel_format.channels, len(grey.pixel_format.std)) == (1, 1)
    level = next(iter(rgb.strides))
    torch.testing.assert_close(
        grey(images[:, :1])[level], rgb(images[:, :1].expand(-1, 3, -1, -1))[level], atol=1e-4, rtol=1e-3
    )
    first = next(iter(grey.parameters()))
    assert first.shape[1] == 1
    four = make(in_channels=4)
    own = {key: value for key, value in four.state_dict().items() if not key.startswith("laterals.")}
    torch.save({key.removeprefix("body.") if cut else key: value for key, value in own.items()}, path)
    again = make(in_channels=4, weights=str(path))
    assert torch.equal(next(iter(again.parameters())), next(iter(four.parameters())))
    with pytest.raises(CheckpointError, match="other shapes"):
        make(in_channels=5, weights=str(path))


def test_timm_and_pyramids_take_channels(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    rgb = Extractor("timm/resnet18", ["c3"])
    path = tmp_path / "w.safetensors"
    from safetensors.torch import save_file

    save_file({k.removeprefix("body."): v for k, v in rgb.state_dict().items() if k.startswith("body.")}, path)
    four = Extractor("timm/resnet18", ["c3"], weights=str(path), in_channels=4)
    torch.testing.assert_close(next(four.parameters()), spread_weight(next(rgb.parameters()), 4))
    fpn = FPN(SEResNet(18, levels=["c3", "c4"], out_channels="own", in_channels=2), 32)
    assert fpn.pixel_format.channels == 2
    assert fpn(torch.rand(1, 2, 64, 64))["p3"].shape == (1, 32, 8, 8)


def test_channels_are_unchanged_where_there_are_three() -> None:
    states = []
    for more in ({}, {"in_channels": 3}):
        torch.manual_seed(0)
        states.append(SEResNet(18, levels=["c3"], **more).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(ValueError, match=r"in_channels must be at least 1, got 0"):
        SEResNet(18, in_channels=0)
    with pytest.raises((UsageError, ValueError)):
        Extractor("squeezenet1_1", {}, in_channels=2)
