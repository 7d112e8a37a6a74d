import pytest
import torch

from detpipe.roi_pooling.feature_superpixels import feature_superpixels


def slow_superpixels(features, spacing, iterations, compactness):
    """From the definition, a cell and a seed at a time."""
    images, _, height, width = features.shape
    across = -(-width // spacing)
    down = -(-height // spacing)
    labels = torch.zeros(images, height, width, dtype=torch.int64)
    for image in range(images):
        values = features[image].double() - features[image].double().mean(dim=(1, 2), keepdim=True)
        spread = values.square().sum(dim=0).mean().sqrt()
        values = values / spread if spread > 0 else values
        points = {
            (y, x): torch.cat((values[:, y, x], torch.tensor([y, x]).double() * compactness / spacing))
            for y in range(height)
            for x in range(width)
        }
        label = {(y, x): y // spacing * across + x // spacing for y, x in points}
        centers = {}
        for _ in range(iterations):
            for seed in set(label.values()):
                mine = [points[cell] for cell in points if label[cell] == seed]
                centers[seed] = torch.stack(mine).mean(dim=0)
            for y, x in points:
                home = y // spacing, x // spacing
                near = [(home[0] + dy, home[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                seeds = [sy * across + sx for sy, sx in near if 0 <= sy < down and 0 <= sx < across]
                label[y, x] = min(seeds, key=lambda seed: float((points[y, x] - centers[seed]).square().sum()))
        for (y, x), seed in label.items():
            labels[image, y, x] = seed
    return labels


def random_maps(images=2, channels=3, height=9, width=11, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(images, channels, height, width, generator=draw, dtype=torch.float64).to(dtype)


def blocks(height, width, spacing):
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    return y // spacing * -(-width // spacing) + x // spacing


def test_the_documented_example():
    halves = torch.tensor([0.0, 0.0, 0.0, 9.0, 9.0, 9.0]).expand(1, 1, 2, 6)
    labels = feature_superpixels(halves, spacing=2, compactness=0.1)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[[0, 0, 0, 2, 2, 2]] * 2]


@pytest.mark.parametrize("spacing", [1, 2, 4, 20])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("compactness", [0.0, 0.5, 3.0])
def test_equals_the_loop(spacing, iterations, compactness):
    features = random_maps(height=6, width=7)
    got = feature_superpixels(features, spacing, iterations, compactness)
    assert torch.equal(got, slow_superpixels(features, spacing, iterations, compactness))


@pytest.mark.parametrize("spacing", [1, 3, 4, 50])
def test_without_iterations_a_grid_of_blocks(spacing):
    labels = feature_superpixels(random_maps(), spacing, iterations=0)
    assert torch.equal(labels, blocks(9, 11, spacing).expand(2, -1, -1))


def test_position_alone_keeps_the_blocks():
    labels = feature_superpixels(random_maps(height=12, width=8), 4, compactness=1e4)
    assert torch.equal(labels, blocks(12, 8, 4).expand(2, -1, -1))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0, 1e30])
@pytest.mark.parametrize("compactness", [0.0, 0.5])
def test_a_constant_map_keeps_the_blocks(value, compactness):
    features = torch.full((1, 3, 8, 12), value)
    assert torch.equal(feature_superpixels(features, 4, 3, compactness)[0], blocks(8, 12, 4))


def test_borders_are_followed_where_the_grid_does_not():
    # an edge at 5 of 16 columns: no superpixel has cells of both sides
    features = torch.zeros(1, 2, 16, 16)
    features[..., 5:] = 1
    labels = feature_superpixels(features, 4, iterations=4, compactness=0.1)[0]
    assert not set(labels[:, :5].flatten().tolist()) & set(labels[:, 5:].flatten().tolist())


def test_images_are_clustered_apart_and_alike_each_time():
    features = random_maps(images=3)
    labels = feature_superpixels(features)
    assert torch.equal(feature_superpixels(features), labels)
    for image in range(3):
        assert torch.equal(feature_superpixels(features[image : image + 1])[0], labels[image])
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(feature_superpixels(last), labels)
    assert torch.equal(feature_superpixels(features * 100 + 5), labels)
    assert feature_superpixels(features[:0]).shape == (0, 9, 11)


def test_has_no_gradient():
    assert not feature_superpixels(random_maps().requires_grad_()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_float32(dtype):
    features = random_maps(dtype=dtype)
    labels = feature_superpixels(features)
    assert torch.equal(labels, feature_superpixels(features.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(labels, feature_superpixels(features))


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_equals_a_loop(dim):
    features = torch.stack([random_maps(), random_maps().flip(3), random_maps() ** 3], dim)
    got = torch.vmap(feature_superpixels, dim)(features)
    for v in range(3):
        assert torch.equal(got[v], feature_superpixels(features.select(dim, v)))


def test_compiles_without_a_break():
    compiled = torch.compile(feature_superpixels, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(random_maps()), feature_superpixels(random_maps()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spacing": 0}, "spacing must be a whole number, 1 or larger, got 0"),
        ({"spacing": 2.0}, "spacing must be a whole number, 1 or larger, got 2.0"),
        ({"spacing": True}, "spacing must be a whole number, 1 or larger, got True"),
        ({"iterations": -1}, "iterations must be a whole number, 0 or larger, got -1"),
        ({"compactness": -0.1}, "compactness must be 0 or larger, and finite, got -0.1"),
        ({"compactness": float("nan")}, "compactness must be 0 or larger, and finite, got nan"),
        ({"compactness": float("inf")}, "compactness must be 0 or larger, and finite, got inf"),
    ],
)
def test_bad_numbers(wrong, message):
    with pytest.raises(ValueError, match=message):
        feature_superpixels(random_maps(), **wrong)


def test_bad_features():
    with pytest.raises(ValueError, match=r"features must be \[N, C, H, W\]"):
        feature_superpixels(random_maps()[0])
    with pytest.raises(ValueError, match="features must be floating-point"):
        feature_superpixels(random_maps().long())
