from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from detpipe.backbones import SEResNet
from detpipe.optimization import LRSchedule, Optimizer, configure
from detpipe.regions.image_classifier import AUXILIARY_WEIGHT, ImageClassifier, top_accuracy
from detpipe.stages import Backbone
from detpipe.support.errors import UsageError
from detpipe.types import Features, PixelFormat


class Net(Backbone):
    """Two levels of unequal width; notes what it is given."""

    def __init__(self, pixel_format: PixelFormat = PixelFormat(), auxiliary_classes: int | None = None) -> None:  # noqa: B008
        super().__init__()
        self.strides = {"c2": 4, "c3": 8}
        self.pixel_format = pixel_format
        self.fine, self.coarse = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)
        self.auxiliary_classes = auxiliary_classes
        if auxiliary_classes:
            self.auxiliary = nn.Linear(4, auxiliary_classes)

    @property
    def level_channels(self) -> dict[str, int]:
        return {"c2": 4, "c3": 6}

    def forward(self, images: Tensor) -> Features:
        self.seen = images
        fine = self.fine(images)
        return {"c2": fine, "c3": self.coarse(fine)}

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Features, Tensor]:
        features = self(images)
        return features, self.auxiliary(features["c2"].mean((2, 3)))


def pictures(count: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def test_logits_are_a_linear_layer_on_the_average_of_the_coarsest_level() -> None:
    net = Net()
    classifier, images = ImageClassifier(net, 5).eval(), pictures()
    logits = classifier(images)
    level = net(net.seen)["c3"]
    for n in range(3):
        average = [level[n, c].sum().item() / level[n, c].numel() for c in range(6)]
        for k in range(5):
            weights = classifier.classifier.weight[k].tolist()
            expected = sum(w * a for w, a in zip(weights, average, strict=True)) + classifier.classifier.bias[k].item()
            assert logits[n, k].item() == pytest.approx(expected, abs=1e-5)


def test_pixels_are_normalized_as_the_backbone_declares() -> None:
    pixel_format = PixelFormat((10.0, 20.0, 30.0), (1.0, 2.0, 4.0), "bgr", 255.0)
    net = Net(pixel_format)
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 16, 16)  # RGB
    ImageClassifier(net, 2)(image)
    assert net.seen[0, :, 0, 0].tolist() == [(30 - 10) / 1, (20 - 20) / 2, (10 - 30) / 4]
    first = net.seen
    ImageClassifier(net, 2)(image.float() / 255)
    assert torch.allclose(net.seen, first, atol=1e-4)
    assert net.seen.is_contiguous(memory_format=torch.channels_last)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    classifier, images = ImageClassifier(SEResNet(18, levels=["c3"]), 4).eval(), pictures(3, 32, 32)
    whole = classifier(images)
    for n in range(3):
        assert torch.allclose(classifier(images[n : n + 1])[0], whole[n], atol=1e-5)


def test_weights_are_channels_last() -> None:
    classifier = ImageClassifier(Net(), 2)
    assert classifier.backbone.fine.weight.is_contiguous(memory_format=torch.channels_last)


def test_dropout_acts_in_training_only() -> None:
    classifier, images = ImageClassifier(Net(), 5, dropout=0.5), pictures()
    assert not torch.equal(classifier(images), classifier(images))
    classifier.eval()
    assert torch.equal(classifier(images), classifier(images))


def test_label_smoothing_by_hand() -> None:
    classifier, images, labels = ImageClassifier(Net(), 4, label_smoothing=0.2), pictures(2), torch.tensor([3, 0])
    losses, logits = classifier.losses(images, labels)
    log = logits.detach().log_softmax(1)
    expected = 0.0
    for n, label in enumerate(labels.tolist()):
        target = [0.2 / 4 + (0.8 if k == label else 0) for k in range(4)]
        expected -= sum(t * log[n, k].item() for k, t in enumerate(target)) / 2
    assert losses.keys() == {"loss_classifier"}
    assert losses["loss_classifier"].item() == pytest.approx(expected, abs=1e-6)


def test_the_auxiliary_head_is_trained_with_its_weight_and_left_out_of_the_logits() -> None:
    net = Net(auxiliary_classes=4)
    classifier, images, labels = ImageClassifier(net, 4), pictures(), torch.tensor([0, 1, 2])
    losses, logits = classifier.losses(images, labels)
    auxiliary = net.forward_with_auxiliary(net.seen)[1]
    expected = AUXILIARY_WEIGHT * nn.functional.cross_entropy(auxiliary, labels)
    assert losses["loss_auxiliary"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(logits, classifier(images))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be in 0..1, below 1, got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in 0..1, below 1, got -0.1"),
        ({"backbone": Net(auxiliary_classes=7)}, "backbone.auxiliary_classes is 7, but there are 4 classes"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**{"backbone": Net(), "num_classes": 4, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 0, 16)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\] with H, W > 0, got"):
        ImageClassifier(Net(), 2)(torch.zeros(shape))


def test_top_accuracy_is_what_a_loop_counts() -> None:
    logits, labels = torch.randn(200, 9), torch.randint(0, 9, (200,))
    first = fifth = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(9), key=lambda k: -row[k])
        first, fifth = first + (label == ranked[0]), fifth + (label in ranked[:5])
    found = top_accuracy(logits, labels)
    assert found["top1"].item() == pytest.approx(first / 200)
    assert found["top5"].item() == pytest.approx(fifth / 200)
    assert 0 < first < fifth < 200


@pytest.mark.parametrize("classes", [2, 3, 5, 6])
def test_with_up_to_five_classes_the_five_likeliest_are_all(classes: int) -> None:
    found = top_accuracy(torch.randn(50, classes), torch.randint(0, classes, (50,)))
    assert (found["top5"] == 1) == (classes <= 5)


def test_validation_is_a_quotient_of_counts_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, logged = ImageClassifier(Net(), 9).eval(), []
    monkeypatch.setattr(classifier, "log_dict", lambda values, **_: logged.append(values))
    images, labels = pictures(1001, 8, 8), torch.randint(0, 9, (1001,))
    for size in (1, 7, 1001):
        classifier.on_validation_epoch_start()
        with torch.no_grad():
            for part, truth in zip(images.split(size), labels.split(size), strict=True):
                classifier.validation_step((part, truth, []), 0)
        classifier.on_validation_epoch_end()
    with torch.no_grad():
        logits = classifier(images)
    expected = int((logits.argmax(1) == labels).sum())
    assert 0 < expected < 1001
    assert [values["val/top1"] for values in logged] == [expected / 1001] * 3
    assert logged[0]["val/top5"] == logged[2]["val/top5"] > logged[0]["val/top1"]
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert [values["val/loss"] for values in logged] == pytest.approx([loss] * 3, rel=1e-5)


def test_a_single_image_of_a_single_cell_is_refused_in_training() -> None:
    classifier, image, label = ImageClassifier(SEResNet(18, levels=["c5"]), 4), pictures(1, 32, 32), torch.tensor([1])
    with pytest.raises(UsageError, match=r"single image of 32 x 32 pixels, .*; give data.loader.batch_size 2 or more"):
        classifier.losses(image, label)
    classifier.losses(pictures(1, 64, 64), label)
    assert classifier.eval()(image).shape == (1, 4)


def test_the_coarsest_level_counts_whatever_the_order() -> None:
    net = Net()
    net.strides = {"c3": 8, "c2": 4}
    assert ImageClassifier(net, 2).level == "c3"


def test_it_learns_a_batch_by_heart() -> None:
    images, labels = pictures(8, 32, 32), torch.arange(8) % 4
    classifier = ImageClassifier(SEResNet(18, levels=["c3"]), 4, optimizer=Optimizer("adamw", 0.003))
    optimizer = classifier.optimizer.build(classifier.backbone, classifier.classifier)
    for _ in range(25):
        losses, logits = classifier.losses(images, labels)
        optimizer.zero_grad()
        losses["loss_classifier"].backward()
        optimizer.step()
    assert losses["loss_classifier"].item() < 0.1
    assert top_accuracy(logits, labels)["top1"] == 1


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(UsageError, match=r"training never ends: set trainer.max_epochs or trainer.max_steps"):
        configure(Optimizer(), LRSchedule(), math.inf, Net())
