"""Boxes of other detectors: of torchvision's by name, of modules of the user's own, and of a real foreign one."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights

from detpipe import FastRCNNHead, FromDetector, SEResNet, TwoStageDetector
from detpipe.proposals.registry import remake_source
from detpipe.support.errors import CheckpointError, UsageError

from .needs import PLACES, Image, boxes_are_sound, planted, scikit_image


class Bright(nn.Module):
    """Finds the box around what is bright, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.least = nn.Parameter(torch.tensor(0.6))
        self.modes: list[bool] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.modes.append(self.training)
        [image] = images
        assert 0 <= image.min() <= image.max() <= 1
        y, x = (image[0] > self.least).nonzero(as_tuple=True)
        box = torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()
        nothing = torch.tensor([[0.0, 0.0, float("nan"), 9.0], [0.0, 0.0, 9.0, 9.0]])
        return [{"boxes": torch.cat((box[None], nothing)), "scores": torch.tensor([0.9, 0.8, 0.01])}]


class Detects:
    """No module, with a method that finds what it is told."""

    def __init__(self, *found: Any) -> None:
        self.found = found

    def detect(self, image: Image) -> Any:
        assert image.dtype == np.uint8
        return self.found


def test_a_module_of_torchvisions_kind() -> None:
    module = Bright().train()
    source = FromDetector(module)
    image = planted(PLACES[0])
    boxes, scores = source.propose(image)
    boxes_are_sound(boxes, scores, image, source)
    assert boxes.tolist() == [list(map(float, PLACES[0]))]  # not the box that is not finite, nor that of a low score
    assert not any(module.modes)
    assert source.settings["detector"] == "Bright"


def test_in_a_detector_it_is_not_trained() -> None:
    backbone = SEResNet(18, levels=["c3"])
    head = FastRCNNHead(backbone.out_channels, 2, backbone.strides, fc=[8])
    source = FromDetector(Bright())
    detector = TwoStageDetector(backbone, source, head, min_size=100, max_size=140).train()
    image = torch.from_numpy(planted(PLACES[1])).permute(2, 0, 1)
    target: Any = {"boxes": torch.tensor([PLACES[1]]).float(), "labels": torch.tensor([1])}
    losses = detector.losses([image], [target])
    assert set(losses) >= {"loss_classifier", "loss_box_reg"}
    assert not any(source.network.modes)
    assert not source.network.least.requires_grad


def test_a_module_with_a_method_detect() -> None:
    image = planted(PLACES[0])
    found = np.array([[1, 2, 30, 40], [5, 6, 70, 80]], dtype=object)
    boxes, scores = FromDetector(Detects(found, np.array([0.5, 0.7], dtype=object), "landmarks")).propose(image)
    assert boxes.tolist() == [[5, 6, 70, 80], [1, 2, 30, 40]]
    assert scores.tolist() == pytest.approx([0.7, 0.5])
    for nothing in ((None, [None]), ([], [])):
        boxes, scores = FromDetector(Detects(*nothing)).propose(image)
        assert boxes.shape == (0, 4)
        assert scores.shape == (0,)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (Detects([[0, 0, 5, 5]], [0.5, 0.6]), "Detects returned 1 boxes with 2 scores"),
        (nn.Identity(), "Identity returned a list for a list of one image; expected a list of one dict"),
    ],
)
def test_other_results_are_refused(detector: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FromDetector(detector).propose(planted(PLACES[0]))


NAME = "ssdlite320_mobilenet_v3_large"  # the smallest of torchvision's


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = getattr(detection, NAME)(weights=None, weights_backbone=None)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def test_torchvisions_by_name_from_a_file(weights: Path) -> None:
    source = FromDetector(NAME, str(weights), min_score=0.0, max_boxes=20)
    image = planted(PLACES[2])
    boxes, scores = source.propose(image)
    network = getattr(detection, NAME)(weights=None, weights_backbone=None).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    [found] = network([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    assert np.allclose(scores[:5], found["scores"][:5].detach(), atol=1e-6)
    boxes_are_sound(boxes, scores, image, source)
    again = remake_source("detector", source.settings)
    assert np.array_equal(again.propose(image)[0], boxes)


def test_its_weights_without_eps_are_read_so(tmp_path: Path) -> None:
    """torchvision sets eps of these to 0 with the weights that it publishes."""
    network = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(network.state_dict(), tmp_path / "retinanet.pth")
    source = FromDetector("retinanet_resnet50_fpn", str(tmp_path / "retinanet.pth"))
    assert {module.eps for module in source.network.modules() if hasattr(module, "running_var")} == {0.0}


def test_bad_names_and_files_are_one_line(weights: Path, tmp_path: Path) -> None:
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            UsageError,
            "unknown detector 'fcos_resnet50'.*did you mean 'fcos_resnet50_fpn",
            lambda: FromDetector("fcos_resnet50"),
        ),
        (UsageError, r"unknown weights 'COCO' of ssdlite\S+ expected .*COCO_V1", lambda: FromDetector(NAME, "COCO")),
        (CheckpointError, r"no\.pth: no such file", lambda: FromDetector(NAME, str(tmp_path / "no.pth"))),
        (CheckpointError, r"do not fit ssd300_vgg16: Missing key", lambda: FromDetector("ssd300_vgg16", str(weights))),
        (
            ValueError,
            r"detector must be a name or a module, got \{'class_path'",
            lambda: FromDetector({"class_path": "os"}),
        ),
        (ValueError, r"min_score must be in 0\.\.1, got 2", lambda: FromDetector(Bright(), min_score=2)),
    ]
    for kind, message, make in cases:
        with pytest.raises(kind, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"broken\.pth cannot be read as a state dict"):
        FromDetector(NAME, str(broken))


def test_no_network_names_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_names(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url = get_model_weights(NAME)["COCO_V1"].url  # pyright: ignore
    with pytest.raises(
        CheckpointError, match=rf"cannot be downloaded .*put {url} at {tmp_path}/hub/checkpoints/ssdlite"
    ):
        FromDetector(NAME)


@scikit_image
def test_faces_of_a_real_foreign_detector() -> None:
    if importlib.util.find_spec("facenet_pytorch") is None:
        pytest.skip(
            "facenet-pytorch is not here, whose MTCNN has its weights inside: pip install --no-deps facenet-pytorch"
        )
    from facenet_pytorch import MTCNN
    from skimage.data import astronaut

    source = FromDetector(MTCNN(keep_all=True, device="cpu"))
    boxes, scores = source.propose(astronaut())
    x1, y1, x2, y2 = boxes[0].tolist()
    assert scores[0] > 0.99
    assert 150 < x1 < 200 < 230 < x2 < 300
    assert 50 < y1 < 110 < 150 < y2 < 220
