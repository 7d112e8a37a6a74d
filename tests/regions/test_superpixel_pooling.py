from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from detpipe.regions.superpixel_pooling import Localization, Localized, SuperpixelPoolingHead, segment

POOLINGS = pytest.mark.parametrize("pooling", ["superpixel", "none"])


def superpixels(images: int = 2, height: int = 16, width: int = 24, count: int = 7) -> Tensor:
    """Ragged stripes; the second image has fewer, and padding at the right and the bottom."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    labels = ((rows * 0.7 + columns + torch.rand(height, 1) * 4).long() * count // (2 * width)).clamp(max=count - 1)
    labels = labels.unique(return_inverse=True)[1]
    batch = labels.repeat(images, 1, 1)
    if images > 1:
        batch[1] = batch[1].clamp(max=2)
        batch[1, 12:], batch[1, :, 20:] = -1, -1
    return batch


def head(classes: int = 3, channels: int = 5, **settings: object) -> SuperpixelPoolingHead:
    built = SuperpixelPoolingHead(channels, classes, Localization(channels=4, **settings))  # type: ignore[arg-type]
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.3, 0.2)
    return built.eval()


def pixel_features(built: SuperpixelPoolingHead, features: Tensor, size: tuple[int, int]) -> Tensor:
    upsampled = built.upsample(built.encode(features))
    return nn.functional.interpolate(upsampled, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("sharpness", [0.0, 3.0])
def test_it_is_what_loops_over_pixels_and_superpixels_make(sharpness: float) -> None:
    built, features, labels = head(sharpness=sharpness), torch.randn(2, 5, 4, 6), superpixels()
    found = built(features, labels)
    pixels = pixel_features(built, features, (16, 24)).tolist()
    weights, bias = built.region_classifier.weight.tolist(), built.region_classifier.bias.tolist()
    for n in range(2):
        sums: dict[int, list[float]] = {}
        areas: dict[int, int] = {}
        for y in range(16):
            for x in range(24):
                label = int(labels[n, y, x])
                if label >= 0:
                    areas[label] = areas.get(label, 0) + 1
                    old = sums.get(label, [0.0] * 4)
                    sums[label] = [old[c] + pixels[n][c][y][x] for c in range(4)]
        for k in range(3):
            scores = []
            for label in sorted(sums):
                mean = [value / areas[label] for value in sums[label]]
                activation = sum(w * value for w, value in zip(weights[k], mean, strict=True))
                assert found.activations[n, label, k].item() == pytest.approx(activation, abs=1e-4)
                scores.append(activation + bias[k])
            expected = sum(scores) / len(scores)
            if sharpness:
                expected = math.log(sum(math.exp(sharpness * s) for s in scores) / len(scores)) / sharpness
            assert found.region_logits[n, k].item() == pytest.approx(expected, abs=1e-4)


def test_the_branch_of_the_whole_image_averages_what_is_no_padding() -> None:
    built, features, labels = head(), torch.randn(2, 5, 4, 6), superpixels()
    found, encoded = built(features, labels), built.encode(features)
    for n, (height, width) in enumerate([(4, 6), (3, 5)]):  # 12 x 20 of 16 x 24 pixels, 4 pixels a cell
        mean = encoded[n, :, :height, :width].mean((1, 2))
        assert torch.allclose(found.global_logits[n], built.global_classifier(mean), atol=1e-5)


def test_without_superpixels_each_cell_is_one() -> None:
    built, features, labels = head(pooling="none"), torch.randn(2, 5, 4, 6), superpixels()
    found = built(features, labels)
    upsampled = built.upsample(built.encode(features))
    assert found.size == (8, 12)
    for n, (height, width) in enumerate([(8, 12), (6, 10)]):
        mean = upsampled[n, :, :height, :width].mean((1, 2))
        assert torch.allclose(found.region_logits[n], built.region_classifier(mean), atol=1e-5)
    # superpixels that are the cells make the same of the same weights, but for what bilinear reading mixes
    cells = torch.arange(96).view(1, 8, 12).repeat(2, 1, 1)
    cells[1, 6:], cells[1, :, 10:] = -1, -1
    alike = head(doublings=1)
    alike.load_state_dict(built.state_dict())
    assert torch.allclose(alike(features, cells).region_logits, found.region_logits, atol=1e-5)


def test_maps_are_constant_on_superpixels_and_in_0_to_1() -> None:
    built, features, labels = head(), torch.randn(2, 5, 4, 6), superpixels()
    found = built(features, labels)
    maps, scores = built.maps(found, labels), built.scores(found)
    assert maps.shape == (2, 3, 16, 24)
    assert maps.min() >= 0
    assert maps.max() <= 1
    for n in range(2):
        for y in range(16):
            for x in range(24):
                label = int(labels[n, y, x])
                expected = scores[n, label] if label >= 0 else torch.zeros(3)
                assert torch.equal(maps[n, :, y, x], expected)


def test_the_best_superpixel_of_a_class_has_the_probability_of_the_class() -> None:
    activations = torch.tensor([[[4.0, -1.0], [2.0, -2.0], [9.0, 9.0]]])
    weights = torch.tensor([[1.0, 1.0, 0.0]])  # the third superpixel is not in this image
    found = Localized(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]]), activations, weights, (1, 3))
    sigmoid = 1 / (1 + math.exp(-1))
    expected = [[(0.5 + sigmoid) / 2, 0.0], [(0.5 + sigmoid) / 4, 0.0], [0.0, 0.0]]
    assert torch.allclose(head(2).scores(found)[0], torch.tensor(expected))
    given = head(2).scores(found, torch.tensor([[1.0, 1.0]]))
    assert given[0].tolist() == [[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]]
    assert not head(2).scores(found, torch.tensor([[0.0, 1.0]])).any()


def test_losses_by_hand() -> None:
    built = head()
    found = built(torch.randn(2, 5, 4, 6), superpixels())
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    losses = built.losses(found, present)
    assert set(losses) == {"loss_global", "loss_superpixels"}
    for name, logits in (("loss_global", found.global_logits), ("loss_superpixels", found.region_logits)):
        terms = [
            math.log(1 + math.exp(-logit if truth else logit))
            for row, truths in zip(logits.tolist(), present.tolist(), strict=True)
            for logit, truth in zip(row, truths, strict=True)
        ]
        assert losses[name].item() == pytest.approx(sum(terms) / 6, abs=1e-5)


@POOLINGS
@pytest.mark.parametrize("sharpness", [0.0, 2.0])
def test_gradients(pooling: str, sharpness: float) -> None:
    built = head(2, channels=3, pooling=pooling, sharpness=sharpness).double()
    labels, features = superpixels(2, 6, 8, 4), torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    labels[1] = labels[1].clamp(max=1)

    def total(values: Tensor) -> tuple[Tensor, ...]:
        found = built(values, labels)
        return (*built.losses(found, torch.tensor([[1, 0], [0, 1]])).values(), found.activations)

    assert torch.autograd.gradcheck(total, (features,))


@POOLINGS
def test_all_weights_learn(pooling: str) -> None:
    built = head(pooling=pooling).train()
    losses = built.losses(built(torch.randn(2, 5, 4, 6), superpixels()), torch.zeros(2, 3))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in built.parameters())


@POOLINGS
def test_images_do_not_see_each_other_nor_the_padding(pooling: str) -> None:
    built, features, labels = head(pooling=pooling, sharpness=1.0), torch.randn(2, 5, 4, 6), superpixels()
    whole = built(features, labels)
    for n in range(2):
        alone = built(features[n : n + 1], labels[n : n + 1])
        assert torch.allclose(alone.region_logits[0], whole.region_logits[n], atol=1e-5)
        assert torch.allclose(alone.global_logits[0], whole.global_logits[n], atol=1e-5)
        maps = built.maps(alone, labels[n : n + 1])[0]
        assert torch.allclose(maps, built.maps(whole, labels)[n], atol=1e-5)
        assert torch.equal(built.maps(whole.image(n), labels[n : n + 1])[0], built.maps(whole, labels)[n])


@POOLINGS
@pytest.mark.parametrize("sharpness", [0.0, 2.0])
def test_an_image_of_padding_alone_gives_finite_losses(pooling: str, sharpness: float) -> None:
    built = head(pooling=pooling, sharpness=sharpness).train()
    labels = superpixels()
    labels[1] = -1
    found = built(torch.randn(2, 5, 4, 6, requires_grad=True), labels)
    losses = built.losses(found, torch.ones(2, 3))
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())
    assert not built.maps(found, labels)[1].any()


def test_no_images() -> None:
    built = head()
    found = built(torch.zeros(0, 5, 4, 6), torch.zeros(0, 16, 24, dtype=torch.long))
    assert built.maps(found, torch.zeros(0, 16, 24, dtype=torch.long)).shape == (0, 3, 16, 24)


@POOLINGS
def test_half_precision(pooling: str) -> None:
    built, features, labels = head(pooling=pooling), torch.randn(2, 5, 4, 6), superpixels()
    with torch.autocast("cpu", torch.bfloat16):
        found = built(features, labels)
        losses = built.losses(found, torch.ones(2, 3))
    exact = built.losses(built(features, labels), torch.ones(2, 3))
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), abs=0.02)


def test_the_sharper_the_closer_to_the_maximum() -> None:
    features, labels = torch.randn(2, 5, 4, 6), superpixels()
    first = head()
    logits = []
    for sharpness in (0.0, 0.5, 100.0):
        built = head(sharpness=sharpness)
        built.load_state_dict(first.state_dict())
        found = built(features, labels)
        logits.append(found.region_logits)
    scores = torch.where(found.weights[..., None] > 0, found.activations, -torch.inf) + built.region_classifier.bias
    assert (logits[0] <= logits[1]).all()
    assert (logits[1] <= logits[2]).all()
    assert torch.allclose(logits[2], scores.amax(1), atol=0.03)


def test_segments_by_hand() -> None:
    maps = torch.tensor([[[0.9, 0.29, 0.0, 0.3]], [[0.95, 0.1, 0.0, 0.3]]])
    assert segment(maps, 0.3).tolist() == [[2, 0, 0, 1]]
    assert segment(maps, 0.0).tolist() == [[2, 1, 0, 1]]  # a score of 0 is no class
    assert segment(maps[None].expand(5, -1, -1, -1), 0.3).shape == (5, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "superpixels"}, "pooling must be one of superpixel, none, got 'superpixels'.*did you mean"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"doublings": -1}, "doublings must be at least 0"),
        ({"sharpness": math.nan}, "sharpness must not be negative"),
        ({"threshold": 1.5}, r"threshold must be in 0\.\.1"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Localization(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "classes"), [(0, 2), (2, 0)])
def test_bad_numbers(channels: int, classes: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SuperpixelPoolingHead(channels, classes)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        ((2, 5, 4), (2, 8, 8), r"features must be \[N, C, H, W\] with C, H, W > 0, got \[2, 5, 4\]"),
        ((2, 5, 0, 4), (2, 8, 8), r"features must be"),
        ((2, 5, 4, 4), (1, 8, 8), r"superpixels must be \[N, H', W'\] with N = 2, .* got \[1, 8, 8\]"),
        ((2, 5, 4, 4), (2, 0, 8), "at least one pixel"),
    ],
)
@POOLINGS
def test_bad_shapes(features: tuple[int, ...], labels: tuple[int, ...], message: str, pooling: str) -> None:
    with pytest.raises(ValueError, match=message):
        head(pooling=pooling)(torch.zeros(features), torch.zeros(labels, dtype=torch.long))


def test_bad_classes() -> None:
    built = head()
    found = built(torch.randn(2, 5, 4, 6), superpixels())
    with pytest.raises(ValueError, match=r"present must be \[2, 3\], got \[2, 4\]"):
        built.losses(found, torch.zeros(2, 4))
