from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from samples import random_boxes
from torch import Tensor, nn
from torchvision.ops import roi_align

from detpipe.backbones import SEResNet
from detpipe.regions.region_classifier import Classification, RegionClassifier
from detpipe.regions.region_context import Context, enlarge
from detpipe.roi_pooling import RoIAlign
from detpipe.stages import Backbone
from detpipe.support.errors import DataError
from detpipe.types import Features, PixelFormat, Target

PLAIN = PixelFormat((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Net(Backbone):
    """One strided convolution; counts its calls."""

    def __init__(self, stride: int = 4, channels: int = 5) -> None:
        super().__init__()
        self.out_channels, self.strides, self.pixel_format = channels, {"c2": stride}, PLAIN
        self.convolution = nn.Conv2d(3, channels, stride, stride)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Features:
        self.seen.append(tuple(images.shape))
        self.features = self.convolution(images)
        if self.features.requires_grad:
            self.features.retain_grad()
        return {"c2": self.features}


def tiny(context: Context = Context(), num_classes: int = 3, **settings: object) -> RegionClassifier:  # noqa: B008
    given = {"pooler": RoIAlign(3), "classification": Classification((8,)), "min_size": 32, "max_size": 64, **settings}
    model = RegionClassifier(Net(), num_classes, context=context, **given)  # type: ignore[arg-type]
    nn.init.normal_(model.layers[-1].weight)  # type: ignore[arg-type]  (logits far from zero, so that tests can see them)
    return model


def scene(height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(3, height, width)


def boxes(*counts: int, height: float = 32, width: float = 48) -> list[Tensor]:
    return [random_boxes(count, height, width) for count in counts]


def truth(one: Tensor, labels: Sequence[int], **flags: Sequence[bool]) -> Target:
    return Target(
        boxes=one,
        labels=torch.tensor(labels, dtype=torch.int64),
        **{name: torch.tensor(flag) for name, flag in flags.items()},
    )  # type: ignore[typeddict-item]


def slow_logits(model: RegionClassifier, image: Tensor, one: Tensor, looks: list[Tensor]) -> Tensor:
    """By the definition: torchvision's operator on each place, joined, through the layers."""
    features = model.backbone(image[None])["c2"]
    pooled = [roi_align(features, [look[None]], 3, 0.25, 2, aligned=True) for look in looks]
    return model.layers(torch.cat(pooled, 1))[0]


@pytest.mark.parametrize("whole", [False, True])
def test_logits_are_those_of_the_definition(whole: bool) -> None:
    model, image = tiny(Context((1.0, 2.0), whole)).eval(), scene()
    one = torch.tensor([4.0, 6.0, 20.0, 18.0])
    twice = torch.tensor([0.0, 0.0, 28.0, 24.0])  # [-4, 0, 28, 24], clipped
    everything = [torch.tensor([0.0, 0.0, 48.0, 32.0])] if whole else []
    [logits] = model([image], [one[None]])
    torch.testing.assert_close(logits[0], slow_logits(model, image, one, [one, twice, *everything]))


@pytest.mark.parametrize("training", [False, True])
def test_one_pass_over_the_images_however_many_boxes(training: bool) -> None:
    model = tiny(Context((1.0, 1.5, 3.0), True)).train(training)
    logits = model([scene(), scene()], boxes(40, 7))
    assert [tuple(one.shape) for one in logits] == [(40, 3), (7, 3)]
    assert model.backbone.seen == [(2, 3, 32, 48)]


def test_each_region_stands_alone_and_keeps_its_place() -> None:
    model, images, given = tiny().eval(), [scene(), scene()], boxes(5, 9)
    together = model(images, given)
    for image, one, logits in zip(images, given, together, strict=True):
        order = torch.randperm(len(one))
        torch.testing.assert_close(model([image], [one[order]])[0], logits[order])
        torch.testing.assert_close(model([image], [one[2:3]])[0][0], logits[2])


@pytest.mark.parametrize("whole", [False, True])
def test_the_neighbors_in_a_batch_and_their_sizes_change_nothing(whole: bool) -> None:
    model = RegionClassifier(
        SEResNet(18, levels=["c3"]), 4, context=Context(whole_image=whole), min_size=40, max_size=60
    )
    model.eval()
    images = [scene(40, 60), scene(60, 40), scene(33, 35), scene(40, 60), scene(200, 300)]
    given = [random_boxes(3, image.shape[1], image.shape[2], smallest=4) for image in images]
    for image, one, logits in zip(images, given, model(images, given), strict=True):
        torch.testing.assert_close(model([image], [one])[0], logits, rtol=1e-4, atol=1e-6)


def test_boxes_are_in_pixels_of_the_images_as_passed() -> None:
    model, image = tiny(min_size=40, max_size=48).eval(), scene(40, 48)
    [one] = boxes(4)
    large = torch.rand(3, 300, 360)
    small = F.interpolate(large[None], (40, 48), mode="bilinear", antialias=True)[0]
    scale = torch.tensor([360 / 48, 300 / 40, 360 / 48, 300 / 40])
    torch.testing.assert_close(model([large], [one * scale])[0], model([small], [one])[0], rtol=1e-4, atol=1e-5)
    expected = model([image], [one])[0]
    assert not torch.allclose(model([image], [one / 2])[0], expected, atol=1e-2)
    integers = (image * 255).round().to(torch.uint8)
    torch.testing.assert_close(model([integers], [one])[0], model([integers / 255], [one])[0])
    assert model([image], [one.double()])[0].dtype == torch.float32


def test_a_flip_of_image_and_boxes_flips_what_is_pooled() -> None:
    model, image = tiny().eval(), scene()
    with torch.no_grad():  # a network and layers that do not tell left from right
        kernel = model.backbone.convolution.weight
        kernel.copy_((kernel + kernel.flip(-1)) / 2)
        first = model.layers[1].weight
        maps = first.view(8, -1, 3, 3)
        first.copy_(((maps + maps.flip(-1)) / 2).flatten(1))
    [one] = boxes(6)
    flipped = torch.stack((48 - one[:, 2], one[:, 1], 48 - one[:, 0], one[:, 3]), 1)
    torch.testing.assert_close(model([image.flip(-1)], [flipped])[0], model([image], [one])[0], rtol=1e-4, atol=1e-6)


def test_context_sees_what_the_region_does_not() -> None:
    image = scene()
    changed = image.clone()
    changed[:, :4, :4] = 1 - changed[:, :4, :4]  # two cells from what is near
    far = torch.tensor([[24.0, 16.0, 32.0, 24.0]])
    near = torch.tensor([[8.0, 4.0, 16.0, 12.0]])
    for context, sees_near, sees_far in (
        (Context((1.0,)), False, False),
        (Context((1.0, 3.0)), True, False),
        (Context((1.0,), whole_image=True), True, True),
    ):
        model = tiny(context).eval()
        differs = [not torch.equal(model([image], [one])[0], model([changed], [one])[0]) for one in (near, far)]
        assert differs == [sees_near, sees_far]


def test_no_boxes_are_legal_and_carry_a_gradient() -> None:
    model = tiny(Context(whole_image=True))
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    logits = model([scene(), scene()], none)
    assert [tuple(one.shape) for one in logits] == [(0, 3)] * 2
    loss = model.losses([scene(), scene()], [truth(one, []) for one in none])["loss_classifier"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert [len(one["labels"]) for one in model.eval().predict([scene(), scene()], none)] == [0, 0]
    assert [len(one) for one in model([scene(), scene()], [boxes(3)[0], none[0]])] == [3, 0]


def test_the_loss_is_the_mean_over_objects_that_count() -> None:
    model, images, given = tiny(), [scene(), scene()], boxes(3, 2)
    targets = [
        truth(given[0], [1, 2, 3], iscrowd=[False, True, False], difficult=[False, False, True]),
        truth(given[1], [3, 1]),
    ]
    logits = model(images, given)
    rows = [(logits[0][0], 1), (logits[1][0], 3), (logits[1][1], 1)]
    expected = sum(-row.log_softmax(0)[label - 1].item() for row, label in rows) / 3
    loss = model.losses(images, targets)["loss_classifier"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    ignored = [truth(one, [9] * len(one), difficult=[True] * len(one)) for one in given]
    assert model.losses(images, ignored)["loss_classifier"].item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_smoothing_are_those_of_torch(smoothing: float) -> None:
    weights = (1.0, 4.0, 0.5)
    model = tiny(classification=Classification((8,), label_smoothing=smoothing, class_weights=weights))
    image, [one] = scene(), boxes(4)
    labels = torch.tensor([1, 2, 2, 3])
    loss = model.losses([image], [Target(boxes=one, labels=labels)])["loss_classifier"]
    expected = F.cross_entropy(model([image], [one])[0], labels - 1, torch.tensor(weights), label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert "class_weights" not in model.state_dict()


def test_gradients_reach_the_features_of_region_and_context() -> None:
    model = tiny(Context((1.0, 3.0)))
    model([scene()], [torch.tensor([[16.0, 16.0, 24.0, 24.0]])])[0].square().sum().backward()
    gradient = model.backbone.features.grad
    assert gradient is not None
    touched = gradient.abs().sum((0, 1)) > 0
    assert touched[4:6, 4:6].all()  # the region
    assert touched[2:8, 2:8].all()  # what lies around it
    assert not touched[:, 9:].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_the_colors_of_patches_and_of_what_is_around_them() -> None:
    """Class 1 and 2 differ in the patch, class 2 and 3 only in what lies around it."""

    def example() -> tuple[Tensor, Target]:
        image, one = torch.full((3, 32, 96), 0.5), torch.empty(3, 4)
        for k in range(3):
            left, top = 32 * k + 8 + int(torch.randint(0, 8, ())), 8 + int(torch.randint(0, 8, ()))
            if k == 2:
                image[1, top - 6 : top + 14, left - 6 : left + 14] = 1.0
            image[:, top : top + 8, left : left + 8] = 0.0
            image[0 if k == 0 else 2, top : top + 8, left : left + 8] = 1.0
            one[k] = torch.tensor([left, top, left + 8.0, top + 8.0])
        return image, truth(one, [1, 2, 3])

    model = tiny(Context((1.0, 2.5)), max_size=96)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        images, targets = map(list, zip(*(example() for _ in range(4)), strict=True))
        optimizer.zero_grad()
        loss = model.losses(images, targets)["loss_classifier"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    images, targets = map(list, zip(*(example() for _ in range(5)), strict=True))
    for found in model.eval().predict(images, [target["boxes"] for target in targets]):
        assert found["labels"].tolist() == [1, 2, 3]
        assert found["scores"].min() > 0.6


def test_predictions_are_the_likeliest_class_and_its_probability() -> None:
    model, images = tiny(num_classes=4).eval(), [scene(), scene(40, 40)]
    given = [random_boxes(5, 32, 48), random_boxes(3, 40, 40)]
    for found, logits in zip(model.predict(images, given), model(images, given), strict=True):
        best = logits.softmax(-1).max(-1)
        assert torch.equal(found["labels"], best.indices + 1)
        torch.testing.assert_close(found["scores"], best.values)
        assert not found["scores"].requires_grad
    batch = images, [Target(boxes=one) for one in given]
    assert torch.equal(model.predict_step(batch, 0)[1]["labels"], found["labels"])
    with pytest.raises(ValueError, match=r"the model is in training mode, .*; call eval\(\)"):
        model.train().predict(images, given)


def test_many_boxes_are_pooled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, given = tiny(Context(whole_image=True)).eval(), [scene(), scene()], boxes(5, 6)
    with torch.no_grad():
        expected = model(images, given)
        monkeypatch.setattr("detpipe.regions.region_classifier.ROIS_PER_PASS", 4)
        for one, other in zip(model(images, given), expected, strict=True):
            torch.testing.assert_close(one, other)


def validate(model: RegionClassifier, *batches: tuple[list[Tensor], list[Target]]) -> dict[str, float]:
    logged: dict[str, float] = {}
    model.log_dict = lambda values, **_: logged.update({k: float(v) for k, v in values.items()})  # type: ignore[method-assign]
    model.on_validation_epoch_start()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            model.validation_step(batch, index)
    model.on_validation_epoch_end()
    return logged


def test_accuracies_are_counted_by_region_and_by_class() -> None:
    model, given = tiny().eval(), boxes(4, 0, 3)
    labels = [[1, 1, 1, 3], [], [1, 1, 3]]  # class 2 does not occur
    flags = [[False, False, False, True], [], [False] * 3]
    images = [scene() for _ in given]
    targets = [truth(*row[:2], difficult=row[2]) for row in zip(given, labels, flags, strict=True)]
    logits = torch.cat(model(images, given))
    counted = torch.tensor([0, 1, 2, 4, 5, 6])
    wanted = torch.tensor([1, 1, 1, 1, 1, 3]) - 1
    hit = (logits[counted].argmax(-1) == wanted).float()
    expected = {
        "val/accuracy": hit.mean().item(),
        "val/mean_class_accuracy": ((hit[:5].mean() + hit[5]) / 2).item(),
        "val/loss": F.cross_entropy(logits[counted], wanted).item(),
    }
    assert validate(model, (images, targets)) == pytest.approx(expected, rel=1e-5)
    apart = [([image], [target]) for image, target in zip(images, targets, strict=True)]
    assert validate(model, *apart) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="the validation images have no region that counts"):
        validate(model, ([images[1]], [targets[1]]))


def test_enlarged_boxes_stay_in_the_image_and_have_a_size() -> None:
    given = torch.tensor(
        [[10.0, 10.0, 20.0, 14.0], [-6.0, 2.0, 4.0, 6.0], [47.9, 31.9, 60.0, 50.0], [5.0, 5.0, 5.2, 5.2]]
    )
    result = enlarge(given, 2.0, 32, 48)
    expected = [[5, 8, 25, 16], [0, 0, 6, 8], [47.45, 31.45, 48, 32], [4.6, 4.6, 5.6, 5.6]]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32))


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    "box", [[0, 0, NAN, 9], [0, 0, INF, 9], [5, 5, 5, 9], [9, 5, 5, 9], [48, 0, 60, 9], [-9, -9, 0, 9]]
)
def test_a_box_that_cannot_be_looked_at_is_named(box: list[float]) -> None:
    model, given = tiny().eval(), boxes(2, 3)
    given[1][2] = torch.tensor(box)
    message = r"boxes\[1\], box 2: expected finite \[x1, y1, x2, y2\] .* image of 48 x 32 pixels, got \["
    for call in (model.predict, model):
        with pytest.raises(ValueError, match=message) as error:
            call([scene(), scene()], given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "given", "message"),
    [
        ([], [], "expected images and one tensor of boxes for each, got 0 and 0"),
        ([scene()], boxes(1, 1), "got 1 and 2"),
        ([scene()[0]], boxes(1), r"images\[0\] must be \[3, H, W\] with H, W > 0, got \[32, 48\]"),
        ([scene()], [torch.zeros(2, 5)], r"boxes\[0\] must be \[P, 4\] \(x1, y1, x2, y2\), got \[2, 5\]"),
    ],
)
def test_other_shapes_are_refused(images: list[Tensor], given: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().eval().predict(images, given)


def test_wrong_labels_are_named() -> None:
    with pytest.raises(ValueError, match=r"targets\[0\], box 1: label 4, expected 1\.\.3"):
        tiny().losses([scene()], [truth(boxes(2)[0], [1, 4])])
    with pytest.raises(ValueError, match=r"targets\[0\] needs 'boxes' and 'labels'"):
        tiny().losses([scene()], [Target(boxes=boxes(2)[0])])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Context(()), r"context\.factors: expected at least one positive number, got \[\]"),
        (lambda: Context((1.0, INF)), r"context.factors must be positive and finite"),
        (lambda: Classification(fc=(0,)), "classification.fc must be at least 1"),
        (lambda: Classification(class_weights=(1.0, 0.0)), "classification.class_weights must be positive"),
        (lambda: Classification(dropout=1.0), r"classification.dropout must be in 0\.\.1, below 1"),
        (lambda: tiny(classification=Classification(class_weights=(1.0, 2.0))), "expected 3, one a class"),
        (lambda: tiny(num_classes=0), "num_classes must be at least 1"),
        (lambda: tiny(min_size=65), "0 < min_size <= max_size"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_linear_classifier_has_one_layer() -> None:
    model = tiny(classification=Classification(fc=()))
    assert [type(layer) for layer in model.layers] == [nn.Flatten, nn.Linear]
    assert model([scene()], boxes(2))[0].shape == (2, 3)


def test_bfloat16_stays_close() -> None:
    model, image, given = tiny().eval(), scene(), boxes(4)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.losses([image], [truth(given[0], [1, 2, 3, 1])])["loss_classifier"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low, model.losses([image], [truth(given[0], [1, 2, 3, 1])])["loss_classifier"], rtol=0.05, atol=0.02
    )
