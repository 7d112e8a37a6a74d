import pytest
import torch
from torch.nn import functional

from detpipe.spatial_transformer import AffineGrid, AttentionGrid, Sampler, cell_centers
from tests.spatial_transformer.definitions import sample, some_theta

MODES, PADDINGS = ["bilinear", "bicubic", "nearest"], ["zeros", "border"]
every_kind = [
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("padding", PADDINGS),
]


def each(test):
    for mark in every_kind:
        test = mark(test)
    return test


def maps(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype)


def to_cells(coordinate, count):
    return count * (coordinate + 1) / 2 - 0.5


@each
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (3, 1), (1, 1)])
def test_equals_the_loop_from_the_definition(mode, padding, size):
    features, grid = maps(2, 2, *size), 1.5 * torch.randn(2, 4, 6, 2, dtype=torch.float64)
    expected = sample(features, grid, mode, padding)
    torch.testing.assert_close(Sampler(mode, padding)(features, grid), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        Sampler(mode, padding)(features.float(), grid.float()).double(), expected, rtol=0, atol=1e-4
    )


@each
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((1, 1), torch.float64), ((5, 7), torch.float16), ((28, 28), torch.bfloat16), ((33, 100), torch.float32)],
)
def test_identity_returns_the_map_to_the_bit(mode, padding, size, dtype):
    features = torch.randn(2, 3, *size).to(dtype)
    grid = cell_centers(size).expand(2, -1, -1, -1)
    result = Sampler(mode, padding)(features, grid)
    assert result.dtype == dtype
    assert torch.equal(result, features)


def test_identity_has_the_gradient_of_interpolation():
    """A cell's own value is put in, yet the points have the slope to a neighbor, and the map a gradient of one."""
    features = maps(1, 1, 3, 8).requires_grad_()
    grid = cell_centers((3, 8), dtype=torch.float64)[None].requires_grad_()
    result = Sampler()(features, grid)
    in_map, in_grid = torch.autograd.grad(result[0, 0, 1, 3], (features, grid))
    one = torch.zeros(1, 1, 3, 8, dtype=torch.float64)
    one[0, 0, 1, 3] = 1
    torch.testing.assert_close(in_map, one)
    row = features[0, 0, 1]
    slopes = [(row[4] - row[3]) * 8 / 2, (row[3] - row[2]) * 8 / 2]
    assert any(torch.isclose(in_grid[0, 1, 3, 0], slope) for slope in slopes)


def test_derivatives_are_equations_6_and_7():
    features, grid = (
        maps(1, 2, 4, 5).requires_grad_(),
        (0.9 * torch.randn(1, 3, 4, 2, dtype=torch.float64)).requires_grad_(),
    )
    output = Sampler()(features, grid)
    upstream = torch.randn_like(output)
    in_map, in_grid = torch.autograd.grad(output, (features, grid), upstream)
    x, y = to_cells(grid[0, ..., 0], 5).detach(), to_cells(grid[0, ..., 1], 4).detach()
    expected_map, expected_grid = torch.zeros_like(features), torch.zeros_like(grid)
    for i in range(3):
        for j in range(4):
            for n in range(4):
                for m in range(5):
                    along_x, along_y = max(0, 1 - abs(x[i, j] - m)), max(0, 1 - abs(y[i, j] - n))
                    sign_x = 0 if abs(m - x[i, j]) >= 1 else 1 if m >= x[i, j] else -1
                    sign_y = 0 if abs(n - y[i, j]) >= 1 else 1 if n >= y[i, j] else -1
                    expected_map[0, :, n, m] += upstream[0, :, i, j] * along_x * along_y  # equation 6
                    value = (upstream[0, :, i, j] * features[0, :, n, m]).sum().detach()
                    expected_grid[0, i, j, 0] += value * along_y * sign_x * 5 / 2  # equation 7, in -1..1
                    expected_grid[0, i, j, 1] += value * along_x * sign_y * 4 / 2
    torch.testing.assert_close(in_map, expected_map, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(in_grid, expected_grid, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("mode", "antialias"), [*((mode, False) for mode in MODES), ("bilinear", True), ("bicubic", True)]
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_against_finite_differences(mode, padding, antialias):
    features = maps(2, 1, 5, 6).requires_grad_()
    theta = torch.tensor([[1.5, 0.3, 0.1, -0.2, 1.1, 0.07], [0.7, 0.2, -0.3, 0.1, 1.9, 0.2]], dtype=torch.float64)
    grid = AffineGrid()(theta, (2, 3)).requires_grad_(mode != "nearest")
    sampler = Sampler(mode, padding, antialias, levels=2)
    assert torch.autograd.gradcheck(sampler, (features, grid))


def test_batches_of_gradients_by_vmap():
    features, theta = maps(3, 2, 4, 5), some_theta(AffineGrid(), 3)
    theta[0] = AffineGrid().identity()

    def loss(theta, features):
        return Sampler()(features[None], AffineGrid()(theta[None], (4, 5))).square().sum()

    batched = torch.vmap(torch.func.grad(loss))(theta, features)
    each_alone = [torch.func.grad(loss)(*pair) for pair in zip(theta, features, strict=True)]
    torch.testing.assert_close(batched, torch.stack(each_alone))
    assert (batched[0] != 0).all()


def test_nearest_has_no_gradient_in_the_points():
    grid = torch.zeros(1, 2, 2, 2, requires_grad=True)
    Sampler("nearest")(torch.randn(1, 1, 3, 3), grid).sum().backward()
    assert (grid.grad == 0).all()


@each
@pytest.mark.parametrize("far", [16.5, 1e10, torch.inf, -torch.inf, torch.nan])
def test_points_nowhere_near_the_map(mode, padding, far):
    features = torch.randn(1, 2, 3, 4, requires_grad=True)
    grid = torch.full((1, 2, 2, 2), far, requires_grad=True)
    for antialias in (False, mode != "nearest"):
        result = Sampler(mode, padding, antialias)(features, grid)
        border = features[..., 0, 0] if far < 0 else features[..., -1, -1]
        expected = torch.zeros(1, 2) if padding == "zeros" else border
        torch.testing.assert_close(result, expected[..., None, None].expand(-1, -1, 2, 2))
        for gradient in torch.autograd.grad(result.square().sum(), (features, grid)):
            assert gradient.isfinite().all()


@each
def test_a_single_faulty_point_leaves_the_others_alone(mode, padding):
    features, grid = maps(1, 2, 5, 7), torch.randn(1, 3, 4, 2, dtype=torch.float64)
    expected = Sampler(mode, padding)(features, grid)
    grid[0, 1, 2, 0] = torch.nan
    result = Sampler(mode, padding)(features, grid)
    assert result.isfinite().all()
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1, 2] = False
    assert torch.equal(result[..., keep], expected[..., keep])


@pytest.mark.parametrize("antialias", [False, True])
def test_several_grids_an_image_read_as_one_by_one(antialias):
    features, grid = maps(2, 3, 8, 9), 1.5 * torch.randn(2, 5, 4, 6, 2, dtype=torch.float64)
    sampler = Sampler(antialias=antialias)
    expected = torch.stack([sampler(features, grid[:, i]) for i in range(5)], dim=1)
    torch.testing.assert_close(sampler(features, grid), expected, rtol=1e-12, atol=1e-12)
    assert sampler(features, grid[:, :0, :, :]).shape == (2, 0, 3, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_read_at_exact_places(dtype):
    """A shift by a whole cell of a map of 4000: rounding the coordinates to half precision would miss by up to a cell."""
    features = torch.randn(1, 1, 2, 4000).to(dtype).requires_grad_()
    grid = AffineGrid()(torch.tensor([[1, 0, 2 / 4000, 0, 1, 0]]), (2, 4000)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = Sampler("bicubic")(features, grid)
    assert result.dtype == dtype
    torch.testing.assert_close(result[..., :-1], features[..., 1:], rtol=0, atol=0.03)
    result.float().sum().backward()
    assert features.grad.dtype == dtype
    assert grid.grad.dtype == torch.float32


def test_channels_last_and_strided_maps():
    features = maps(2, 4, 5, 6)
    grid = AffineGrid()(some_theta(AffineGrid()), (3, 4))
    expected = Sampler()(features, grid)
    assert torch.equal(Sampler()(features.to(memory_format=torch.channels_last), grid), expected)
    strided = torch.stack([features, features], dim=-1)[..., 0]
    transposed = grid.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(Sampler()(strided, transposed), expected)


@each
def test_empty_batch(mode, padding):
    features, grid = torch.randn(0, 2, 5, 6, requires_grad=True), torch.zeros(0, 3, 4, 2, requires_grad=True)
    for antialias in (False, mode != "nearest"):
        result = Sampler(mode, padding, antialias)(features, grid)
        assert result.shape == (0, 2, 3, 4)
        result.sum().backward()
    assert features.grad.shape == features.shape


# anti-aliasing: a grid coarser than the map


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_zooming_out_never_less_than_plain_sampling_and_equal_to_it_where_nothing_is_coarse(mode, padding):
    features, theta = maps(2, 3, 6, 9), torch.tensor([[-0.5, 0.2, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
    grid = AttentionGrid()(theta, (6, 9))
    assert torch.equal(Sampler(mode, padding, antialias=True)(features, grid), Sampler(mode, padding)(features, grid))


@pytest.mark.parametrize("size", [*((n, 47 - n) for n in range(2, 24)), (3, 331), (10_000, 3)])
def test_the_identity_is_never_smoothed_whatever_the_rounding_of_its_steps(size):
    features = torch.randn(1, 1, *size)
    assert torch.equal(Sampler(antialias=True)(features, cell_centers(size)[None]), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(16, 24), (40, 56)])
def test_whole_blocks_are_averaged_exactly(size, factor, dtype):
    features = maps(2, 3, *size, dtype=dtype)
    grid = cell_centers((size[0] // factor, size[1] // factor), dtype=dtype).expand(2, -1, -1, -1)
    result = Sampler(antialias=True)(features, grid)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(result, functional.avg_pool2d(features, factor), rtol=0, atol=tolerance)


def test_blocks_that_reach_over_the_edge_average_what_the_padding_says():
    """Five cells by three, zoomed out by four: blocks from the upper left, the rest of which is outside."""
    features = maps(1, 1, 5, 3)
    corners = torch.tensor([[[[4 * 2 / 3 / 2, 4 * 2 / 5 / 2]], [[4 * 2 / 3 / 2, 12 * 2 / 5 / 2]]]]).double() - 1
    steps = torch.tensor([[4 * 2 / 3, 0.0], [0.0, 4 * 2 / 5]], dtype=torch.float64).expand(1, 2, 1, 2, 2)
    zeros = Sampler(antialias=True)(features, corners, steps)[0, 0, :, 0]
    torch.testing.assert_close(zeros, torch.stack([features[..., :4, :].sum(), features[..., 4, :].sum()]) / 16)
    repeated = functional.pad(features, (0, 1, 0, 3), mode="replicate")
    border = Sampler(padding="border", antialias=True)(features, corners, steps)[0, 0, :, 0]
    torch.testing.assert_close(border, functional.avg_pool2d(repeated, 4)[0, 0, :, 0])


def test_between_two_octaves_both_are_mixed():
    features, grid = maps(1, 2, 32, 32), cell_centers((12, 12), dtype=torch.float64)[None]  # cells of 2 2/3
    share = torch.log2(torch.tensor(32 / 12, dtype=torch.float64)) - 1
    once = functional.avg_pool2d(features, 2)
    twice = functional.avg_pool2d(once, 2)
    expected = (1 - share) * sample(once, grid) + share * sample(twice, grid)
    torch.testing.assert_close(Sampler(antialias=True)(features, grid), expected, rtol=1e-9, atol=1e-9)


def test_stripes_finer_than_the_grid_turn_gray_and_alias_without_smoothing():
    stripes = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    grid = AttentionGrid()(torch.tensor([[0.0, 0.03, 0.0]]), (12, 12))
    inner = (..., slice(1, -1), slice(1, -1))
    smooth, plain = Sampler(antialias=True)(stripes, grid)[inner], Sampler()(stripes, grid)[inner]
    assert (smooth - 0.5).abs().max() < 1e-3
    assert (plain - 0.5).abs().max() > 0.3


def test_beyond_the_coarsest_map_nothing_more_is_smoothed():
    features = maps(1, 1, 16, 16)
    grid = cell_centers((2, 2), dtype=torch.float64)[None]
    expected = sample(functional.avg_pool2d(features, 4), grid)
    torch.testing.assert_close(Sampler(antialias=True, levels=2)(features, grid), expected, rtol=1e-9, atol=1e-9)


def test_other_steps_are_refused():
    with pytest.raises(ValueError, match=r"steps must be \[1, 3, 3, 2, 2\], .* got \[1, 3, 3, 2\]"):
        Sampler(antialias=True)(maps(1, 1, 4, 4), torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 2))


def test_a_single_row_needs_steps():
    with pytest.raises(ValueError, match="one row or one column does not tell"):
        Sampler(antialias=True)(maps(1, 1, 4, 4), torch.zeros(1, 1, 3, 2))


# bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "linear"}, "mode must be one of .* got 'linear'"),
        ({"padding": "reflection"}, "padding must be one of .* got 'reflection'"),
        ({"mode": "nearest", "antialias": True}, "choose mode 'bilinear' or 'bicubic'"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


@pytest.mark.parametrize(
    ("features", "grid", "message"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(1, 2, 2, 2), r"features must be .* got \[3, 4, 5\]"),
        (torch.zeros(1, 1, 0, 5), torch.zeros(1, 2, 2, 2), "at least one channel and cell"),
        (torch.zeros(1, 1, 4, 5).long(), torch.zeros(1, 2, 2, 2), "floating-point .* torch.int64"),
        (torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 2, 3), r"grid must be .* got \[1, 2, 2, 3\]"),
        (torch.zeros(1, 1, 4, 5), torch.zeros(1, 2, 2, 2).long(), "grid must be floating-point"),
        (torch.zeros(2, 1, 4, 5), torch.zeros(3, 2, 2, 2), "grid .* is for 3 images, features are 2"),
    ],
)
def test_other_maps_and_grids_are_refused(features, grid, message):
    with pytest.raises(ValueError, match=message):
        Sampler()(features, grid)
