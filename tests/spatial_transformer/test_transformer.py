import copy

import pytest
import torch
from torch import nn

from detpipe.spatial_transformer import (
    AffineGrid,
    AttentionGrid,
    ConvLocalization,
    ParallelTransformers,
    PooledLocalization,
    ProjectiveGrid,
    Sampler,
    SpatialTransformer,
    ThetaLayer,
    ThinPlateSplineGrid,
)
from tests.spatial_transformer.definitions import GRIDS, sample, some_theta

all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


class Given(nn.Module):
    """A localization that always answers the same."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, features):
        return self.theta.to(features.dtype).expand(features.shape[0], -1)


def transformer(grid, channels=3, size=None, cells=2, **settings):
    return SpatialTransformer(
        PooledLocalization(channels, grid, cells=cells, hidden=8), grid, Sampler(**settings), size
    )


@all_grids
@pytest.mark.parametrize("localize", [ConvLocalization, PooledLocalization])
@pytest.mark.parametrize("antialias", [False, True])
def test_untrained_it_returns_its_input_to_the_bit(grid, localize, antialias):
    features = torch.randn(2, 3, 7, 11)
    whole = SpatialTransformer(localize(3, grid), grid, Sampler(antialias=antialias))
    assert torch.equal(whole(features), features)
    half = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(half), half)
    assert torch.equal(copy.deepcopy(whole).bfloat16()(half), half)


@all_grids
@pytest.mark.parametrize("size", [(4, 6), (1, 1), (9, 2)])
def test_is_localization_grid_and_sampler_in_a_row(grid, size):
    theta, features = some_theta(grid, 1), torch.randn(2, 2, 5, 7, dtype=torch.float64)
    model = SpatialTransformer(Given(theta), grid, size=size).double()
    output, seen, points = model.transform(features)
    assert torch.equal(seen, theta.expand(2, -1))
    assert points.shape == (2, *size, 2)
    torch.testing.assert_close(output, sample(features, points), rtol=1e-9, atol=1e-9)
    assert torch.equal(model(features), output)


@all_grids
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("extreme", [0.0, -2.0, 50.0, -1e30, torch.nan, torch.inf])
def test_degenerate_transforms_have_finite_outputs_and_gradients(grid, antialias, extreme):
    features = torch.randn(2, 2, 6, 7, requires_grad=True)
    model = SpatialTransformer(
        Given(torch.full((1, grid.parameters_count), extreme)), grid, Sampler(antialias=antialias)
    )
    output, theta, _ = model.transform(features)
    torch.testing.assert_close(theta, model.localization.theta.detach().expand(2, -1), equal_nan=True)  # to be seen
    assert output.isfinite().all()
    output.square().sum().backward()
    assert features.grad.isfinite().all()
    assert model.localization.theta.grad.isfinite().all()


@pytest.mark.parametrize("size", [None, 7, (3, 5), (1, 1)])
@pytest.mark.parametrize("antialias", [False, True])
def test_empty_batches_and_sizes(size, antialias):
    model = transformer(AffineGrid(), size=size, antialias=antialias)
    expected = (1, 1) if size == (1, 1) else (7, 7) if size == 7 else size or (6, 9)
    assert model(torch.randn(2, 3, 6, 9)).shape == (2, 3, *expected)
    empty = torch.randn(0, 3, 6, 9, requires_grad=True)
    output = model(empty)
    assert output.shape == (0, 3, *expected)
    output.sum().backward()
    assert empty.grad.shape == empty.shape
    assert model(torch.randn(2, 3, 1, 1)).shape[2:] == (expected if size else (1, 1))


@pytest.mark.parametrize(("size", "kernel"), [((1, 1), (8, 8)), ((1, 2), (8, 8)), ((2, 1), (8, 8))])
def test_a_single_row_is_smoothed_over_what_it_covers(size, kernel):
    features = torch.randn(2, 3, 8 * size[0], 8 * size[1])
    output = transformer(AffineGrid(), size=size, antialias=True)(features)
    torch.testing.assert_close(output, nn.functional.avg_pool2d(features, kernel), rtol=0, atol=1e-6)


def test_learns_where_to_look():
    """Shown a blob anywhere, brings it to the middle."""
    axis = torch.linspace(-1, 1, 20)

    def blobs(x, y):
        square = (axis - x[:, None, None]) ** 2 + (axis[:, None] - y[:, None, None]) ** 2
        return torch.exp(-square / 0.1)[:, None]

    x, y = torch.rand(2, 64) - 0.5
    features, target = blobs(x, y), blobs(torch.zeros(64), torch.zeros(64))
    grid = AttentionGrid(max_log_scale=0.5, max_shift=1.0)
    model = transformer(grid, channels=1, cells=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(features) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    shift = model.transform(features).theta[:, 1:].tanh()
    torch.testing.assert_close(shift, torch.stack([x, y], dim=1), rtol=0, atol=0.15)


def test_in_series_it_is_a_sequential_with_layers_between():
    affine, spline = AffineGrid(), ThinPlateSplineGrid(3)
    series = nn.Sequential(
        transformer(affine, channels=1), nn.Conv2d(1, 4, 3, padding=1), transformer(spline, channels=4), nn.ReLU()
    )
    features = torch.randn(2, 1, 9, 12)
    torch.testing.assert_close(series(features), series[1](features).relu(), rtol=0, atol=0)
    series(features).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in series.parameters())
    assert (series[0].localization.theta.bias.grad != 0).all()


def test_in_parallel_each_looks_for_itself():
    thetas = [torch.tensor([[-0.5, 0.2 * i, 0.1]]) for i in range(3)]
    each = [SpatialTransformer(Given(theta), AttentionGrid(), size=(4, 5)) for theta in thetas]
    features = torch.randn(2, 3, 8, 9)
    outputs = [one(features) for one in each]
    assert torch.equal(ParallelTransformers(each)(features), torch.cat(outputs, dim=1))
    stacked = ParallelTransformers(each, "stack")
    assert torch.equal(stacked(features), torch.stack(outputs, dim=1))
    for seen, theta, output in zip(stacked.transform(features), thetas, outputs, strict=True):
        assert torch.equal(seen.output, output)
        assert torch.equal(seen.theta, theta.expand(2, -1))
    stacked(features).sum().backward()
    assert all(parameter.grad is not None for parameter in stacked.parameters())


def test_state_is_that_of_the_localization_and_loads():
    first, second = (transformer(ThinPlateSplineGrid(3)) for _ in range(2))
    with torch.no_grad():
        first.localization.theta.weight.normal_(std=0.1)
    second.load_state_dict(first.state_dict())
    features = torch.randn(2, 3, 5, 6)
    assert torch.equal(first(features), second(features))
    assert all(name.startswith("localization.") for name in first.state_dict())


@pytest.mark.slow
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    model = nn.Sequential(
        transformer(AffineGrid()),
        transformer(ProjectiveGrid()),
        transformer(ThinPlateSplineGrid(3), antialias=True, levels=1),
    )
    with torch.no_grad():
        for part in model:
            part.localization.theta.weight.normal_(std=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    features = torch.randn(2, 3, 6, 9)
    expected = model(features)
    torch.testing.assert_close(compiled(features), expected)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled(features).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_exports_to_onnx():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = transformer(AffineGrid(), size=(6, 9)).eval()
    with torch.no_grad():
        model.localization.theta.weight.normal_(std=0.1)
    features = torch.randn(2, 3, 6, 9)
    program = torch.onnx.export(model, (features,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), model(features).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("answer", [torch.zeros(2, 5), torch.zeros(1, 6), torch.zeros(2, 2, 3), None])
def test_a_localization_that_answers_something_else_is_refused(answer):
    class Odd(nn.Module):
        def forward(self, features):
            return answer

    with pytest.raises(ValueError, match=r"localization must give \[N, P\] = \[2, 6\] for AffineGrid, got"):
        SpatialTransformer(Odd(), AffineGrid())(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("size", [0, (3, 0), (3,), (1, 2, 3), 2.5, True])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="size must be one or two positive whole numbers"):
        transformer(AffineGrid(), size=size)


def test_transformers_that_do_not_fit_together_are_refused():
    one, other = transformer(AffineGrid(), size=3), transformer(AffineGrid(), size=4)
    with pytest.raises(ValueError, match=r"all of one output size, got the sizes \[\(3, 3\), \(4, 4\)\]"):
        ParallelTransformers([one, other])
    with pytest.raises(ValueError, match="at least one transformer"):
        ParallelTransformers([])
    with pytest.raises(ValueError, match="combine must be"):
        ParallelTransformers([one], "sum")


def test_own_networks_end_in_a_theta_layer():
    grid = AffineGrid()
    own = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(8, 4), ThetaLayer(4, grid))
    features = torch.randn(2, 1, 8, 8)
    assert torch.equal(SpatialTransformer(own, grid)(features), features)
